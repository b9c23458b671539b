"""Logits so far from 0 that a sum of them with a normaliser's logarithm has none of its digits left: a row that somebody
has masked whole with the dtype's lowest number, say. What counts of them is their distance to each other."""

import pytest
import torch
from problems import relative

import kdkernels as kd

VOCAB = 300
LOWEST = torch.finfo(torch.float32).min
LABELS = torch.tensor([3, 299, 0, 250])


def rows(far):
    """All logits equal; half of them, the others far below; a few far above the others; and ordinary ones."""
    logits, step = torch.full((4, VOCAB), far), abs(far) / 1000
    logits[1, ::2] += step
    logits[2, :5] += step
    logits[3] = torch.randn(VOCAB)
    return logits


def smoothed(student, teacher, labels, **options):
    return kd.cross_entropy(student, labels, label_smoothing=0.1, reduction="none", **options)


def mixed(student, teacher, labels, **options):
    return kd.distillation_loss(
        student, teacher, labels, temperature=2.0, hard_weight=0.5, reduction="none", **options
    )


def sparse(student, teacher, labels, **options):
    target = kd.top_k_target(teacher, 4, tail="bucket")
    return kd.distillation_loss(student, target, labels, hard_weight=0.5, reduction="none", **options)


def log_probs(student, teacher, labels, **options):
    of = kd.token_log_probs(student, labels, entropy=True, **options)
    return of.log_probs + 0.5 * of.entropy


def as_head(logits):
    """Each token has a column of the lm_head, which is its logits."""
    return kd.LinearHead(torch.eye(4, dtype=logits.dtype), logits.t())


@pytest.mark.parametrize("far", [1e17, -1e17, LOWEST])
@pytest.mark.parametrize("loss", [smoothed, mixed, sparse, log_probs], ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", ["logits", "head", "head in chunks"])
def test_losses(backend, loss, form, far):
    logits, teacher = rows(far), torch.randn(4, VOCAB)
    options = {"chunk_bytes": 2000} if form == "head in chunks" else {}  # of the vocabulary

    def run(backend, dtype):
        leaf = logits.to(dtype).requires_grad_()
        with kd.use_backend(backend):
            value = loss(leaf if form == "logits" else as_head(leaf), teacher.to(dtype), LABELS, **options)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    (value, grad), (truth, true_grad) = run(backend, torch.float32), run("reference", torch.float64)
    assert torch.allclose(value.double(), truth, rtol=1e-5, atol=1e-5)
    for mine, true in zip(grad, true_grad):
        assert relative(mine, true) < 1e-6 if true.norm() > 0 else mine.norm() == 0


@pytest.mark.parametrize("far", [1e17, -1e17, LOWEST])
def test_a_teacher_that_learns(backend, far):
    logits = torch.randn(4, VOCAB), rows(far)

    def run(backend, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in logits]
        with kd.use_backend(backend):
            losses = kd.codistillation_loss(*leaves, LABELS)
        return losses.teacher.detach(), torch.autograd.grad(losses.teacher, leaves[1])[0]

    (value, grad), (truth, true_grad) = run(backend, torch.float32), run("reference", torch.float64)
    assert torch.isclose(value.double(), truth, rtol=1e-5)
    for mine, true in zip(grad, true_grad):
        assert relative(mine, true) < 1e-6
