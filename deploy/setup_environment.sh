#!/bin/sh
# Creates the virtual environment of a checkout. Debian ships venv apart from Python: install it when
# this is root, else say what to install.
set -eu
venv=$1
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "geomirror needs Python 3.11 or newer; set PYTHON=" >&2; exit 2; }
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv
    else
        echo "this Python has no venv module; run: sudo apt-get install python3-venv" >&2
        exit 2
    fi
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev,uvloop]'
touch "$venv/.ready"
