#!/bin/sh
# Builds build/parcels.wasm from parcels.js. Needs Node 20 or newer with npm; installs the rest into node_modules/.
set -eu
cd "$(dirname "$0")"

# `npm ci` installs everything anew; only where what is installed is not what is locked.
if ! cmp -s package-lock.json node_modules/.installed; then
    npm ci --silent --no-audit --no-fund
    cp package-lock.json node_modules/.installed
fi
npm run --silent build
