#!/bin/sh
# Builds build/parcels.wasm. Requires Node 20 or newer with npm, and pointsman (or its path in
# POINTSMAN); installs componentize-qjs into node_modules/.
set -eu
cd "$(dirname "$0")"

# `npm ci` reinstalls everything, so it runs only if the lock file has changed.
if ! cmp -s package-lock.json node_modules/.installed; then
    npm ci --silent --no-audit --no-fund
    cp package-lock.json node_modules/.installed
fi
"${POINTSMAN:-pointsman}" plugin build
