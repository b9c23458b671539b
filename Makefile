# `make test` on a fresh machine with Python 3.10 to 3.13 does everything that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# torch's version is pinned and installed first, so that nothing picks another build of it.
TORCH ?= torch==2.13.0
# The CPU build of torch brings no Triton. Before 3.7.1 its interpreter does not know numpy 2.4.
TRITON ?= triton>=3.7.1

.PHONY: setup test test-all lint bench figures demo clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" numpy "setuptools>=77" ninja
	$(BIN)/pip install -q --no-build-isolation -e ".[dev,trainer,cache]" $(if $(filter Linux,$(shell uname)),"$(TRITON)")
	touch $@

# Two processes on two cores: a thread that waits must not keep a core from the other's.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test: setup $(VENV)/.peers lint
	$(BIN)/python -m kdkernels info
	$(PYTEST)

# The same and the slow ones.
test-all: setup $(VENV)/.peers lint
	$(PYTEST) -m "slow or not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# The libraries that are measured beside ours, and the plots.
$(VENV)/.peers: $(VENV)/.ready
	$(BIN)/pip install -q "$(TORCH)" "kdkernels[bench,integrations]"
	# Only their loss modules are loaded, file by file: these need none of the packages' dependencies.
	$(BIN)/pip install -q --no-deps torchtune==0.6.1 axolotl==0.19.0 nvidia-modelopt==0.47.0
	# What the trainer's tests run it with: reports, and shards. DeepSpeed looks for torch when it is installed.
	$(BIN)/pip install -q tensorboard wandb
	$(BIN)/pip install -q --no-build-isolation "$(TORCH)" deepspeed==0.19.8
	touch $@

bench: $(VENV)/.peers
	$(BIN)/python -m benchmarks --suite cpu

# RESULT=runs/.../result.json makes that result the committed one; without it the figures are drawn again.
figures: $(VENV)/.peers
	$(BIN)/python -m benchmarks publish $(RESULT)

# A teacher and four students from scratch, about 8 minutes on two cores with the setup. A second run reuses
# what is in runs/demo; a run that was stopped goes on.
demo: setup
	$(BIN)/python -m kdkernels train compare --config kdkernels/trainer/demo.yaml --output_dir runs/demo

clean:
	rm -rf build *.egg-info kdkernels/_C*.so $(VENV)
