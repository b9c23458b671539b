"""Shared by all tests: seeds, the backends that are usable here, the divergences."""

import pytest
import torch

import kdkernels as kd
from kdkernels.verify import DIVERGENCES

BACKENDS = [name for name, problem in kd.backends().items() if problem is None and name != "reference"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kd.use_backend(request.param):
        yield request.param


@pytest.fixture(params=DIVERGENCES, ids=str)
def divergence(request):
    return request.param
