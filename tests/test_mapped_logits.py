"""Logits that are scaled and capped by the pass that reads them, on every backend."""

import math

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


MAPS = [dict(softcap=30.0), dict(logit_scale=0.9), dict(logit_scale=0.9, softcap=30.0)]


@pytest.mark.parametrize("of", MAPS, ids=str)
def test_what_a_confident_label_leaves_of_1(backend, of):
    """The label's logit is mapped to the bit as those of the normaliser are: neither loss nor gradient changes its sign."""
    logits, label = torch.tensor([[22.3, 1.0, 0.0, 2.0]]), torch.tensor([0])

    def run(backend, dtype):
        leaf = logits.to(dtype).requires_grad_()
        with kd.use_backend(backend):
            loss = kd.cross_entropy(MappedLogits(leaf, **of), label)
        return loss.item(), torch.autograd.grad(loss, leaf)[0].double()

    (loss, gradient), (truth, true_gradient) = run(backend, torch.float32), run("reference", torch.float64)
    assert loss == pytest.approx(truth, rel=1e-4) and truth < 1e-6
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("far", [-1e4, -1e9, -1e30])
def test_a_row_that_is_masked_whole_is_uniform(backend, far):
    logits = torch.full((1, 5), far, requires_grad=True)
    mapped = MappedLogits(logits, logit_scale=0.9)
    loss = kd.cross_entropy(mapped, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.18, -0.72, 0.18, 0.18, 0.18], rel=1e-5)
    p, rest = torch.tensor([0.5, 0.2]), 0.3  # beside 0.2 for each id, and 0.6 for the rest
    bucket = (p * (p / 0.2).log()).sum() + rest * math.log(rest / 0.6)
    renormalize = (p / 0.7 * (p / 0.7 / 0.2).log()).sum()
    for tail, truth in (("bucket", bucket), ("renormalize", renormalize)):
        target = kd.SparseTarget(torch.tensor([[1, 3]]), weights=torch.tensor([[0.5, 0.2]]), tail=tail)
        assert kd.kl_div(mapped, target).item() == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.parametrize("of", MAPS, ids=str)
def test_equal_logits_are_equal_when_they_are_mapped(backend, of):
    """Ids 1 and 3 are tied at the top, and the first is the student's choice, whichever of them is stored."""
    logits = torch.randn(200, 6)
    logits[:, 1] = logits[:, 3] = logits.amax(1) + 1
    for id, agreement in ((1, 1.0), (3, 0.0)):
        target = kd.SparseTarget(torch.full((200, 1), id), torch.full((200, 1), -0.1))
        _, stats = kd.kl_div(MappedLogits(logits, **of), target, return_stats=True)
        assert stats.agreement.item() == agreement


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
