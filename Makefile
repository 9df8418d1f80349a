# make build   builds target/release/pointsman and build/plugins/       (20 min cold)
# make demo    runs a node, a page and events; DEMO_SECONDS limits it   (12 min cold)
# make test    runs all tests; LONG=1 adds random cases                 (20 min cold, 14 compiling)
# make lint    checks format, clippy and documentation                  (5 min cold)
# make bench   measures costs, as ratios within one run                 (25 min cold, 4 measuring)
#
# Cold: measured with an empty target/ on 2 cores. Development builds compile dependencies with
# optimisation, so the demo and the tests use the same development build of the host. Only `make
# build` and `make bench` compile everything again.

PLUGINS := address discard prioritize rules

TARGET := $(or $(CARGO_TARGET_DIR),target)
LOCKED := $(if $(CI),--locked)

.PHONY: build demo test lint bench plugins

build: plugins
	cargo build $(LOCKED) --release -p pointsman

# Selecting the workspace, as the tests do, selects the same features; otherwise all dependencies
# would be compiled twice.
demo: plugins
	cargo build $(LOCKED) --workspace --bin pointsman --example demo
	$(TARGET)/debug/examples/demo

test:
	rustup target add wasm32-unknown-unknown wasm32-wasip2
	scripts/need.sh redis-server node chromium python
	cargo test $(LOCKED) --workspace

lint:
	cargo fmt --check
	cargo clippy $(LOCKED) --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc $(LOCKED) --workspace --no-deps --document-private-items
	if cargo deny --version >/dev/null 2>&1; then cargo deny check; fi

bench:
	cargo bench $(LOCKED) --workspace --bench criteria --bench plugins

plugins:
	rustup target add wasm32-unknown-unknown wasm32-wasip2
	cargo build $(LOCKED) --profile plugin --target wasm32-unknown-unknown $(PLUGINS:%=-p %)
	mkdir -p build/plugins
	cp $(PLUGINS:%=$(TARGET)/wasm32-unknown-unknown/plugin/%.wasm) build/plugins/
