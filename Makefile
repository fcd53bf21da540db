# Every target works from nothing: it makes .venv, installs what it needs there and builds the extension.
#
#   PYTHON=python3.12 make test      another interpreter for the environment
#   TORCH=torch==2.12.0 make lint    another torch; the tests of Triton want the version pinned with this one
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml

.PHONY: help demo test ladder lint bench gpu clean
help:
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 10

demo: $(VENV)/.demo ## train a network on real digits, prune it, give it to Auto, compare with eager and torch.compile
	$(BIN)/python -m pyops demo

test: $(VENV)/.dev ## all tests on the CPU, with the compiled kernels and again on the PyTorch reference
	$(BIN)/python -m pytest tests --ignore=tests/gpuless
	PYOPS_BACKEND=ref $(BIN)/python -m pytest tests --ignore=tests/gpuless --ignore=tests/test_packaging.py

ladder: $(VENV)/.dev ## what can be shown of the GPU kernels without a GPU
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup tests/gpuless

lint: $(VENV)/.dev ## ruff, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/*.inc

bench: $(VENV)/.bench ## every op against its peers on this machine; writes bench/results
	$(BIN)/python -m pyops bench int8_linear int8_weight_linear int4_linear optim sparse_conv2d sparse_backward sparse_designs sparse_resnet50

# A GPU machine brings its own torch, which a fresh environment would hide: build in place with what is there.
gpu: ## build, test and benchmark on a machine with a GPU; installs nothing
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest tests/gpu
	$(PYTHON) -m pyops bench int8_linear int8_weight_linear int4_linear fp8_linear optim sparse_conv2d sparse_resnet50 --device cuda

clean: ## remove what the targets made
	rm -rf $(VENV) build dist *.egg-info pyops/_C*.so demo_output .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=23"
	$(PIP) "$(TORCH)"
	$(PIP) "setuptools>=77,<82" wheel "pybind11>=2.13" "ninja>=1.11" numpy
	@touch $@

# Editable, so that the tests run the checkout; --no-build-isolation, so that the build sees the torch that runs.
$(VENV)/.dev $(VENV)/.demo $(VENV)/.bench: $(VENV)/.%: $(VENV)/.torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation -e ".[$*]"
	@touch $@
