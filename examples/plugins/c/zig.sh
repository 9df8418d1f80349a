#!/bin/sh
# Installs zig into build/venv/. Requires Python 3 with venv.
set -eu
cd "$(dirname "$0")"

mkdir -p build
# The builds of this folder and of ../zig may run at the same time.
exec 9>build/lock
flock 9
if ! cmp -s requirements.txt build/venv/.installed; then
    python3 -m venv --clear build/venv
    build/venv/bin/pip install --quiet --disable-pip-version-check --requirement requirements.txt
    cp requirements.txt build/venv/.installed
fi
