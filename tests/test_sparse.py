"""Every backend x tail x divergence x form x dtype x option of sparse targets against the fp64 oracle."""

import pytest
import torch
from conftest import DIVERGENCES
from problems import assert_exact, relative
from sparse_problems import FORWARD_ONLY, TAILS, SparseProblem

import kdkernels as kd

pytestmark = pytest.mark.filterwarnings("ignore:temperature=")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEFINED = [(t, d) for t in TAILS for d in DIVERGENCES if t not in FORWARD_ONLY or d == kd.ForwardKL()]


def conforms(problem, backend, **options):
    value, grads = problem.run(backend, **options)
    options.pop("chunk_bytes", None)
    true_value, true_grads = problem.oracle(**options)
    assert torch.allclose(value.double(), true_value, rtol=1e-5, atol=2e-6)
    for mine, truth in zip(grads, true_grads):
        assert mine.shape == truth.shape and truth.norm() > 1e-6
        assert relative(mine, truth) < 4e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("tail,divergence", DEFINED, ids=str)
def test_divergences(backend, tail, divergence, form, dtype):
    problem = SparseProblem(student=form, tail=tail, dtype=dtype)
    for hard_weight in (0.0, 0.5):
        options = dict(divergence=divergence, temperature=1.5, hard_weight=hard_weight)
        assert_exact(problem.run(backend, **options), problem.oracle(**options),
                     problem.plain(**options), dtype=dtype, projected=form == "head")  # fmt: skip
