#!/bin/sh
# Searches for inputs that violate the properties in tests/fuzz/properties.rs:
#     scripts/fuzz.sh TARGET [SECONDS]
# TARGET is a folder of tests/fuzz/corpus; the default is 60 seconds. Installs cargo-fuzz if it is
# missing. Inputs that it finds are kept in target/fuzz/corpus, and one that violates a property in
# target/fuzz/artifacts: add that one to tests/fuzz/corpus, where `make test` runs it.
set -eu
cd "$(dirname "$0")/.."
if [ $# -lt 1 ] || [ ! -d "tests/fuzz/corpus/$1" ]; then
    echo "fuzz.sh: no target '${1:-}'; use one of: $(ls tests/fuzz/corpus | tr '\n' ' ')" >&2
    exit 2
fi
target=$1
seconds=${2:-60}
work=${CARGO_TARGET_DIR:-target}/fuzz
cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
mkdir -p "$work/corpus/$target" "$work/artifacts/$target"
# The same versions as the host. Sanitizer coverage is an unstable option of the pinned toolchain.
cp Cargo.lock tests/fuzz/Cargo.lock
export RUSTC_BOOTSTRAP=1
exec cargo fuzz run --fuzz-dir tests/fuzz --target-dir "$work/target" --sanitizer none "$target" \
    "$work/corpus/$target" "tests/fuzz/corpus/$target" -- \
    -max_total_time="$seconds" -max_len=8192 -timeout=10 -rss_limit_mb=2048 \
    -artifact_prefix="$work/artifacts/$target/"
