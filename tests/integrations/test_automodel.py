"""NeMo Automodel's KDLoss beside its own; on many ranks in test_shards.py."""

import inspect

import pytest
import torch
from compare import assert_same, outcome
from source import load

from kdkernels.integrations import automodel as dropin

original = load("nemo-automodel", "nemo_automodel/components/loss/kd_loss.py")
LABELS = torch.tensor([[1, -100, 2, 5], [3, 4, -100, 900], [-100, 0, 7, 6]])


def logits(dtype=torch.float64):
    return [(2 * torch.randn(3, 4, 29)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.5}, {"chunk_size": 2}, {"ignore_index": 3}], ids=str
)
@pytest.mark.parametrize("num_batch_labels", [None, 17])
@pytest.mark.parametrize("flat", [False, True])
def test_kd_loss(options, num_batch_labels, flat):
    student, teacher = logits()
    labels = LABELS.flatten() if flat else LABELS
    options = {"fp32_upcast": False} | options
    if options.get("chunk_size"):  # theirs is then in fp32
        student, teacher = student.float(), teacher.float()
    ours, theirs = (
        outcome(m.KDLoss(**options), [student], teacher, labels, num_batch_labels) for m in (dropin, original)
    )
    assert_same(ours, theirs, 1e-6)


def test_half_precision():
    """Rows in fp32, the gradient in the logits' dtype: theirs to its rounding."""
    student, teacher = logits(torch.bfloat16)
    ours, theirs = (outcome(m.KDLoss(), [student], teacher, LABELS) for m in (dropin, original))
    assert ours[1][0].dtype == torch.bfloat16
    assert_same(ours, theirs, 4e-3)


def test_padding_and_nothing_to_learn():
    student, teacher = logits()
    teacher[..., 20:] = -torch.inf
    ours, theirs = (
        outcome(m.KDLoss(), [student.float()], teacher.float(), LABELS) for m in (dropin, original)
    )
    assert_same(ours, theirs, 1e-6)
    masked = torch.full_like(LABELS, -100)
    (value,), (gradient,) = outcome(dropin.KDLoss(), [student], teacher, masked)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("nothing", [0, 0.0, torch.tensor(0)])
def test_nothing_to_divide_by(nothing):
    """Theirs is 0 where no token counts, and infinite where one does."""
    student, teacher = logits()
    masked = torch.full_like(LABELS, -100)
    ours, theirs = (outcome(m.KDLoss(), [student], teacher, masked, nothing) for m in (dropin, original))
    assert_same(ours, theirs, 0, zero_gradient=True)
    assert original.KDLoss()(student, teacher, LABELS, nothing).isinf()
    with pytest.raises(ValueError, match="num_items must be > 0 where any token counts"):
        dropin.KDLoss()(student, teacher, LABELS, nothing)


@pytest.mark.parametrize("flat", ["student", "teacher"])
def test_one_side_may_be_flat(flat):
    student, teacher = logits()
    student, teacher = (
        z.flatten(0, 1) if name == flat else z for name, z in (("student", student), ("teacher", teacher))
    )
    ours, theirs = (outcome(m.KDLoss(), [student], teacher, LABELS) for m in (dropin, original))
    assert_same(ours, theirs, 1e-6)


def test_the_signatures_are_theirs():
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(m.KDLoss, method)) for m in (dropin, original))
        assert [(p.name, p.default) for p in ours.parameters.values()] == [
            (p.name, p.default) for p in theirs.parameters.values()
        ]
