# make build   target/release/pointsman and build/plugins/
# make demo    a node, a page and a stream of events; DEMO_SECONDS=30 ends it
# make test    all tests; LONG=1 runs more random cases
# make lint    format, clippy, documentation
# make bench   benchmarks, as ratios within one run
#
# Each target reports at its start how long it takes with an empty target/ on 2 cores. The demo and
# the tests use the same development build of the host; only `make build` and `make bench` compile
# everything again.

PLUGINS := address discard prioritize rules

TARGET := $(or $(CARGO_TARGET_DIR),target)
LOCKED := $(if $(CI),--locked)

# $(call estimate,FILE,COLD,WARM): how long a target takes, by whether FILE exists from an earlier build.
estimate = @if [ -e $(TARGET)/$(1) ]; then echo "make $@: $(3)"; else echo "make $@: $(2) on 2 cores"; fi

.PHONY: build demo test lint bench plugins

build:
	$(call estimate,release/pointsman,about 16 minutes,compiling what changed)
	@$(MAKE) --no-print-directory plugins
	@echo "make build: building the host, optimised"
	cargo build $(LOCKED) --release -p pointsman

# Selecting the workspace, as the tests do, selects the same features; otherwise all dependencies
# are compiled twice.
demo:
	$(call estimate,debug/demo,the first build takes about 8 minutes,compiling what changed; seconds if nothing did)
	@$(MAKE) --no-print-directory plugins
	@echo "make demo: building the host"
	cargo build $(LOCKED) --workspace --bin pointsman --bin demo
	$(TARGET)/debug/demo

test:
	$(call estimate,debug/deps,about 22 minutes: 8 to compile and 14 to run,14 minutes and compiling what changed)
	rustup target add wasm32-unknown-unknown wasm32-wasip2
	scripts/need.sh redis-server curl faketime openssl node chromium firefox nginx haproxy caddy apache varnish hitch python
	@echo "make test: building the host and the tests"
	cargo test $(LOCKED) --workspace --no-run
	@echo "make test: running the tests; the first ones build and compile plugins"
	cargo test $(LOCKED) --workspace

lint:
	$(call estimate,doc,about 5 minutes,checking what changed)
	cargo fmt --check
	@echo "make lint: checking the code with clippy"
	cargo clippy $(LOCKED) --workspace --all-targets -- -D warnings
	@echo "make lint: building the documentation"
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc $(LOCKED) --workspace --no-deps --document-private-items
	if cargo deny --version >/dev/null 2>&1; then cargo deny check; fi

bench:
	$(call estimate,release/deps,about 20 minutes: 16 to compile and 4 to measure,4 minutes and compiling what changed)
	cargo bench $(LOCKED) --workspace --bench criteria --bench plugins

plugins:
	@echo "make $@: building the bundled plugins"
	rustup target add wasm32-unknown-unknown wasm32-wasip2
	cargo build $(LOCKED) --profile plugin --target wasm32-unknown-unknown $(PLUGINS:%=-p %)
	mkdir -p build/plugins
	cp $(PLUGINS:%=$(TARGET)/wasm32-unknown-unknown/plugin/%.wasm) build/plugins/
