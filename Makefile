# `make test` on a fresh machine with Python 3.10 to 3.13 does everything that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# torch's version is pinned and installed first, so that nothing picks another build of it.
TORCH ?= torch==2.13.0
TRITON ?= triton>=3.7.1

.PHONY: setup test lint bench demo clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" numpy "setuptools>=70" ninja
	$(BIN)/pip install -q --no-build-isolation -e ".[dev,integrations]"
	# Without their dependencies: their losses run on a CPU as they are, triton and torchao do not.
	$(BIN)/pip install -q --no-deps liger-kernel==0.8.5 torchtune==0.6.1
	touch $@

test: setup lint
	$(BIN)/python -m kdkernels info
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.core

# The demonstration trainer is not written yet; until it is, the demo is a distillation in numbers.
demo: setup
	$(BIN)/python -m benchmarks.core --small

clean:
	rm -rf build *.egg-info kdkernels/_C*.so $(VENV)
