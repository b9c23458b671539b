"""Rows in the registers of a cluster of eight, on the CUDA kernels' host; run by tests/test_cuda.py."""

import pytest
import torch
from problems import Problem, assert_exact

import kdkernels as kd


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [38_411, 80_003])
@pytest.mark.parametrize(
    "options",
    [
        dict(divergence=kd.ForwardKL(), hard_weight=0.5, z_loss=0.01),
        dict(divergence=kd.ReverseKL(), temperature=2.0),
        dict(divergence=kd.JSD(0.3)),
        dict(divergence=kd.SkewKL(0.1)),
    ],
    ids=str,
)
def test_wide_rows(dtype, vocab, options):
    problem = Problem(vocab=vocab, shape=(5,), dtype=dtype)
    assert_exact(
        problem.run("native", **options), problem.oracle(**options), problem.plain(**options), dtype=dtype
    )


@pytest.mark.parametrize("loss", [kd.distillation_loss, kd.cross_entropy])
def test_a_weight_of_0_times_nan_is_0(loss):
    """In the common case: a label and z-loss, but no statistics."""
    student, labels = torch.randn(3, 5001), torch.tensor([1, 2, 3])
    student[1, 7], student[2] = torch.nan, -torch.inf
    leaf = student.requires_grad_()
    teacher = () if loss is kd.cross_entropy else (torch.randn(3, 5001),)
    options = {} if loss is kd.cross_entropy else {"hard_weight": 0.5}
    weights = torch.tensor([1.0, 0.0, 0.0])
    value = loss(leaf, *teacher, labels, z_loss=0.1, token_weights=weights, reduction="sum", **options)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert gradient[0].abs().sum() > 0 and not gradient[1:].any()
