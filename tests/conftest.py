"""Shared by the tests here: each usable backend, each divergence."""

from pathlib import Path

import pytest
import torch
from problems import BACKENDS

import kdkernels as kd
from kdkernels.backends import native
from kdkernels.commands.verify import DIVERGENCES
from kdkernels.core import autograd


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the conformance suite's tensors are, e.g. cuda")
    parser.addoption(
        "--chip", help="let native be the CUDA kernels, built for the host, on such a chip (cuda_host)"
    )
    parser.addoption("--cuda-host", type=Path, help="their library, where it is built already")


@pytest.fixture(autouse=True)
def device(request):
    """With --device, tensors that a test makes are made there."""
    where = request.config.getoption("--device")
    if where == "cpu":
        yield where
    else:
        with torch.device(where):
            yield where


@pytest.fixture(scope="session", autouse=True)
def cuda_on_the_host(request):
    if chip := request.config.getoption("--chip"):
        import cuda_host

        native._ops = cuda_host.load(request.config.getoption("--cuda-host") or cuda_host.build())
        cuda_host.set_chip(chip)
        # What a kernel leaves unwritten shows.
        new_gradient = autograd._new_gradient

        def poisoned(logits, vocab):
            grad = new_gradient(logits, vocab)
            grad[..., :vocab] = torch.nan
            return grad

        autograd._new_gradient = poisoned


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kd.use_backend(request.param):
        yield request.param


@pytest.fixture(params=DIVERGENCES, ids=str)
def divergence(request):
    return request.param
