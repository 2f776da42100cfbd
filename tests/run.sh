#!/usr/bin/env bash
# Sets everything up and runs all checks: ruff, mypy and the tests.
#   bash tests/run.sh [arguments of pytest]     for example -k stream, or -m slow
set -euo pipefail

source "$(dirname "$0")/../launch/environment.sh" dev

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
