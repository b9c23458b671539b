"""Shared by all tests: seeds, the backends that are usable here, the divergences."""

import pytest
import torch

import kdkernels as kd

DIVERGENCES = [
    kd.ForwardKL(),
    kd.ReverseKL(),
    kd.JSD(0.5),
    kd.JSD(0.1),
    kd.SkewKL(0.1),
    kd.SkewReverseKL(0.1),
    kd.SkewReverseKL(0.3, detach_mixture=True),
    kd.TotalVariation(),
    kd.AlphaBeta(0.2, 0.7),
    kd.AlphaBeta(0.5, 0.0),
    kd.AlphaBeta(0.0, 0.5),
    kd.AlphaBeta(0.5, -0.5),
    kd.AlphaBeta(0.0, 0.0),
    kd.Mixed(0.4),
]
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
