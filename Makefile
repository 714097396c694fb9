# Everything one runs here. `make help` lists it.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CARGO ?= cargo
RUSTC ?= rustc
PYTHON ?= python3
# One profile for running, testing, linting and benchmarking, so that everything is compiled once.
CARGO_FLAGS := --release --locked
# Flags of `lamplighter`, as in: make run ARGS="--model-id /models/x --port 8080"
ARGS ?=

TARGET := $(or $(CARGO_TARGET_DIR),target)
EXECUTABLE := $(TARGET)/release/lamplighter
VENV := target/clients-venv

# What the kernels are tested with for 64-bit Arm on another machine: the C library that qemu loads, as Debian lays it.
AARCH64 := aarch64-unknown-linux-gnu
AARCH64_ROOT ?= /usr/aarch64-linux-gnu

.PHONY: help run build test test-aarch64 cuda-toolkit build-cuda check-cuda cuda-on-cpu test-cuda lint format ci bench bench-peers bench-kernels bench-serving bench-shard bench-grammar bench-scheduler test-tiles check-asan check-memory fuzz test-gpu-check gpu-check soak toolchain

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 16

run: build ## Build and serve (flags: make run ARGS="--port 8080")
	@exec $(EXECUTABLE) $(ARGS)

# With --workspace, here and below: cargo chooses the features of dependencies by the packages that it is told to build,
# and compiles again what had others.
build: toolchain ## Build the executable: target/release/lamplighter
	$(CARGO) build $(CARGO_FLAGS) --workspace --bins

cuda-toolkit: ## Install nvcc, for `make build-cuda` where CUDA is not installed: target/cuda-toolkit (270 MB)
	PYTHON=$(PYTHON) kernels/cuda/toolkit/setup.sh target/cuda-toolkit

# The same executable with code for GPUs in it; it needs neither CUDA nor a GPU to start.
build-cuda: toolchain ## Build the executable with CUDA (nvcc: of NVCC, CUDA_HOME, PATH, or `make cuda-toolkit`)
	@begin=$$(date +%s); $(CARGO) build $(CARGO_FLAGS) --workspace --bins --features cuda; \
	  echo "built $(EXECUTABLE) with CUDA in $$(($$(date +%s) - begin)) s"

test: build $(VENV)/installed ## Run all tests, those through the real executable and its clients too
	$(CARGO) test $(CARGO_FLAGS) --workspace --no-fail-fast

# Without the test that starts itself again: the system cannot run programs for another machine by itself.
test-aarch64: toolchain ## Test the kernels for 64-bit Arm on another machine, under qemu (minutes)
	@test -d "$$($(RUSTC) --print target-libdir --target $(AARCH64))" \
	  || { echo "Rust's library for 64-bit Arm is not installed: rustup target add $(AARCH64)" >&2; exit 1; }
	@command -v aarch64-linux-gnu-gcc >/dev/null \
	  || { echo "aarch64-linux-gnu-gcc, which links for 64-bit Arm, is not installed (Debian: apt install gcc-aarch64-linux-gnu)." >&2; exit 1; }
	@command -v qemu-aarch64 >/dev/null \
	  || { echo "qemu-aarch64, which runs programs for 64-bit Arm, is not installed (Debian: apt install qemu-user)." >&2; exit 1; }
	@test -e $(AARCH64_ROOT)/lib/ld-linux-aarch64.so.1 \
	  || { echo "$(AARCH64_ROOT) has no C library for 64-bit Arm: install it (Debian: apt install libc6-arm64-cross), or name another root with AARCH64_ROOT=..." >&2; exit 1; }
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L $(AARCH64_ROOT)" \
	  $(CARGO) test $(CARGO_FLAGS) --target $(AARCH64) --package kernels --no-fail-fast -- \
	  --skip processes_sum_and_a_killed_one_is_an_error_for_the_others

# CUDA's driver and libraries for machines without a GPU, with our kernels compiled for the CPU (kernels/cuda-on-cpu). Tests
# that are to use them get this folder as LD_LIBRARY_PATH.
CUDA_ON_CPU := $(abspath target/cuda-on-cpu)

cuda-on-cpu: ## Build the CUDA libraries that run kernels on the CPU, for tests: target/cuda-on-cpu
	@command -v $(or $(CXX),g++) >/dev/null || { echo "g++ is not installed: the CUDA libraries for tests need it." >&2; exit 1; }
	@$(MAKE) --no-print-directory --silent -j "$$(nproc)" -C kernels/cuda-on-cpu OUT=$(CUDA_ON_CPU)

# Where the code for GPUs is not wanted.
NVCC_STAND_IN := $(abspath kernels/cuda/toolkit/nvcc-stand-in.sh)

check-cuda: toolchain ## Check and lint what is built with CUDA; needs neither nvcc nor a GPU
	NVCC=$(NVCC_STAND_IN) $(CARGO) clippy $(CARGO_FLAGS) --workspace --all-targets --features cuda -- --deny warnings

# The executable is built for those that drive it, and without code for GPUs: `make build-cuda` builds it again.
test-cuda: toolchain cuda-on-cpu ## Test the CUDA half without a GPU: kernels compiled for the CPU, behind CUDA's own interface
	@$(MAKE) --no-print-directory --silent -C kernels/cuda-on-cpu OUT=$(CUDA_ON_CPU) test
	NVCC=$(NVCC_STAND_IN) $(CARGO) build $(CARGO_FLAGS) --workspace --bins --features cuda
	NVCC=$(NVCC_STAND_IN) LD_LIBRARY_PATH=$(CUDA_ON_CPU) CUDA_ON_CPU_DEVICES=2 \
	  $(CARGO) test $(CARGO_FLAGS) --workspace --features cuda --test 'cuda_*' --no-fail-fast
	@echo "Again, with threads in the reverse order and streams that run only when somebody waits:"
	NVCC=$(NVCC_STAND_IN) LD_LIBRARY_PATH=$(CUDA_ON_CPU) CUDA_ON_CPU_DEVICES=2 CUDA_ON_CPU_ORDER=reverse CUDA_ON_CPU_LAZY=1 \
	  $(CARGO) test $(CARGO_FLAGS) --workspace --features cuda --test 'cuda_*' --no-fail-fast

lint: toolchain ## Check format and lints; warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(CARGO_FLAGS) --workspace --all-targets -- --deny warnings

format: toolchain ## Format all Rust code
	$(CARGO) fmt --all

ci: lint check-cuda test test-cuda test-gpu-check ## What continuous integration runs

bench: toolchain ## Measure models against the machine's limits and other programs (a part: make bench ARGS="135m bf16 decode")
	$(CARGO) bench --profile release --locked --workspace --bench models -- $(ARGS)

bench-peers: ## Install the other programs that `make bench` measures: llama.cpp and transformers
	integration-tests/reference/setup_llama_cpp.sh
	integration-tests/reference/setup.sh

bench-kernels: toolchain ## Measure matrix products and attention against the machine's limits (threads: make bench-kernels ARGS=1)
	$(CARGO) bench --profile release --locked --workspace --bench linear --bench attention -- $(ARGS)

bench-serving: build ## Measure the server through HTTP (models: make bench-serving ARGS="demo 135m 0.5b 1b")
	$(CARGO) bench --profile release --locked --workspace --bench serving -- $(ARGS)

bench-shard: build ## Measure one shard without router and HTTP (make bench-shard ARGS="135m decode=1,8 context=256")
	$(CARGO) bench --profile release --locked --workspace --bench shard -- $(ARGS)

bench-grammar: build ## Measure the server with and without grammars, and their masks
	$(CARGO) bench --profile release --locked --workspace --bench grammar

bench-scheduler: toolchain ## Measure the scheduler in virtual time, and the router alone (parts: ARGS="simulation queue router")
	$(CARGO) bench --profile release --locked --workspace --bench scheduler -- $(ARGS)

# Where a CPU has AVX-512 with products of bf16 but no tiles; a build of its own, since kernels are compiled for it.
test-tiles: toolchain ## Test what multiplies tiles (Intel AMX) where the CPU has none: with the instructions in plain Rust
	LAMPLIGHTER_EMULATED_TILES=1 CARGO_TARGET_DIR=$(TARGET)/emulated-tiles \
	  $(CARGO) test $(CARGO_FLAGS) --package kernels --no-fail-fast \
	  --test shapes --test linear --test attention --test guard_pages --test lora

# What watches memory is compiled into a build of its own (minutes, once). The stable compiler has it, but lets only its own
# project switch it on (RUSTC_BOOTSTRAP); it needs no other tool. With debug assertions and overflow checks in the kernels.
SANITIZED := x86_64-unknown-linux-gnu
SANITIZED_TARGET := $(TARGET)/sanitized
SANITIZER := -Zsanitizer=address
SANITIZED_KERNELS := --config profile.release.debug=0 --config profile.release.package.kernels.debug-assertions=true \
  --config profile.release.package.kernels.overflow-checks=true

# Without the search for leaks: the test that kills a process leaves what that one had. FUZZ_CASES=n sets how many shapes.
check-asan: toolchain ## Run the kernels' tests under AddressSanitizer, for all of this CPU's instruction sets (x86-64 Linux)
	@test "$$($(RUSTC) --print host-tuple)" = $(SANITIZED) || { echo "check-asan runs on $(SANITIZED) only." >&2; exit 1; }
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="$(SANITIZER)" CARGO_TARGET_DIR=$(SANITIZED_TARGET) ASAN_OPTIONS=detect_leaks=0 \
	  $(CARGO) test $(CARGO_FLAGS) $(SANITIZED_KERNELS) --target $(SANITIZED) --package kernels --no-fail-fast --lib \
	  --test shapes --test linear --test attention --test guard_pages --test lora --test moe --test logits --test rowwise --test collective

# The kernels with libFuzzer's counters; what they depend on is that of `check-asan`. A failing case is written to
# $(FUZZ)/failures; given to the executable as its argument, it runs alone.
FUZZ := $(SANITIZED_TARGET)/fuzz

fuzz: toolchain ## Search for shapes that kernels compute wrongly, so many seconds (make fuzz ARGS=60; x86-64 Linux)
	@test "$$($(RUSTC) --print host-tuple)" = $(SANITIZED) || { echo "fuzz runs on $(SANITIZED) only." >&2; exit 1; }
	@command -v $(or $(CXX),c++) >/dev/null || { echo "a C++ compiler is not installed: libFuzzer needs it." >&2; exit 1; }
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="$(SANITIZER)" CARGO_TARGET_DIR=$(SANITIZED_TARGET) \
	  RUSTC_WRAPPER=$(abspath kernels/fuzz/rustc.sh) \
	  $(CARGO) build $(CARGO_FLAGS) --target $(SANITIZED) --manifest-path kernels/fuzz/Cargo.toml
	@mkdir -p $(FUZZ)/corpus $(FUZZ)/failures
	ASAN_OPTIONS=detect_leaks=0 $(SANITIZED_TARGET)/$(SANITIZED)/release/shapes $(FUZZ)/corpus \
	  -max_total_time=$(or $(ARGS),60) -max_len=256 -len_control=0 -artifact_prefix=$(FUZZ)/failures/

# Valgrind knows AVX2 but not AVX-512, so that is what the kernels choose. Slow: a case of each operation, and the pool.
check-memory: toolchain ## Run the kernels' tests of arbitrary shapes under valgrind
	@command -v valgrind >/dev/null || { echo "valgrind is not installed (Debian: apt install valgrind)." >&2; exit 1; }
	$(CARGO) test $(CARGO_FLAGS) --workspace --test shapes --no-run
	FUZZ_CASES=3 CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind --quiet --error-exitcode=1" \
	  $(CARGO) test $(CARGO_FLAGS) --workspace --test shapes

# Packs without code for GPUs and runs, by the emulated driver, what `gpu-check` would run on a GPU.
test-gpu-check: toolchain cuda-on-cpu ## Test that what `gpu-check` packs can be carried and runs, without a GPU
	$(PYTHON) -B integration-tests/gpu-check/summary_test.py
	NVCC=$(NVCC_STAND_IN) integration-tests/gpu-check/pack.sh
	rm -rf $(TARGET)/gpu-check/carried && mkdir $(TARGET)/gpu-check/carried
	tar -C $(TARGET)/gpu-check/carried -xf $(TARGET)/gpu-check/gpu-check.tar.xz
	CUDA_ON_CPU=$(CUDA_ON_CPU) CUDA_ON_CPU_DEVICES=2 CUDA_ON_CPU_MEMORY_BYTES=300000000 \
	  $(TARGET)/gpu-check/carried/gpu-check/run.sh --dry-run --results $(TARGET)/gpu-check/results

gpu-check: toolchain ## Pack what checks and measures the CUDA half on a machine with a GPU (below 64 MB; docs/how-to/check-on-a-gpu.md)
	integration-tests/gpu-check/pack.sh

soak: build ## Random load with random disconnects for some minutes: memory, blocks, ends (make soak ARGS="10")
	$(CARGO) bench --profile release --locked --workspace --bench soak -- $(ARGS)

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
