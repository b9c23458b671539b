"""Weight 0 times anything is 0: of a token, of a term, NaN and infinities too, in loss and every gradient."""

import pytest
import torch
from problems import Problem, relative

import kdkernels as kd

FORMS = [("logits", "logits"), ("head", "head"), ("head", "logits"), ("logits", "head")]
TAILS = ["bucket", "conditional", "renormalize", "truncate"]


def gradients(loss, tensors):
    return torch.autograd.grad(loss.sum(), tensors)


@pytest.fixture(params=["masked", "weight 0"])
def left_out(request):
    """Options that leave out the second of five tokens."""
    if request.param == "masked":
        return lambda: (torch.tensor([3, -100, 5, 7, 0]), {})
    return lambda: (
        torch.tensor([3, 4, 5, 7, 0]),
        dict(token_weights=torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])),
    )


def answers(problem, make, poison):
    """(loss, the student's gradients) with the second token's numbers replaced by ``poison``."""
    leaves = [t.clone() for t in problem.student]
    teacher = [t.clone() for t in problem.teacher]
    if poison is not None:
        leaves[0][1], teacher[0][1] = poison, -poison
    leaves = [t.requires_grad_() for t in leaves]
    loss = make(problem.side(leaves), problem.side(teacher))
    return loss.detach(), gradients(loss, leaves)


def agree(problem, make, backend):
    """What stands in a token that counts for nothing changes nothing."""
    with kd.use_backend("reference"):
        truth, true_grads = answers(problem, make, None)
    for poison in (torch.nan, torch.inf):
        for name in ("reference", backend):
            with kd.use_backend(name):
                value, grads = answers(problem, make, poison)
            assert torch.allclose(value, truth, rtol=1e-5), (poison, name)
            for mine, true in zip(grads, true_grads):
                assert true.norm() > 1e-6 and relative(mine, true) < 3e-6, (poison, name)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_bytes", [None, 3_000])
def test_a_token(backend, form, reduction, chunk_bytes, left_out):
    problem, (labels, options) = Problem(student=form[0], teacher=form[1], shape=(5,), vocab=300), left_out()
    agree(
        problem,
        lambda s, t: kd.distillation_loss(
            s,
            t,
            labels,
            divergence=kd.JSD(0.3),
            hard_weight=0.5,
            chunk_bytes=chunk_bytes,
            reduction=reduction,
            **options,
        ),
        backend,
    )


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
@pytest.mark.parametrize("tail", TAILS)
def test_a_token_with_a_sparse_target(backend, form, hard_weight, tail, left_out):
    problem, (labels, options) = Problem(student=form, shape=(5,), vocab=60), left_out()
    values, ids = problem.teacher[0].log_softmax(-1).topk(4)
    target = kd.SparseTarget(ids, values, tail=tail)
    agree(
        problem,
        lambda s, _: kd.distillation_loss(s, target, labels, hard_weight=hard_weight, **options),
        backend,
    )


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("chunk_bytes", [None, 3_000])
def test_a_token_in_codistillation(backend, form, chunk_bytes, left_out):
    """Both models' losses, and the teacher's gradients too."""
    problem, (labels, options) = Problem(student=form, teacher=form, shape=(5,), vocab=300), left_out()

    def run(name, poison):
        sides = [[t.clone() for t in side] for side in (problem.student, problem.teacher)]
        if poison:
            sides[0][0][1] = sides[1][0][1] = torch.nan
        leaves = [[t.requires_grad_() for t in side] for side in sides]
        with kd.use_backend(name):
            losses = kd.codistillation_loss(
                *(problem.side(side) for side in leaves), labels, chunk_bytes=chunk_bytes, **options
            )
        return losses, gradients(losses.student + 2 * losses.teacher, leaves[0] + leaves[1])

    truth, true_grads = run("reference", False)
    for name in ("reference", backend):
        losses, grads = run(name, True)
        assert all(torch.isclose(mine, true, rtol=1e-5) for mine, true in zip(losses, truth))
        for mine, true in zip(grads, true_grads):
            assert true.norm() > 1e-6 and relative(mine, true) < 3e-6


@pytest.mark.parametrize("form", ["logits", "head"])
def test_no_term_has_a_gradient_of_0(backend, form):
    problem = Problem(student=form)
    for name in ("reference", backend):
        leaves = [t.clone().requires_grad_() for t in problem.student]
        with kd.use_backend(name):
            loss = kd.kl_div(problem.side(leaves), problem.teacher[0], problem.labels, soft_weight=0.0)
        assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("form", ["logits", "head"])
def test_codistillation_without_a_soft_term_is_two_cross_entropies(backend, form, monkeypatch):
    """And nobody computes a divergence."""
    monkeypatch.setattr(kd.JSD, "phi", lambda *_: pytest.fail("a divergence was computed"))
    problem = Problem(student=form, teacher=form)
    with kd.use_backend(backend):
        both, hard = [], []
        for made in (both, hard):
            sides = [
                [t.clone().requires_grad_() for t in side] for side in (problem.student, problem.teacher)
            ]
            models = [problem.side(side) for side in sides]
            if made is both:
                losses = kd.codistillation_loss(
                    *models, problem.labels, divergence=kd.JSD(0.5), soft_weight=0.0
                )
            else:
                losses = [kd.cross_entropy(model, problem.labels) for model in models]
            made += [*losses, *torch.autograd.grad(sum(losses), sides[0] + sides[1])]
    for mine, true in zip(both, hard):
        assert true.norm() > 1e-3 and torch.equal(mine, true)


@pytest.mark.parametrize("name", ["reference", "backend"])
def test_the_soft_term(backend, divergence, name):
    """soft_weight=0 where the divergence is infinite, or NaN: the cross entropy."""
    student, labels = torch.randn(3, 40), torch.tensor([2, 1, 3])
    student[:, 7] = -torch.inf
    leaf, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    true = torch.nn.functional.cross_entropy(other, labels)
    options = dict(divergence=divergence, soft_weight=0.0, hard_weight=1.0)
    teachers = [torch.randn(3, 40), torch.full((3, 40), torch.nan)]
    if divergence == kd.ForwardKL():
        values, ids = teachers[0].log_softmax(-1).topk(40)
        teachers += [kd.SparseTarget(ids, values, tail=tail) for tail in TAILS]
    with kd.use_backend(backend if name == "backend" else name):
        for teacher in teachers:
            loss = kd.distillation_loss(leaf, teacher, labels, **options)
            assert torch.isclose(loss, true)
            (mine,) = gradients(loss, [leaf])
            (theirs,) = torch.autograd.grad(true, other, retain_graph=True)
            assert relative(mine, theirs) < 3e-7
        both = kd.codistillation_loss(leaf, teachers[0], labels, **options)
        (mine,) = gradients(both.student, [leaf])
        assert torch.isclose(both.student, true) and relative(mine, theirs) < 3e-7


@pytest.mark.parametrize("name", ["reference", "backend"])
def test_the_hard_term(backend, name):
    """hard_weight=0, or a label that smoothing gives no weight, where the label's logit is -inf."""
    student, teacher = torch.randn(2, 3, 40)
    student[:, 7] = teacher[:, 7] = -torch.inf
    leaf, labels = student.clone().requires_grad_(), torch.tensor([7, 7, 3])
    with kd.use_backend("reference"):
        truth = kd.kl_div(leaf, teacher)
        (true,) = gradients(truth, [leaf])
    with kd.use_backend(backend if name == "backend" else name):
        loss = kd.distillation_loss(leaf, teacher, labels, hard_weight=0.0)
        (mine,) = gradients(loss, [leaf])
        assert torch.isclose(loss, truth, rtol=1e-5) and relative(mine, true) < 1e-6
        finite = torch.tensor([[0.0, 1.0, 2.0]])
        assert torch.isclose(
            kd.cross_entropy(finite, torch.tensor([2]), label_smoothing=1.0), -finite.log_softmax(-1).mean()
        )
