"""Logits that are scaled and capped by the pass that reads them, on every backend."""

import pytest
import torch
from problems import Problem, relative

import kdkernels as kd
from kdkernels.heads import MappedLogits

MAP = dict(logit_scale=0.4, softcap=3.0)


def plain(logits):
    return MAP["softcap"] * torch.tanh(MAP["logit_scale"] * logits / MAP["softcap"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_bytes", [None, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_formula(backend, dtype, chunk_bytes, reduction):
    problem = Problem(dtype=dtype)
    options = dict(
        hard_weight=0.5,
        label_smoothing=0.1,
        z_loss=1e-3,
        temperature=1.5,
        divergence=kd.JSD(0.3),
        reduction=reduction,
    )

    def loss(wrap, double, **more):
        return problem.of(
            lambda s, t, y: kd.distillation_loss(wrap(s), wrap(t), y, **options, **more), double=double
        )

    with kd.use_backend("reference"):
        value, (gradient,) = loss(plain, True)
        by_itself, (own,) = loss(lambda z: MappedLogits(z, **MAP), True)
    torch.testing.assert_close(by_itself, value, rtol=1e-12, atol=0)
    assert relative(own, gradient) < 1e-12
    ours, (mine,) = loss(lambda z: MappedLogits(z, **MAP), False, chunk_bytes=chunk_bytes)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert relative(ours, value) < 2e-6 and gradient.norm() > 1e-3 and relative(mine, gradient) < rounding


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "conditional", "truncate"])
def test_sparse_targets(backend, tail):
    problem = Problem()
    target = kd.top_k_target(problem.teacher[0], 5, tail=tail)
    with kd.use_backend("reference"):
        value, (gradient,) = problem.of(lambda s, t, y: kd.kl_div(plain(s), target, y), double=True)
    ours, (mine,) = problem.of(lambda s, t, y: kd.kl_div(MappedLogits(s, **MAP), target, y))
    assert relative(ours, value) < 1e-5 and gradient.norm() > 1e-3 and relative(mine, gradient) < 1e-5


def test_in_place(backend):
    problem = Problem()
    options = dict(hard_weight=0.5)
    whole = problem.of(lambda s, t, y: kd.distillation_loss(MappedLogits(s, **MAP), t, y, **options))
    over = problem.of(
        lambda s, t, y: kd.distillation_loss(MappedLogits(s * 1, **MAP), t, y, inplace=True, **options)
    )
    assert torch.equal(whole[0], over[0]) and torch.equal(whole[1][0], over[1][0])


def test_refusals():
    with pytest.raises(ValueError, match=r"MappedLogits needs \|logit_scale\| in \[1e-30, 1e\+30\], got 0"):
        MappedLogits(torch.randn(2, 3), logit_scale=0)
    with pytest.raises(
        ValueError, match=r"MappedLogits needs softcap in \[1e-30, 1e\+30\] or None, got softcap=-1.0"
    ):
        MappedLogits(torch.randn(2, 3), softcap=-1.0)
