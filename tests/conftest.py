"""Shared by the tests here: each usable backend, each divergence."""

import sys
from pathlib import Path

import pytest
import torch
from problems import BACKENDS

import kdkernels as kd
from kdkernels.backends import native
from kdkernels.commands.verify.scenario import DIVERGENCES

#: Not searched for examples, which would import them: what serves processes of their own changes Triton, for one.
collect_ignore = ["isolated", "support"]


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the conformance suite's tensors are, e.g. cuda")
    parser.addoption("--every", type=int, default=1, help="run one test of so many: a sample")
    parser.addoption(
        "--chip", help="let native be the CUDA kernels, built for the host, on such a chip (cuda_host)"
    )
    parser.addoption("--cuda-host", type=Path, help="their library, where it is built already")


#: Files that start long processes; one of them at the very end would leave the other cores idle.
LONGEST = (
    "test_triton.py",
    "test_trainer_processes.py",
    "test_cuda.py",
    "test_csrc.py",
    "test_benchmarks.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    every = config.getoption("--every")
    if every > 1:
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % every])
        items[:] = items[::every]


@pytest.fixture(autouse=True)
def device(request):
    """With --device, tensors that a test makes are made there."""
    where = request.config.getoption("--device")
    if where == "cpu":
        yield where
    else:
        with torch.device(where):
            yield where


@pytest.fixture(autouse=True)
def no_deepspeed_left():
    """transformers keeps the last DeepSpeed configuration for as long as anybody has it, garbage too."""
    yield
    if module := sys.modules.get("transformers.integrations.deepspeed"):
        module.unset_hf_deepspeed_config()


@pytest.fixture(scope="session", autouse=True)
def cuda_on_the_host(request):
    if chip := request.config.getoption("--chip"):
        import cuda_host

        native._ops = cuda_host.load(request.config.getoption("--cuda-host") or cuda_host.build())
        cuda_host.set_chip(chip)


@pytest.fixture(scope="session", autouse=True)
def new_memory_is_nan(request):
    """So that what nobody writes shows. On a GPU torch would refuse operators that it cannot repeat to the bit."""
    if request.config.getoption("--device") == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kd.use_backend(request.param):
        yield request.param


@pytest.fixture(params=DIVERGENCES, ids=str)
def divergence(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    """A BPE tokenizer of 300 tokens."""
    from trainer_runs import ROOT

    from kdkernels.trainer import models

    return models.train_tokenizer((path.read_text() for path in sorted(ROOT.glob("kdkernels/*.py"))), 300)


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tokenizer):
    """A folder with a micro model and its tokenizer."""
    from kdkernels.trainer import models

    folder = tmp_path_factory.mktemp("saved")
    models.load_model("micro", tokenizer, dtype="float32", seed=5, max_length=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
