# Everything one runs here. `make help` lists it.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CARGO ?= cargo
PYTHON ?= python3
# One profile for running, testing, linting and benchmarking, so that everything is compiled once.
CARGO_FLAGS := --release --locked
# Flags of `lamplighter`, as in: make run ARGS="--model-id /models/x --port 8080"
ARGS ?=

TARGET := $(or $(CARGO_TARGET_DIR),target)
EXECUTABLE := $(TARGET)/release/lamplighter
VENV := target/clients-venv

.PHONY: help run build test lint format ci bench bench-serving toolchain

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

run: build ## Build and serve (flags: make run ARGS="--port 8080")
	@exec $(EXECUTABLE) $(ARGS)

# With --workspace, here and below: cargo chooses the features of dependencies by the packages that it is told to build,
# and compiles again what had others.
build: toolchain ## Build the executable: target/release/lamplighter
	$(CARGO) build $(CARGO_FLAGS) --workspace --bins

test: build $(VENV)/installed ## Run all tests, those through the real executable and its clients too
	$(CARGO) test $(CARGO_FLAGS) --workspace --no-fail-fast

lint: toolchain ## Check format and lints; warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(CARGO_FLAGS) --workspace --all-targets -- --deny warnings

format: toolchain ## Format all Rust code
	$(CARGO) fmt --all

ci: lint test ## What continuous integration runs

bench: toolchain ## Measure the kernels against the machine's limits
	$(CARGO) bench --profile release --locked --workspace --bench linear

bench-serving: build ## Measure the server through HTTP (models: make bench-serving ARGS="demo 135m 1b")
	$(CARGO) bench --profile release --locked --workspace --bench serving -- $(ARGS)

toolchain:
	@command -v $(CARGO) >/dev/null || { \
	  echo "cargo is not installed. Get it with rustup (https://rustup.rs); rust-toolchain.toml then chooses the version." >&2; \
	  exit 1; }

# The Python clients that the integration tests drive the server with.
$(VENV)/installed: integration-tests/clients/requirements.txt
	@command -v $(PYTHON) >/dev/null \
	  || { echo "$(PYTHON) is not installed: the client tests need Python 3.10 or newer (PYTHON=... names another)." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is older than 3.10: name a newer one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian: apt install python3-venv)." >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@
