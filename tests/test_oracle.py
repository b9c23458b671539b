"""The oracle against hand-computed values, F.kl_div, F.cross_entropy and fp64 gradcheck."""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import Problem, relative

import kdkernels as kd

P, Q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
LN2 = math.log(2)
M = 0.375  # the midpoint of 0.5 and 0.25
HAND = [
    (kd.ForwardKL(), 0.25 * LN2),
    (kd.ReverseKL(), 0.25 * LN2),
    (kd.JSD(0.5), 0.5 * math.log(0.5 / M) + 0.25 * math.log(0.25 / M)),
    (kd.TotalVariation(), 0.25),
    (kd.Overlap(), 0.75),
    (kd.Mixed(0.3), 0.25 * LN2),
    (kd.SkewKL(0.5), 0.5 * math.log(0.5 / M) + 0.25 * math.log(0.25 / M)),
    (kd.SkewReverseKL(0.5), 0.5 * math.log(0.5 / M) + 0.25 * math.log(0.25 / M)),
    # alpha = beta = 1: half the squared distance
    (kd.AlphaBeta(1.0, 1.0), 0.5 * 2 * 0.25**2),
    # alpha = beta = 0: half the squared distance of the logarithms
    (kd.AlphaBeta(0.0, 0.0), LN2**2),
]


@pytest.mark.parametrize("divergence,expected", HAND, ids=str)
def test_hand_computed(divergence, expected):
    s, t = torch.tensor([Q]).double().log(), torch.tensor([P]).double().log()
    for backend in ("reference", "eager"):
        with kd.use_backend(backend):
            got = kd.distillation_loss(s, t, divergence=divergence).item()
        assert got == pytest.approx(expected, rel=1e-12)


def test_gradcheck(divergence):
    t = torch.randn(3, 7, dtype=torch.float64)
    y = torch.tensor([1, -100, 2])
    s = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    if getattr(divergence, "detach_mixture", False):
        pytest.skip("its gradient is not that of its value, by definition")
    for backend in ("reference", "eager"):
        with kd.use_backend(backend):
            assert torch.autograd.gradcheck(
                lambda x: kd.distillation_loss(
                    x,
                    t,
                    y,
                    divergence=divergence,
                    temperature=1.3,
                    hard_weight=0.4,
                    z_loss=0.1,
                    label_smoothing=0.1,
                ),
                s,
            )


def test_detached_mixture_gradient():
    """Equal to autograd's with the mixture written out as a constant."""
    a = 0.3
    t = torch.randn(4, 9, dtype=torch.float64)
    s = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    q, p = s.softmax(-1), t.softmax(-1)
    m = (1 - a) * p + a * q.detach()
    (expected,) = torch.autograd.grad((q * (q.log() - m.log())).sum(-1).mean(), s)
    for backend in ("reference", "eager"):
        with kd.use_backend(backend):
            loss = kd.distillation_loss(s, t, divergence=kd.SkewReverseKL(a, detach_mixture=True))
        (got,) = torch.autograd.grad(loss, s)
        assert torch.allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
def test_is_f_kl_div(reduction):
    s, t = torch.randn(4, 6, 11).double(), torch.randn(4, 6, 11).double()
    theirs = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction=reduction)
    assert torch.isclose(kd.kl_div(s, t, reduction=reduction), theirs)


def test_is_f_cross_entropy():
    s, y = torch.randn(8, 11).double(), torch.randint(0, 11, (8,))
    y[3] = -100
    for smoothing in (0.0, 0.2):
        ours = kd.cross_entropy(s, y, label_smoothing=smoothing)
        assert torch.isclose(ours, F.cross_entropy(s, y, label_smoothing=smoothing))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_limits_meet(name):
    """JSD and alpha-beta at their ends are the KLs, and nearly so near them."""
    with kd.use_backend(name):
        limits_meet()


def limits_meet():
    s, t = torch.randn(4, 30).double(), torch.randn(4, 30).double()
    kl, reverse = (kd.distillation_loss(s, t, divergence=d) for d in (kd.ForwardKL(), kd.ReverseKL()))
    for divergence, expected in [
        (kd.JSD(0.0), kl),
        (kd.JSD(1.0), reverse),
        (kd.AlphaBeta(1.0, 0.0), kl),
        (kd.AlphaBeta(0.0, 1.0), reverse),
    ]:
        assert torch.isclose(kd.distillation_loss(s, t, divergence=divergence), expected)
    near = kd.distillation_loss(s, t, divergence=kd.AlphaBeta(1.0, 1e-6))
    assert torch.isclose(near, kl, rtol=1e-4)


@pytest.mark.parametrize("divergence", [kd.AlphaBeta(0.5, -0.5), kd.AlphaBeta(0.0, 0.0)], ids=str)
def test_a_masked_token_of_a_padded_head_has_no_gradient(divergence):
    """Its logits are taken for 0, on both sides: where the lm_head's bias is -inf too."""
    problem = Problem(student="head", rows="padding", dtype=torch.float64)
    value, grads = problem.oracle(divergence=divergence)
    eager_value, eager_grads = problem.run("eager", divergence=divergence)
    assert torch.isclose(value, eager_value, rtol=1e-12)
    for grad, eager_grad in zip(grads, eager_grads):
        assert grad.isfinite().all() and grad.norm() > 1 and relative(grad, eager_grad) < 1e-12


@pytest.mark.parametrize("name", ["reference", "eager", "native"])
def test_what_is_beyond_the_vocabulary_may_be_anything(name):
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(12, 6)
    weight[10:] = torch.nan
    head, labels = kd.LinearHead(hidden, weight.requires_grad_(), softcap=5.0), torch.tensor([1, 2, 3, 9])
    with kd.use_backend(name):
        loss = kd.cross_entropy(head, labels, vocab_size=10)
        loss = loss + kd.token_log_probs(head, labels, vocab_size=10).log_probs.sum()
    for gradient in torch.autograd.grad(loss, [hidden, weight]):
        assert gradient.isfinite().all() and gradient.norm() > 0.1


def test_a_row_with_nan_has_no_entropy():
    s = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 0.0, float("-inf")]])
    with kd.use_backend("reference"):
        stats = [kd.kl_div(row, row, return_stats=True)[1] for row in s.split(1)]
    assert stats[0].student_entropy.isnan() and stats[0].teacher_entropy.isnan()
    assert torch.isclose(stats[1].student_entropy, torch.tensor(2.0).log())


@pytest.mark.parametrize("name", ["reference", "eager", "native"])
def test_conditional_looks_at_stored_ids_alone(name):
    s = torch.tensor([[0.3, float("nan"), 1.0, float("inf")]])
    target = kd.SparseTarget(
        torch.tensor([[0, 2]]), logprobs=torch.tensor([[-1.0, -2.0]]), tail="conditional"
    )
    kept = kd.kl_div(s[:, [0, 2]], torch.tensor([[-1.0, -2.0]]))
    with kd.use_backend(name):
        assert torch.isclose(kd.kl_div(s, target), kept)
