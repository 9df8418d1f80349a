#!/bin/sh
# Builds build/parcels.wasm from parcels.py. Requires Python 3.10 or newer with venv; installs the
# rest into build/venv/.
set -eu
cd "$(dirname "$0")"

if ! cmp -s requirements.txt build/venv/.installed; then
    python3 -m venv --clear build/venv
    build/venv/bin/pip install --quiet --disable-pip-version-check --requirement requirements.txt
    cp requirements.txt build/venv/.installed
fi
# Not with --stub-wasi: it hides the traceback that Python writes to standard error.
build/venv/bin/componentize-py --quiet --wit-path ../../../wit --world full-plugin componentize parcels --output build/parcels.wasm
