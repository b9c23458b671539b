"""kd.sampled_kl: what it is in the mean over every token that could be drawn, and far from there."""

import json
import math

import pytest
import torch
from compiled import assert_compiled

import kdkernels as kd
from benchmarks import pages
from benchmarks import sampled_kl as figures

ESTIMATORS, GRADIENTS = ("k1", "k2", "k3"), ("none", "value", "score", "ratio")


def models(vocab=7):
    """(student's, teacher's, older student's) logits."""
    student = torch.randn(vocab, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(vocab, dtype=torch.float64) * 2
    return student, teacher, student.detach() + 0.5 * torch.randn(vocab, dtype=torch.float64)


def mean(student, teacher, drawn_by, **options):
    """The estimate's mean over draws from softmax(drawn_by), and its gradient's for the student's logits."""
    chance = drawn_by.detach().softmax(-1)
    value = (chance * kd.sampled_kl(student.log_softmax(-1), teacher.log_softmax(-1), **options)).sum()
    if not value.requires_grad:
        return value, torch.zeros_like(student)
    return value.detach(), torch.autograd.grad(value, student)[0]


def gradients(student, teacher):
    """Those of KL(q, p), of KL(p, q), and of E_q[k2] by the score alone."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    q, p, r = log_q.detach().exp(), log_p.exp(), (log_p - log_q).detach()
    reverse = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), student, retain_graph=True)[0]
    forward = torch.autograd.grad((p * (log_p - log_q)).sum(), student, retain_graph=True)[0]
    return reverse, forward, torch.autograd.grad((q * 0.5 * r.square() * log_q).sum(), student)[0]


@pytest.mark.parametrize("gradient", ("none", "value", "score"))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_its_mean_is_what_the_docstring_says(estimator, gradient):
    student, teacher, _ = models()
    value, slope = mean(student, teacher, student, estimator=estimator, gradient=gradient)
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    exact = (q * (q / p).log()).sum()
    second_order = (q * 0.5 * (q / p).log().square()).sum()
    torch.testing.assert_close(value, second_order if estimator == "k2" else exact)
    assert abs(second_order - exact) > 0.01 * exact
    reverse, forward, score_of_k2 = gradients(student, teacher)
    expected = {
        ("k1", "value"): torch.zeros_like(reverse),
        ("k2", "value"): reverse,
        ("k3", "value"): forward,
        ("k1", "score"): reverse,
        ("k2", "score"): score_of_k2,
        ("k3", "score"): reverse - forward,
    }.get((estimator, gradient), torch.zeros_like(reverse))
    torch.testing.assert_close(slope, expected)
    assert min(t.norm() for t in (reverse, forward, reverse - forward, score_of_k2)) > 1e-2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ratio_over_older_draws_is_score_over_its_own(estimator):
    student, teacher, older = models()
    options = {"estimator": estimator, "gradient": "ratio", "sampling_log_probs": older.log_softmax(-1)}
    mine = mean(student, teacher, older, **options)
    torch.testing.assert_close(mine, mean(student, teacher, student, estimator=estimator, gradient="score"))
    biased = mean(student, teacher, older, estimator=estimator, gradient="score")
    assert (biased[1] - mine[1]).norm() > 0.01 * mine[1].norm()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bounds", [(0.9, 1.1), (0.0, 1.05), (1.0, 1.0)])
def test_a_clipped_ratio_is_a_bounded_weight(estimator, bounds):
    student, teacher, older = models(40)
    log_q, log_p, log_old = (z.log_softmax(-1) for z in (student, teacher, older))
    ratio = (log_q - log_old).exp().detach()
    weight = ratio.clamp(*bounds)
    expected = weight * kd.sampled_kl(log_q, log_p, estimator=estimator)
    theirs = torch.autograd.grad(expected.sum(), student, retain_graph=True)[0]
    mine = kd.sampled_kl(
        log_q, log_p, estimator=estimator, gradient="ratio", sampling_log_probs=log_old, clip_ratio=bounds
    )
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(torch.autograd.grad(mine.sum(), student)[0], theirs)
    assert (weight < ratio).any() and (bounds[0] == 0 or (weight > ratio).any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_never_nan(estimator, gradient, dtype):
    inf = torch.inf
    student = torch.tensor(
        [-100.0, 0.0, -1000.0, 0.0, -inf, -inf, -3.0, 0.0], dtype=dtype, requires_grad=True
    )
    teacher = torch.tensor([0.0, -100.0, 0.0, -1000.0, -inf, -1.0, -inf, 0.0], dtype=dtype)
    options = {"sampling_log_probs": student.detach().flip(0)} if gradient == "ratio" else {}
    each = kd.sampled_kl(student, teacher, estimator=estimator, gradient=gradient, **options)
    assert not each.isnan().any()
    if gradient == "none":
        assert not each.requires_grad
        return
    for arriving in (torch.ones_like(each), torch.zeros_like(each)):  # a masked token's 0 times an infinity
        slope = torch.autograd.grad(each, student, arriving, retain_graph=True)[0]
        assert slope.isfinite().all() and (arriving.any() or not slope.any())


def test_values_of_k3_keep_their_digits():
    r = torch.tensor([1e-9, 1e-4, 0.1, -0.3, 0.49999, 0.50001, -2.0, 3.0, -100.0], dtype=torch.float64)
    zero = torch.zeros_like(r)
    exact = [sum(x**n / math.factorial(n) for n in range(2, 60)) for x in r[:8].tolist()]
    exact.append(math.exp(-100) - 1 + 100)
    mine = kd.sampled_kl(zero, r, estimator="k3")
    torch.testing.assert_close(mine, torch.tensor(exact, dtype=torch.float64), rtol=1e-14, atol=0.0)
    fp32 = kd.sampled_kl(zero.float(), torch.full_like(r, 100.0).float(), estimator="k3")
    assert (fp32 == torch.inf).all() and fp32.dtype == torch.float32
    assert kd.sampled_kl(zero.bfloat16(), r.float()).dtype == torch.float32


def test_equal_models_estimate_nothing():
    log_q = torch.randn(9).log_softmax(-1).requires_grad_()
    for estimator in ESTIMATORS:
        each = kd.sampled_kl(log_q, log_q.detach(), estimator=estimator)
        assert not each.any() and not torch.autograd.grad(each.sum(), log_q)[0].any()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_compiled_and_of_any_shape(gradient):
    student, teacher, older = torch.rand(2, 3, 4).log(), torch.rand(3, 4).log(), torch.rand(3, 4).log()
    options = {"gradient": gradient}
    if gradient == "ratio":
        options |= {"sampling_log_probs": older, "clip_ratio": (0.5, 1.5)}
    whole = kd.sampled_kl(student[0], teacher, estimator="k3", **options)
    assert whole.shape == (3, 4)
    single = {k: v[1, 2] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    torch.testing.assert_close(
        whole[1, 2], kd.sampled_kl(student[0, 1, 2], teacher[1, 2], estimator="k3", **single)
    )

    def loss(leaf):
        return kd.sampled_kl(leaf, teacher, estimator="k3", **options) + leaf

    assert_compiled(loss, [student[0]])


def test_gradients_arrive_through_token_losses_of_any_kind():
    log_q = torch.randn(6, dtype=torch.float64, requires_grad=True)
    log_p = torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: kd.sampled_kl(x, log_p, estimator="k2", gradient="value"), log_q
    )
    assert torch.autograd.gradcheck(
        lambda x: kd.sampled_kl(x, log_p, estimator="k3", gradient="value"), log_q
    )
    expanded = kd.sampled_kl(log_q, log_p).expand(3, 6)
    (slope,) = torch.autograd.grad(expanded.sum(), log_q)
    torch.testing.assert_close(slope, 3 * (log_q - log_p).detach())
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(kd.sampled_kl(log_q, log_p).sum(), log_q, create_graph=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_transforms_are_refused_and_forward_mode_is_not_zero(backend):
    log_q, log_p = torch.randn(2, 3)
    with kd.use_backend(backend):
        with pytest.raises(RuntimeError, match="kdkernels has no forward-mode derivative here$"):
            torch.func.jvp(lambda x: kd.sampled_kl(x, log_p), (log_q,), (log_q,))
        with pytest.raises(RuntimeError, match="cannot transform kdkernels.*for vmap's$"):
            torch.func.grad(lambda x: kd.sampled_kl(x, log_p).sum())(log_q)
        assert kd.sampled_kl(log_q, log_p, gradient="none").isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"estimator": "k4"}, "unknown estimator 'k4'; there are k1, k2, k3"),
        ({"gradient": "reinforce"}, "unknown gradient 'reinforce'"),
        ({"gradient": "ratio"}, "needs sampling_log_probs"),
        ({"sampling_log_probs": torch.zeros(3)}, "belong to gradient=\"ratio\", but gradient='score'"),
        ({"clip_ratio": (0.8, 1.2)}, "clip_ratio belongs to"),
        (
            {"gradient": "ratio", "sampling_log_probs": torch.zeros(3), "clip_ratio": (1.1, 1.2)},
            r"clip_ratio=\(1.1, 1.2\) must be 0 <= low <= 1 <= high",
        ),
        ({"teacher_log_probs": torch.zeros(1)}, r"teacher_log_probs are \(1,\), student_log_probs \(3,\)"),
        ({"teacher_log_probs": torch.zeros(3, dtype=torch.int64)}, "teacher_log_probs must be floating"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    given = {"student_log_probs": torch.zeros(3), "teacher_log_probs": torch.zeros(3), **options}
    with pytest.raises(ValueError, match=message):
        kd.sampled_kl(**given)


def test_docs_hold_what_was_measured():
    committed = json.loads(figures.RESULT.read_text())
    assert pages.is_filled("sampled-kl", figures.table(committed))
