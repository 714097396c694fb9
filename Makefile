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

VENV := target/clients-venv

.PHONY: help run build test lint format ci bench toolchain

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

run: toolchain ## Build and serve (flags: make run ARGS="--port 8080")
	$(CARGO) run $(CARGO_FLAGS) --package lamplighter -- $(ARGS)

build: toolchain ## Build the executable: target/release/lamplighter
	$(CARGO) build $(CARGO_FLAGS) --package lamplighter

test: toolchain $(VENV)/installed ## Run all tests, those through the real executable and its clients too
	$(CARGO) build $(CARGO_FLAGS) --package lamplighter
	$(CARGO) test $(CARGO_FLAGS) --workspace --no-fail-fast

lint: toolchain ## Check format and lints; warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(CARGO_FLAGS) --workspace --all-targets -- --deny warnings

format: toolchain ## Format all Rust code
	$(CARGO) fmt --all

ci: lint test ## What continuous integration runs

bench: toolchain ## Measure the kernels against the machine's limits
	$(CARGO) bench --locked --package kernels

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
