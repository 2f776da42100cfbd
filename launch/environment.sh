# Sourced by launch/quickstart.sh and tests/run.sh: makes .venv in the repository and installs sr_dist
# with the extra named in $1; afterwards `python` is the environment's. PYTHON names another interpreter.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  python=${PYTHON:-}
  for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
    if [ -z "$python" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      python=$candidate
    fi
  done
  if [ -z "$python" ]; then
    echo "error: no Python 3.10 or newer found; install one, or name it: PYTHON=/path/to/python3 bash $0" >&2
    exit 2
  fi
  echo "Making .venv with $("$python" --version)"
  "$python" -m venv .venv || {
    rm -rf .venv
    echo "error: $python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 2
  }
fi
. .venv/bin/activate
# What was installed is noted, so that running again needs no network.
wanted="$1 $(cat setup.cfg sr_dist/__init__.py | cksum)"
if ! grep -qxsF "$wanted" .venv/installed; then
  echo "Installing sr_dist[$1] into .venv (PyTorch is large: minutes the first time)"
  # Python compiles what is imported, a small part of it all, by itself.
  python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[$1]"
  echo "$wanted" >> .venv/installed
fi
