"""DistillKit is not on PyPI: its losses are beside what its formulas say, written out on full logits."""

import enum
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, outcome, relative

from kdkernels.integrations import distillkit as dropin

B, T, K, V = 2, 5, 4, 31


def batch(*, log_target=True):
    student, teacher = (2 * torch.randn(B, T, V, dtype=torch.float64) for _ in range(2))
    top = (teacher.log_softmax(-1) if log_target else teacher).float().topk(K, -1)
    mask = torch.rand(B, T, 1) < 0.7
    return student, top.indices, top.values, mask


def formula(logits, ids, values, mask, *, missing, temperature=1.0, teacher_at=1.0, student_at=1.0):
    log_q = (logits * student_at / temperature).log_softmax(-1).gather(-1, ids)
    powers = values.double() * teacher_at / temperature
    if missing == "zero":
        log_p = powers.log_softmax(-1)
        rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        rest = (1 - values.double().exp().sum(-1, keepdim=True)) ** (teacher_at / temperature)
        log_p = torch.cat([powers, rest.log()], -1).log_softmax(-1)
        log_q = torch.cat([log_q, torch.log1p(-log_q.exp().sum(-1, keepdim=True))], -1)
        rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    return rows[mask[..., 0]].sum()


@pytest.mark.parametrize("missing", ["zero", "symmetric_uniform"])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (2.0, 2.0, 1.0), (1.5, 1.0, 3.0)])
def test_sparse_kl_div(missing, temperatures):
    student, ids, values, mask = batch()
    temperature, teacher_at, student_at = temperatures
    ours = outcome(
        dropin.sparse_kl_div,
        [student],
        ids,
        values,
        mask,
        missing=missing,
        temperature=temperature,
        target_generation_temperature=teacher_at,
        student_generation_temperature=student_at,
    )
    theirs = outcome(
        formula,
        [student],
        ids,
        values,
        mask,
        missing=missing,
        temperature=temperature,
        teacher_at=teacher_at,
        student_at=student_at,
    )
    assert_same(ours, theirs, 3e-6)


@pytest.mark.parametrize("missing", ["zero", "symmetric_uniform"])
def test_difference_half_precision_is_tempered_in_fp32(missing):
    """Logits / temperature in bf16 would move them by 2^-9 of their size."""
    student, ids, values, mask = batch()
    student = (10 * student).bfloat16()
    options = dict(missing=missing, temperature=3.0)
    ours = outcome(dropin.sparse_kl_div, [student], ids, values, mask, **options)
    truth = outcome(formula, [student.double()], ids, values, mask, **options)
    assert relative(ours[0][0], truth[0][0]) < 1e-5 and relative(ours[1][0], truth[1][0]) < 2**-8


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teacher_logits(temperature):
    student, ids, values, mask = batch(log_target=False)
    ours = outcome(
        dropin.sparse_kl_div, [student], ids, values, mask[..., 0], log_target=False, temperature=temperature
    )
    assert_same(
        ours, outcome(formula, [student], ids, values, mask, missing="zero", temperature=temperature), 1e-6
    )
    with pytest.raises(ValueError, match="missing='zero'"):
        dropin.sparse_kl_div(student, ids, values, log_target=False, missing="symmetric_uniform")
    with pytest.raises(ValueError, match="missing must be one of"):
        dropin.sparse_kl_div(student, ids, values, missing="uniform")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_mass_that_rounding_made_too_large(temperature):
    """As bf16 stores it: no error, and the loss of what was rounded."""
    teacher = 6 * torch.randn(1, 64, V, dtype=torch.float64)
    student, (exact, ids) = torch.randn(1, 64, V), teacher.log_softmax(-1).topk(20, -1)
    stored, mask = exact.bfloat16(), torch.ones(1, 64, 1, dtype=torch.bool)
    assert (stored.float().exp().sum(-1) > 1.001).any()
    options = dict(missing="symmetric_uniform", temperature=temperature)
    ours = outcome(dropin.sparse_kl_div, [student], ids, stored, **options)
    truth = outcome(formula, [student.double()], ids, exact, mask, **options)
    assert_same(ours, truth, 2e-2)
    ids, values = torch.tensor([[[3, 5]]]), torch.tensor([[[0.6, 0.49]]]).log()
    assert dropin.sparse_kl_div(student[:, :1], ids, values, **options).isfinite()
    with pytest.raises(ValueError, match="sum to at most 1, but they sum to 1.11 at"):
        dropin.sparse_kl_div(student[:, :1], ids, torch.tensor([[[0.6, 0.51]]]).log(), **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nothing_is_missing_of_a_whole_vocabulary(temperature):
    student, teacher = torch.randn(B, T, V), 2 * torch.randn(B, T, V)
    values, ids = teacher.log_softmax(-1).topk(V, -1)
    options = dict(missing="symmetric_uniform", temperature=temperature)
    ours = outcome(dropin.sparse_kl_div, [student], ids, values.bfloat16(), **options)
    assert_same(ours, outcome(dropin.dense_kl_div, [student], teacher, temperature=temperature), 2e-2)
    with pytest.raises(ValueError, match="sum to at most 1"):
        dropin.sparse_kl_div(student, ids, values + 0.2, **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_as_many_slots_as_tokens_of_which_some_are_empty(temperature):
    """What is not stored is missing, however many slots there are: in some rows, or in all."""
    student = torch.randn(B, T, V)
    values, ids = torch.randn(B, T, V).log_softmax(-1).topk(V, -1)
    values[1, :, K:] = -torch.inf
    options = dict(missing="symmetric_uniform", temperature=temperature)
    both = dropin.sparse_kl_div(student, ids, values, **options)
    whole = dropin.sparse_kl_div(student[:1], ids[:1], values[:1], **options)
    partial = dropin.sparse_kl_div(student[1:], ids[1:, :, :K], values[1:, :, :K], **options)
    assert relative(both, whole + partial) < 1e-6


@pytest.mark.parametrize("missing", ["zero", "symmetric_uniform"])
@pytest.mark.parametrize(
    "name", ["temperature", "target_generation_temperature", "student_generation_temperature"]
)
def test_a_temperature_of_nothing(name, missing):
    student, ids, values, mask = batch()
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
        dropin.sparse_kl_div(student, ids, values, mask, missing=missing, **{name: 0.0})


def test_difference_every_tail_counts():
    """A teacher that stored all but 1e-7, and a student with half its mass elsewhere: DistillKit drops
    the tail's term (its eps is 1e-6); what is left is the kept entry's."""
    logits = torch.tensor([[[0.0, 0.0]]], dtype=torch.float64)
    ids, values = torch.tensor([[[0]]]), torch.tensor([[[1 - 1e-7]]], dtype=torch.float64).log().float()
    p = values.double().exp()
    exact = (p * (p / 0.5).log() + (1 - p) * ((1 - p) / 0.5).log()).sum()
    ours = dropin.sparse_kl_div(logits, ids, values, missing="symmetric_uniform")
    assert relative(ours, exact) < 1e-6
    theirs = (p * (p / 0.5).log()).sum()
    assert abs(theirs - exact) > 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dense_kl_div(temperature):
    student, teacher = (2 * torch.randn(B, T, V, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(B, T, 1) < 0.7

    def plain(s):
        log_q, log_p = ((z / temperature).log_softmax(-1) for z in (s, teacher))
        return (F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * mask[..., 0]).sum()

    assert_same(
        outcome(dropin.dense_kl_div, [student], teacher, mask, temperature), outcome(plain, [student]), 1e-11
    )


class Missing(enum.Enum):
    """As DistillKit's enum is."""

    ZERO = "zero"
    SYMMETRIC_UNIFORM = "symmetric_uniform"


@pytest.mark.parametrize("items", [None, 17])
@pytest.mark.parametrize("masked", [True, False])
def test_loss_class(items, masked):
    student, ids, values, mask = batch()
    mask = mask if masked else None
    loss = dropin.KLDLoss(temperature=2.0, missing_probability_handling=Missing.SYMMETRIC_UNIFORM)
    assert loss.name() == "kl" and not loss.requires_hidden_states()
    count = items or (mask.sum() if masked else B * T)
    every = mask if masked else torch.ones(B, T, 1, dtype=torch.bool)
    signal = SimpleNamespace(
        sparse_ids=ids, sparse_values=values, log_values=True, generation_temperature=1.0
    )
    ours = outcome(
        lambda s: loss(SimpleNamespace(logits=s), signal, mask, num_items_in_batch=items), [student]
    )
    theirs = outcome(
        lambda s: 4 * formula(s, ids, values, every, missing="bucket", temperature=2.0) / count, [student]
    )
    assert_same(ours, theirs, 3e-6)
    dense = outcome(
        lambda s: loss(
            SimpleNamespace(logits=s), SimpleNamespace(logits=2 * student), mask, num_items_in_batch=items
        ),
        [student],
    )
    plain = outcome(lambda s: 4 * dropin.dense_kl_div(s, 2 * student, mask, 2.0) / count, [student])
    assert_same(dense, plain, 1e-12)
