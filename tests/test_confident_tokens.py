"""The hard term of a token that is all but certain, on CPUs: what is left of 1 keeps its digits."""

import pytest
import torch
from problems import relative

import kdkernels as kd
from kdkernels.backends import chosen_backend

ROWS, VOCAB = 3, 5000
LABELS = torch.tensor([7, 2500, VOCAB - 1])


def logits(lead=25.0, offset=0.0):
    """Of models that agree: their soft term is exactly 0, and leaves the hard one its digits."""
    z = torch.randn(ROWS, VOCAB)
    z[torch.arange(ROWS), LABELS] += lead
    return z + offset


def losses(student, teacher, **options):
    if options.pop("co", False):
        return kd.codistillation_loss(student, teacher, LABELS, **options).teacher
    if (tail := options.pop("tail", None)) is not None:
        teacher = kd.top_k_target(teacher.detach(), 4, tail=tail)
    return kd.distillation_loss(student, teacher, LABELS, **options)


def test_what_cross_entropy_rounds_to_0(backend):
    leaf = torch.tensor([[20.0, 0.0, 0.0, 0.0]]).requires_grad_()
    label = torch.tensor([0])
    loss = kd.cross_entropy(leaf, label)
    assert torch.nn.functional.cross_entropy(leaf, label) == 0
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(6.18346e-9, rel=1e-5)
    assert grad.tolist()[0] == pytest.approx([-6.18346e-9] + 3 * [2.06115e-9], rel=1e-5)


@pytest.mark.parametrize("chunk_bytes", [None, 8_000])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize(
    "options",
    [
        dict(soft_weight=0.0, hard_weight=1.0),
        dict(hard_weight=0.5),
        dict(hard_weight=0.5, temperature=3.0),
        dict(hard_weight=0.5, divergence=kd.JSD(0.3)),
        dict(hard_weight=0.5, reduction="none"),
        dict(soft_weight=0.0, hard_weight=0.5, z_loss=1e-12),
        dict(co=True),
        dict(co=True, temperature=2.0),
    ],
    ids=str,
)
def test_loss_and_gradient(backend, options, offset, chunk_bytes):
    z = logits(offset=offset)
    results = []
    for dtype, name in ((torch.float32, chosen_backend()), (torch.float64, "reference")):
        student, teacher = (z.to(dtype).requires_grad_() for _ in range(2))
        with kd.use_backend(name):
            loss = losses(student, teacher, chunk_bytes=chunk_bytes, **options)
            leaf = teacher if options.get("co") else student
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    (loss, grad), (truth, true) = results
    assert 0 < truth.max() < 1e-6
    assert relative(loss, truth) < 1e-5
    at = torch.arange(ROWS), LABELS
    assert relative(grad[at], true[at]) < 1e-5 and relative(grad, true) < 1e-5
