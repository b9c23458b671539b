"""ms-swift's GKD loss beside its own, loaded file by file: its package wants ModelScope."""

import sys
import types

import pytest
import torch
from compare import assert_same, outcome
from source import load

from kdkernels.integrations import swift as dropin

original = load("ms-swift", "swift/rlhf_trainers/gkd_loss.py")
N, D = 9, 41


@pytest.fixture(autouse=True)
def module(monkeypatch):
    for name in ("swift", "swift.rlhf_trainers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "swift.rlhf_trainers.gkd_loss", original)


def logits(dtype=torch.float64):
    return [(2 * torch.randn(N, D)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 3e-5)])
@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
def test_the_loss(beta, dtype, tolerance):
    student, teacher = logits(dtype)
    ours, theirs = (outcome(m.jsd_loss, [student], teacher, beta, chunk_size=4) for m in (dropin, original))
    assert_same(ours, theirs, tolerance)


def test_no_rows_at_all():
    student = torch.randn(0, D, requires_grad=True)
    dropin.jsd_loss(student, torch.randn(0, D), 0.5).backward()
    assert student.grad.shape == (0, D)


def test_half_precision_and_padding():
    student, teacher = logits(torch.bfloat16)
    assert original.jsd_loss(student, teacher, 0.5).dtype == torch.bfloat16
    assert dropin.jsd_loss(student, teacher, 0.5).dtype == torch.float32
    student, teacher = logits()
    student[:, 30:] = teacher[:, 30:] = -torch.inf
    assert original.jsd_loss(student, teacher, 0.0).isnan()
    torch.testing.assert_close(
        dropin.jsd_loss(student, teacher, 0.0), original.jsd_loss(student[:, :30], teacher[:, :30], 0.0)
    )


def test_patch_and_functions_of_ones_own():
    student, teacher = logits()
    seen = []
    doubled = lambda z: seen.append(len(z)) or (2 * z).log_softmax(-1)  # noqa: E731
    theirs, before = original.jsd_loss(student, teacher, 0.3, doubled, chunk_size=5), original.jsd_loss
    with dropin.patch():
        assert original.jsd_loss is dropin.jsd_loss
        seen.clear()
        assert torch.equal(original.jsd_loss(student, teacher, 0.3, doubled, chunk_size=5), theirs)
        assert seen == [5, 5, 4, 4]
        given = original.default_log_softmax, original.default_kl_div
        ours = original.jsd_loss(student, teacher, 0.3, *given)
    assert original.jsd_loss is before
    torch.testing.assert_close(ours, before(student, teacher, 0.3))


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("more", ["student", "teacher"])
def test_vocabularies_that_differ(more, beta):
    """Whose logits are missing gets the other's. A teacher's that are a student's have a gradient, and so it is theirs."""
    sizes = (D, D - 5) if more == "student" else (D - 5, D)
    student, teacher = (2 * torch.randn(1, N, size) for size in sizes)
    labels = torch.where(torch.arange(N) % 3 == 0, -100, 1)[None]
    told = original.TeacherOutput(full_logits=teacher, labels=labels)
    call = lambda s: original.gkd_loss(s, told, labels, beta, 1.5)[0]  # noqa: E731
    theirs = outcome(call, [student])
    with dropin.patch():
        assert_same(outcome(call, [student]), theirs, 3e-5)


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(dropin._PATCHES, "tested", ((5, 0), (5, 1)))
    with pytest.raises(
        RuntimeError, match="integrations.swift is tested with ms-swift >=5.0,<5.1 and ms-swift 4.6"
    ):
        dropin.patch()
