"""Divergences that a user defines: the formula that counts is theirs, on every form, in every loss."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from problems import Problem, assert_exact, relative

import kdkernels as kd
from kdkernels.divergences import class_of, simplified

DOCS = Path(__file__).parents[1] / "docs" / "divergences.md"


@dataclass(frozen=True)
class FromPhi(kd.Divergence):
    """Squared Hellinger, three numbers, the gradient by autograd."""

    weight: float = 1.0
    half: float = 0.5
    bend: float = 0.0

    def phi(self, p, q, log_p, log_q):
        return self.weight * (p + q - 2 * ((log_p + log_q) * self.half).exp()) + self.bend * (p - q).square()


@dataclass(frozen=True)
class WithPsi(FromPhi):
    """The same with a closed gradient."""

    def q_psi(self, p, q, log_p, log_q):
        root = ((log_p + log_q) * self.half).exp()
        return self.weight * (q - 2 * self.half * root) - 2 * self.bend * q * (p - q)


class Ten(kd.ForwardKL):
    def phi(self, p, q, log_p, log_q):
        return 10 * super().phi(p, q, log_p, log_q)


OWN = [FromPhi(2.0, 0.5, 0.3), WithPsi(2.0, 0.5, 0.3), Ten()]
FORMS = [("logits", "logits"), ("head", "head"), ("head", "logits"), ("logits", "head")]


@pytest.mark.parametrize("divergence", OWN, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_forms(divergence, dtype, form):
    """On every backend: those without the formula leave it to eager."""
    problem = Problem(student=form[0], teacher=form[1], dtype=dtype)
    options = dict(divergence=divergence, temperature=1.5, hard_weight=0.5)
    assert_exact(
        problem.run("auto", **options),
        problem.oracle(**options),
        problem.plain(**options),
        dtype=dtype,
        projected="head" in form,
    )


@pytest.mark.parametrize("divergence", OWN, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("chunk_bytes", [1_000, 100_000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_of_tokens_and_vocabulary(backend, divergence, chunk_bytes, reduction):
    """The reduction "none" keeps the class until the backward, where the walk is repeated."""
    problem = Problem(student="head", teacher="head", vocab=700, shape=(2, 3), logit_scale=0.5, softcap=5.0)
    options = dict(divergence=divergence, temperature=2.0, hard_weight=0.5, reduction=reduction)
    value, grads = problem.run(backend, chunk_bytes=chunk_bytes, **options)
    truth, true_grads = problem.oracle(**options)
    assert torch.allclose(value.double(), truth, rtol=1e-5, atol=1e-6)
    for mine, true in zip(grads, true_grads):
        assert true.norm() > 1e-3 and relative(mine, true) < 3e-6


@pytest.mark.parametrize("divergence", OWN, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("tail", ["bucket", "conditional"])
@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
def test_sparse(backend, divergence, tail, form, hard_weight):
    problem = Problem(student=form)
    target = kd.top_k_target(problem.teacher[0], 8, tail=tail)
    options = dict(
        divergence=divergence, temperature=1.5 if tail == "conditional" else 1.0, hard_weight=hard_weight
    )
    loss = lambda s, t, y, **o: kd.distillation_loss(s, target, y, **o)  # noqa: E731
    value, grads = problem.run(backend, loss=loss, **options)
    truth, true_grads = problem.oracle(loss=loss, **options)
    assert torch.isclose(value.double(), truth, rtol=1e-5)
    for mine, true in zip(grads, true_grads):
        assert true.norm() > 1e-3 and relative(mine, true) < 3e-6
    with pytest.raises(ValueError, match="defines kd.ForwardKL"):
        kd.distillation_loss(
            problem.student[0], kd.top_k_target(problem.teacher[0], 8, tail="truncate"), divergence=divergence
        )


@pytest.mark.parametrize("divergence", OWN, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("form", ["logits", "head"])
def test_codistillation(backend, divergence, form):
    problem = Problem(student=form, teacher=form)

    def run(name, convert):
        leaves = [[convert(t).requires_grad_() for t in side] for side in (problem.student, problem.teacher)]
        with kd.use_backend(name):
            losses = kd.codistillation_loss(
                *(problem.side(side) for side in leaves), problem.labels, divergence=divergence
            )
        return losses, torch.autograd.grad(losses.student + 3 * losses.teacher, leaves[0] + leaves[1])

    ours, oracle = run(backend, torch.clone), run("reference", torch.Tensor.double)
    assert all(torch.isclose(mine.double(), truth, rtol=1e-5) for mine, truth in zip(ours[0], oracle[0]))
    assert all(relative(mine, truth) < 3e-6 for mine, truth in zip(ours[1], oracle[1]))


@pytest.mark.parametrize("kind", [FromPhi, WithPsi])
@pytest.mark.parametrize("made", ["inside", "outside"])
def test_compiled(kind, made):
    """Numbers that change are no new class and, from the third on, no new graph."""
    torch._dynamo.reset()
    s, t = torch.randn(2, 3, 20)

    def loss(given, s):
        divergence = kind(given, bend=0.2) if made == "inside" else given
        return kd.distillation_loss(s, t, divergence=divergence)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for number in (0.25, 0.5, 0.75):
        given = number if made == "inside" else kind(number, bend=0.2)
        results = []
        for function in (compiled, loss):
            leaf = s.clone().requires_grad_()
            value = function(given, leaf)
            results.append((value, torch.autograd.grad(value, leaf)[0]))
        assert results[1][0] > 0 and torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_a_subclass_runs_its_own_formula(backend):
    """Ten times the KL is ten times the KL: not the parent's kernels, nor its closed form or gradient."""
    s, t = torch.randn(2, 4, 50)
    grads, values = [], []
    for divergence in (Ten(), kd.ForwardKL()):
        leaf = s.clone().requires_grad_()
        values.append(kd.distillation_loss(leaf, t, divergence=divergence))
        grads.append(torch.autograd.grad(values[-1], leaf)[0])
    assert torch.isclose(values[0], 10 * values[1]) and relative(grads[0], 10 * grads[1]) < 1e-5
    assert "not Ten" in kd.explain(s, t, divergence=Ten()) or backend == "eager"


def test_what_a_subclass_inherits():
    class Renamed(kd.JSD):
        pass

    class Skewed(kd.JSD):
        def phi(self, p, q, log_p, log_q):
            return 2 * super().phi(p, q, log_p, log_q)

    class Detached(kd.ForwardKL):
        def q_psi(self, p, q, log_p, log_q):
            return 2 * (q - p)

    class Mixin:
        def phi(self, p, q, log_p, log_q):
            return (p - q).square()

    class Mixed(Mixin, kd.ReverseKL):
        pass

    s, t = torch.randn(2, 4, 50)

    def both(divergence):
        leaf = s.clone().requires_grad_()
        loss = kd.distillation_loss(leaf, t, divergence=divergence)
        return loss, torch.autograd.grad(loss, leaf)[0]

    for mine, parents in zip(both(Renamed(0.3)), both(kd.JSD(0.3))):
        assert torch.allclose(mine, parents, atol=1e-6)
    assert simplified(Renamed(0.0)) == simplified(kd.JSD(0.0)) == kd.ForwardKL()
    assert simplified(Renamed(1.0)) == simplified(kd.JSD(1.0)) == kd.ReverseKL()
    assert type(simplified(Skewed(0.0))) is Skewed
    value, grad = both(Detached())
    parents = both(kd.ForwardKL())
    assert torch.isclose(value, parents[0]) and torch.allclose(grad, 2 * parents[1], atol=1e-7)
    value, grad = both(Mixed())
    leaf = s.clone().requires_grad_()
    plain = (t.softmax(-1) - leaf.softmax(-1)).square().sum(-1).mean()
    assert torch.isclose(value, plain) and relative(grad, torch.autograd.grad(plain, leaf)[0]) < 1e-5


def test_stopped_gradients_and_padding_in_phi(backend):
    """What phi detaches has no gradient, and padding on both sides is no NaN in it."""

    class Stopped(kd.Divergence):
        def phi(self, p, q, log_p, log_q):
            return torch.where(q > 0, q * (log_q - log_p).detach(), 0.0)

    problem = Problem(rows="padding")
    value, grads = problem.run(backend, divergence=Stopped())
    truth, true_grads = problem.oracle(divergence=kd.ReverseKL())
    assert torch.isclose(value.double(), truth, rtol=1e-5)
    assert relative(grads[0], true_grads[0]) < 1e-5  # the constant that it leaves out drops out


def test_a_class_defined_again_is_another():
    def define(factor):
        class Scaled(kd.Divergence):
            def phi(self, p, q, log_p, log_q):
                return factor * (p - q).square()

        return Scaled()

    first, second = define(1.0), define(2.0)
    s, t = torch.randn(2, 4, 50)
    losses = [kd.distillation_loss(s, t, divergence=d) for d in (first, second, first)]
    assert torch.isclose(2 * losses[0], losses[1]) and losses[0] == losses[2]


def test_what_is_no_divergence():
    s, t = torch.randn(2, 4, 50)

    class Nothing(kd.Divergence):
        pass

    class Loose(FromPhi):
        def __init__(self, power):
            object.__setattr__(self, "power", power)

    @dataclass(frozen=True)
    class Learned(FromPhi):
        scale: torch.Tensor = torch.ones(2)

        def __post_init__(self):
            pass

    for bad, message in (
        (kd.Divergence(), "Divergence defines no phi"),
        (Nothing(), "Nothing defines no phi"),
        (Loose(2.0), "Loose keeps power outside"),
    ):
        with pytest.raises(TypeError, match=message):
            kd.distillation_loss(s, t, divergence=bad)
    with pytest.raises(ValueError, match="Learned's scale must be one number"):
        kd.distillation_loss(s, t, divergence=Learned())
    with pytest.raises(TypeError, match="FromPhi's weight must be a number, got 'x'"):
        FromPhi("x")
    with pytest.raises(ValueError, match="no divergence is defined here whose kind is -7"):
        class_of(-7)


def test_the_docs_example():
    scope = {"__name__": "docs"}
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.M | re.S)
    for block in blocks:
        exec(block, scope)
    assert len(blocks) == 2


class Summed(kd.Divergence):
    def phi(self, p, q, log_p, log_q):
        return (p - q).square().sum(-1)


@pytest.mark.parametrize("name", ["eager", "reference"])
def test_a_formula_that_sums_is_refused(name):
    """It would be added up once more, over the rows."""
    s, t = torch.randn(6, 50), torch.randn(6, 50)
    with (
        kd.use_backend(name),
        pytest.raises(TypeError, match=r"Summed.phi must be pointwise.*\(6, 50\).*\(6,\)"),
    ):
        kd.distillation_loss(s, t, divergence=Summed())


class Halved(kd.Divergence):
    def phi(self, p, q, log_p, log_q):
        return (p.mul_(0.5) - q).square()


class HalvedPsi(FromPhi):
    def q_psi(self, p, q, log_p, log_q):
        return q.mul_(0.5) * (q - p)


@pytest.mark.parametrize("divergence, formula", [(Halved, "phi"), (HalvedPsi, "q_psi")])
def test_a_formula_that_writes_is_refused(divergence, formula):
    """The gradient would be that of other distributions."""
    s, t = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    for name in ("eager", "reference"):
        if name == "reference" and formula == "q_psi":
            continue  # it asks phi alone
        with (
            kd.use_backend(name),
            pytest.raises(TypeError, match=f"{divergence.__name__}.{formula} writes into a tensor"),
        ):
            kd.distillation_loss(s, t, divergence=divergence())
