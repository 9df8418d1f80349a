#!/bin/sh
# Builds build/parcels.wasm from parcels.c. Requires Python 3 with venv, and Cargo; installs a C
# compiler (zig) into build/venv/.
set -eu
cd "$(dirname "$0")"

./zig.sh

# The bindings: full_plugin.h, full_plugin.c and full_plugin_component_type.o, whose component type
# lets the host turn the module into a component. Built as part of the workspace, so that nothing is
# compiled twice.
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/../../../target}
export CARGO_TARGET_DIR
cargo build --quiet --workspace --bin c-bindings
"$CARGO_TARGET_DIR/debug/c-bindings" build/bindings

# A reactor has no main. The linker drops the WASI imports of the C library, because nothing uses
# them. The stack is reduced because zig's default of 16 MiB is half of the memory limit of an
# instance.
ZIG_GLOBAL_CACHE_DIR=$PWD/build/zig ZIG_LOCAL_CACHE_DIR=$PWD/build/zig \
    build/venv/bin/python -m ziglang cc --target=wasm32-wasi -mexec-model=reactor -std=c17 -Wall -Wextra -Werror -Os -s -Wl,-z,stack-size=65536 \
    -Ibuild/bindings parcels.c json.c build/bindings/full_plugin.c build/bindings/full_plugin_component_type.o -o build/parcels.wasm
