#!/bin/sh
# Builds build/parcels.wasm. Requires Python 3 with venv, and pointsman (or its path in POINTSMAN);
# installs Go into build/venv/.
set -eu
cd "$(dirname "$0")"

if ! cmp -s requirements.txt build/venv/.installed; then
    python3 -m venv --clear build/venv
    build/venv/bin/pip install --quiet --disable-pip-version-check --requirement requirements.txt
    cp requirements.txt build/venv/.installed
fi
GOCACHE=$PWD/build/cache GOTOOLCHAIN=local "${POINTSMAN:-pointsman}" plugin build
