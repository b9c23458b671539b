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
	$(BIN)/pip install -q --no-build-isolation -e ".[dev,trainer,cache]"
	touch $@

test: setup lint
	$(BIN)/python -m kdkernels info
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.core

# A teacher and four students from scratch, about 8 minutes on two cores with the setup. A second run reuses
# what is in runs/demo; a run that was stopped goes on.
demo: setup
	$(BIN)/python -m kdkernels train compare --config kdkernels/trainer/demo.yaml --output_dir runs/demo

clean:
	rm -rf build *.egg-info kdkernels/_C*.so $(VENV)
