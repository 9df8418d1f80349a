#!/bin/sh
# Builds build/parcels.wasm, a core module, and build/wasi/parcels.wasm, a component that imports
# WASI. Requires Cargo and both targets: rustup target add wasm32-unknown-unknown wasm32-wasip2
set -eu
cd "$(dirname "$0")"

CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/../../../target}
export CARGO_TARGET_DIR
cargo build --quiet --profile plugin --target wasm32-unknown-unknown
cargo build --quiet --profile plugin --target wasm32-wasip2
mkdir -p build/wasi
cp "$CARGO_TARGET_DIR/wasm32-unknown-unknown/plugin/parcels.wasm" build/parcels.wasm
cp "$CARGO_TARGET_DIR/wasm32-wasip2/plugin/parcels.wasm" build/wasi/parcels.wasm
