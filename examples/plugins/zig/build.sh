#!/bin/sh
# Builds build/parcels.wasm. Requires Python 3 with venv, and pointsman (or its path in POINTSMAN);
# installs zig, which is also the compiler of ../c, into ../c/build/venv/.
set -eu
cd "$(dirname "$0")"

../c/zig.sh
PATH=$PWD/../c/build/venv/bin:$PATH ZIG_GLOBAL_CACHE_DIR=$PWD/build/cache \
    "${POINTSMAN:-pointsman}" plugin build
