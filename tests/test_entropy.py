"""The student's entropy as a term of the loss, beside every divergence, target and hard term."""

import pytest
import torch
from problems import Problem, assert_exact, assert_refused, relative
from sparse_problems import TAILS, SparseProblem

import kdkernels as kd
from kdkernels.backends import eager
from kdkernels.testing import compare

FORMS = [("logits", "logits"), ("head", "head")]
MIX = dict(temperature=1.7, hard_weight=0.5, temperature_squared=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("kind", [kd.ForwardKL(), kd.ReverseKL(), kd.JSD(0.3), kd.TotalVariation()], ids=str)
def test_beside_divergences(backend, kind, form, dtype):
    problem = Problem(student=form[0], teacher=form[1], dtype=dtype)
    options = dict(divergence=kind, entropy_weight=-0.7, **MIX)
    assert_exact(
        problem.run(backend, **options),
        problem.oracle(**options),
        problem.plain(**options),
        dtype=dtype,
        projected="head" in form,
    )


OPTIONS = [
    dict(soft_weight=0.0),
    dict(temperature=2.0),
    dict(reduction="none", **MIX),
    dict(entropy_weight=torch.tensor(-0.3), label_smoothing=0.1, z_loss=0.01, **MIX),
    dict(entropy_weight="each", token_weights="each", **MIX),
    dict(vocab_size=250),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("chunk_bytes", [None, 4_000])
def test_options_and_budgets(backend, form, options, chunk_bytes):
    problem = Problem(student=form[0], teacher=form[1])
    problem.labels.clamp_(max=249)
    each = {name: torch.rand(3, 5) - 0.5 for name, value in options.items() if value == "each"}
    options = dict(entropy_weight=0.4) | options | each
    value, grads = problem.run(backend, chunk_bytes=chunk_bytes, **options)
    truth, true_grads = problem.oracle(**options)
    assert torch.allclose(value.double(), truth, rtol=1e-5, atol=1e-6)
    for mine, true in zip(grads, true_grads, strict=True):
        assert true.norm() > 1e-4 and relative(mine, true) < 3e-6


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("chunk_bytes", [None, 6_000])
def test_beside_sparse_targets(backend, form, tail, temperature, chunk_bytes):
    problem = SparseProblem(tail=tail, student=form)
    options = dict(entropy_weight=-0.7, hard_weight=0.5, temperature=temperature)
    value, grads = problem.run(backend, chunk_bytes=chunk_bytes, **options)
    truth, true_grads = problem.oracle(**options)
    without = problem.oracle(**options | dict(entropy_weight=0.0))
    assert torch.allclose(value.double(), truth, rtol=1e-5, atol=1e-6)
    for mine, true, less in zip(grads, true_grads, without[1], strict=True):
        assert relative(true, less) > 1e-2 and relative(mine, true) < 3e-6


def test_inplace_beside_a_sparse_target(backend):
    problem = SparseProblem(tail="bucket")
    source, leaf = (problem.student[0].clone().requires_grad_() for _ in range(2))
    options = dict(entropy_weight=-0.7, temperature=1.7)
    kd.kl_div(leaf, problem.target, problem.labels, **options).backward()
    kd.kl_div(source * 1, problem.target, problem.labels, inplace=True, **options).backward()
    assert torch.equal(source.grad, leaf.grad) and leaf.grad.any()


def test_equal_models_feel_the_entropy_alone(backend):
    """It has no T^2: the gradient at equal models is the weight times token_log_probs' own."""
    logits = torch.randn(4, 300)
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    options = dict(temperature=2.0, temperature_squared=True, reduction="sum")
    loss = kd.kl_div(leaf, logits, entropy_weight=0.25, **options)
    entropy = kd.token_log_probs(other, torch.full((4,), -1), temperature=2.0, entropy=True).entropy
    (0.25 * entropy).sum().backward()
    loss.backward()
    torch.testing.assert_close(loss, 0.25 * entropy.sum())
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-8)


def test_refused():
    student, labels = torch.randn(3, 10, requires_grad=True), torch.tensor([1, 2, 3])
    target = kd.SparseTarget(torch.tensor([[1], [2], [3]]), logprobs=torch.zeros(3, 1), tail="conditional")
    assert_refused(lambda: kd.kl_div(student, target, entropy_weight=0.1), "conditional.*never sees")
    kd.kl_div(student, target, labels, entropy_weight=0.1, hard_weight=0.5).backward()
    several = dict(divergence=(kd.ForwardKL(), kd.ReverseKL()), reduction="none", entropy_weight=0.1)
    assert_refused(
        lambda: kd.distillation_loss(student, student.detach(), **several), "takes no entropy_weight"
    )


@pytest.mark.parametrize("tail", [None, "bucket"])
def test_a_dropped_gradient_is_seen(monkeypatch, tail):
    problem = Problem() if tail is None else SparseProblem(tail=tail)
    options = dict(entropy_weight=-0.7)
    oracle = problem.oracle(**options)

    def wrong():
        return [
            check
            for check in compare(problem.run("eager", **options), oracle, oracle, dtype=torch.float32)
            if not check.ok
        ]

    monkeypatch.setattr(eager, "_entropy_gradient", lambda z, *args: torch.zeros_like(z))
    assert wrong()
