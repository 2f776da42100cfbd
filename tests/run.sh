#!/usr/bin/env bash
# Sets everything up and runs all checks: ruff, mypy and the tests.
#   bash tests/run.sh [arguments of pytest]     for example -k stream, or -m slow
set -euo pipefail

source "$(dirname "$0")/../launch/environment.sh" dev

ruff check .
ruff format --check .
mypy
# One thread each, since the tests themselves run side by side.
OMP_NUM_THREADS=1 python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
