#!/usr/bin/env bash
# Sets everything up and runs all checks: ruff, mypy and the tests.
#   bash tests/run.sh [arguments of pytest]     for example -k stream, or -m slow
set -euo pipefail

source "$(dirname "$0")/../launch/environment.sh" dev

ruff check .
ruff format --check .
# Beside the tests, since it keeps one processor busy; it is heard when they are over.
types=$(mktemp)
mypy >"$types" 2>&1 &
checked=$!
# One thread each, since the tests themselves run side by side; one more than there are processors, since
# many wait for something.
workers=$(python -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')
status=0
OMP_NUM_THREADS=1 python -m pytest -n "$workers" --dist worksteal "$@" || status=$?
wait "$checked" || status=1
cat "$types"
rm "$types"
exit "$status"
