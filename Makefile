# make build   target/release/pointsman and build/plugins/                      (20 min cold)
# make demo    a node, a page and a stream of events; DEMO_SECONDS=30 ends it   (12 min cold)
# make test    everything that is tested; LONG=1 plays more by chance           (20 min cold, 14 of them compiling)
# make lint    format, clippy, documentation                                    (5 min cold)
# make bench   what things cost, as ratios within one run                       (25 min cold, 4 of them measuring)
#
# Cold: an empty target/ on 2 cores, measured. Dependencies are compiled with optimisation in development builds, too, so the demo and the tests run
# the same development build of the host, and only `make build` and `make bench` compile everything a second time.

PLUGINS := address discard prioritize rules

TARGET := $(or $(CARGO_TARGET_DIR),target)
LOCKED := $(if $(CI),--locked)

.PHONY: build demo test lint bench plugins

build: plugins
	cargo build $(LOCKED) --release -p pointsman

# Selecting the workspace, here as in the tests, selects the same features, or all dependencies would be compiled twice.
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
