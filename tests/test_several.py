"""divergence=(A, B): token losses of several divergences, each as it is alone, from one projection of each model."""

from dataclasses import dataclass

import pytest
import torch
from compiled import assert_compiled
from problems import BACKENDS, Problem, relative

import kdkernels as kd
from kdkernels.backends.spec import OUTPUTS, Spec
from kdkernels.core import rows

THREE = (kd.ForwardKL(), kd.Overlap(), kd.JSD(0.3))


@dataclass(frozen=True)
class Squares(kd.Divergence):
    scale: float = 1.0

    def phi(self, p, q, log_p, log_q):
        return self.scale * (p - q).square()


def weighed(losses, weights):
    return sum((w * loss).sum() for w, loss in zip(weights, losses))


def outcome(problem, backend, weights, divergences, *, double=False, together=True, **options):
    """(token losses, gradients of their weighed sum)"""
    leaves = [(t.double() if double else t.clone()).requires_grad_() for t in problem.student]
    teacher = problem.side([t.double() if double else t for t in problem.teacher])
    options = dict(labels=problem.labels, reduction="none", **options)
    with kd.use_backend(backend):
        if together:
            losses = kd.distillation_loss(problem.side(leaves), teacher, divergence=divergences, **options)
        else:
            losses = tuple(
                kd.distillation_loss(problem.side(leaves), teacher, divergence=d, **options)
                for d in divergences
            )
        return losses, torch.autograd.grad(weighed(losses, weights), leaves)


def arriving(problem, count):
    """One number for each token and divergence; some are 0, and one divergence's all are for one token."""
    weights = torch.randn(count, *problem.labels.shape)
    weights[0, 0] = 0
    weights[:, -1, -1] = 0
    return weights


FORMS = [("logits", "logits"), ("head", "head"), ("head", "logits"), ("logits", "head")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_each_is_what_it_is_alone(backend, form, chunk_bytes):
    problem = Problem(student=form[0], teacher=form[1], vocab=300, softcap=8.0)
    weights, options = arriving(problem, 3), {"temperature": 1.0 + torch.rand(problem.labels.shape)}
    options |= {
        "soft_weight": 0.5,
        "temperature_squared": True,
        "token_weights": torch.rand(problem.labels.shape),
    }
    truth, slopes = outcome(problem, "reference", weights, THREE, double=True, together=False, **options)
    made, grads = outcome(problem, backend, weights, THREE, chunk_bytes=chunk_bytes, **options)
    assert isinstance(made, tuple) and all(loss.dtype == torch.float32 for loss in made)
    for mine, true in zip(made, truth):
        assert mine.shape == problem.labels.shape and (mine.flatten()[:2] == 0).all()
        torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=1e-6)
    for mine, true in zip(grads, slopes):
        assert relative(mine, true) < 5e-6 and true.norm() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["logits", "head"])
def test_other_dtypes(form, dtype):
    """At most twice the error of the same divergences one by one, each rounded on its own."""
    problem = Problem(student=form, teacher=form, vocab=300, dtype=dtype)
    weights = arriving(problem, 3)
    _, truth = outcome(problem, "reference", weights, THREE, double=True, together=False)
    _, alone = outcome(problem, "auto", weights, THREE, together=False)
    losses, together = outcome(problem, "auto", weights, THREE)
    assert losses[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for mine, theirs, true in zip(together, alone, truth):
        assert relative(mine, true) <= 2 * relative(theirs, true) + 1e-12


@pytest.mark.parametrize("chunk_bytes", [None, 30_000])
def test_each_model_is_projected_once(monkeypatch, chunk_bytes):
    """In the forward, and once more in the backward, however many divergences there are; by vocabulary chunks once for
    every pass."""
    problem = Problem(student="head", teacher="head", vocab=900, ignored=0)
    calls, tile = [], rows.HeadRows.tile
    monkeypatch.setattr(rows.HeadRows, "tile", lambda *args: calls.append(1) or tile(*args))
    leaves = [t.clone().requires_grad_() for t in problem.student]
    counts = []
    for divergence in (kd.JSD(0.3), (kd.JSD(0.3),), THREE):
        calls.clear()
        made = kd.distillation_loss(
            problem.side(leaves),
            problem.side(problem.teacher),
            divergence=divergence,
            reduction="none",
            chunk_bytes=chunk_bytes,
        )
        made = made if isinstance(made, tuple) else (made,)
        forward = len(calls)
        weighed(made, torch.ones(len(made))).backward()
        counts.append((forward, len(calls) - forward))
    if chunk_bytes is None:
        assert counts[0] == counts[1] == counts[2] == (2, 2)
    else:  # a tile's bytes count two more buffers
        assert counts[0][0] > 2 and counts[2][0] < 2 * counts[0][0]


def test_one_that_nobody_asks_back_for_is_free():
    """Weight 0 times a divergence that is infinite is 0, in the value and in the gradient."""
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    student[:, 3], teacher[:, 5] = -torch.inf, -torch.inf
    leaf = student.clone().requires_grad_()
    forward, overlap = kd.distillation_loss(
        leaf, teacher, divergence=(kd.ForwardKL(), kd.Overlap()), reduction="none"
    )
    assert (forward == torch.inf).all() and overlap.isfinite().all()
    (grad,) = torch.autograd.grad(overlap.log().sum(), leaf)
    with kd.use_backend("reference"):
        wide = student.double().requires_grad_()
        alone = kd.distillation_loss(wide, teacher.double(), divergence=kd.Overlap(), reduction="none")
        (true,) = torch.autograd.grad(alone.log().sum(), wide)
    assert relative(grad, true) < 1e-5 and true.norm() > 0.1


def test_yours_goes_along():
    problem = Problem(student="head", teacher="logits", vocab=50)
    both = (Squares(3.0), kd.ForwardKL())
    weights = arriving(problem, 2)
    truth, slopes = outcome(problem, "reference", weights, both, double=True, together=False)
    made, grads = outcome(problem, "auto", weights, both)
    for mine, true in zip([*made, *grads], [*truth, *slopes]):
        assert relative(mine, true) < 1e-5


def test_frozen_and_without_grad():
    problem = Problem(student="head", teacher="head", vocab=40)
    student = problem.side(problem.student)
    made = kd.distillation_loss(student, problem.side(problem.teacher), divergence=THREE, reduction="none")
    assert not any(loss.requires_grad for loss in made)
    hidden = problem.student[0].clone().requires_grad_()
    frozen = kd.LinearHead(hidden, *problem.student[1:])
    made = kd.distillation_loss(frozen, problem.side(problem.teacher), divergence=THREE, reduction="none")
    weighed(made, (1, 1, 1)).backward()
    assert hidden.grad.norm() > 1e-2
    with pytest.raises(RuntimeError, match="differentiated again"):
        made = kd.distillation_loss(frozen, problem.side(problem.teacher), divergence=THREE, reduction="none")
        torch.autograd.grad(made[0].sum(), hidden, create_graph=True)


def test_compiled_and_checked():
    problem = Problem(student="head", teacher="logits", vocab=60, shape=(4,))

    def loss(*leaves):
        return kd.distillation_loss(
            problem.side(leaves), problem.teacher[0], problem.labels, divergence=THREE, reduction="none"
        )

    assert_compiled(loss, problem.student)
    arguments = (
        [t.requires_grad_() for t in problem.student],
        problem.teacher,
        problem.labels.clamp(min=-1),
        torch.ones(1, dtype=torch.float64),
        torch.zeros(2, 2, dtype=torch.float64),
        torch.rand(4, 2 * OUTPUTS, dtype=torch.float64),
        ";".join(Spec(kind=kind, asked=1).text() for kind in (1, 6)),
        60,
        "",
        2**20,
        [True, True, True, False],
        0.0,
    )
    torch.library.opcheck(torch.ops.kdkernels.deferred.default, arguments)


def test_the_oracle_can_be_differentiated_twice():
    student, teacher = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 5).double()
    with kd.use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda s: kd.distillation_loss(
                s, teacher, divergence=(kd.ForwardKL(), kd.JSD()), reduction="none"
            ),
            student,
        )
    assert torch.autograd.gradcheck(
        lambda s: kd.distillation_loss(s, teacher, divergence=(kd.ForwardKL(), kd.JSD()), reduction="none"),
        student,
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": "mean"}, "reduction=\"none\", not 'mean'"),
        ({"divergence": ()}, "divergence is an empty tuple"),
        ({"hard_weight": 0.5, "labels": torch.tensor([1, 2])}, "takes no hard_weight"),
        ({"return_stats": True}, "takes no return_stats"),
        ({"inplace": True}, "takes no inplace"),
        ({"soft_weight": 0.0}, "soft_weight=0"),
        (
            {"teacher": kd.SparseTarget(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1))},
            "dense teacher",
        ),
    ],
)
def test_what_does_not_go_together(options, message):
    given = {
        "student": torch.randn(2, 5, requires_grad=True),
        "teacher": torch.randn(2, 5),
        "divergence": (kd.ForwardKL(), kd.JSD()),
        "reduction": "none",
    }
    with pytest.raises(ValueError, match=message):
        kd.distillation_loss(**{**given, **options})
    with pytest.raises(TypeError, match="divergence must be"):
        kd.distillation_loss(torch.randn(2, 5), torch.randn(2, 5), divergence=(kd.JSD,), reduction="none")
