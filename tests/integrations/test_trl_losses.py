"""Each loss beside TRL's own: the same signature, values and gradients; every difference asserted."""

import inspect
import warnings

import pytest
import torch
from compare import assert_same, outcome, relative
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels as kd
from kdkernels.integrations import trl as dropin

pytest.importorskip("trl")
from trl.trainer.distillation_trainer import _chunked_divergence_loss as their_chunked  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "experimental"
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.gold import GOLDTrainer

their_gkd, their_gold = GKDTrainer.generalized_jsd_loss, GOLDTrainer.generalized_jsd_loss

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
B, T, V = 3, 4, 37
FP32, FP64 = 3e-5, 1e-11


def logits(dtype=torch.float64):
    return [(3 * torch.randn(B, T, V)).to(dtype) for _ in range(2)]


def masked(*, all_of_it=False):
    labels = torch.randint(0, V, (B, T))
    labels[torch.rand(B, T) < (2.0 if all_of_it else 0.4)] = -100
    return labels


def heads(dtype=torch.float32, *, bias=False):
    """(student hidden, student weight[, bias]), teacher's of another width, and a mask."""
    student = [torch.randn(B, T, 16), torch.randn(V, 16)] + [torch.randn(V)] * bias
    teacher = [torch.randn(B, T, 24), torch.randn(V, 24)] + [torch.randn(V)] * bias
    return [x.to(dtype) for x in student], [x.to(dtype) for x in teacher], torch.rand(B, T) < 0.6


def chunked(function, student, teacher, mask, beta, **options):
    def call(hidden, weight, bias=None):
        return function(
            hidden,
            teacher[0],
            weight,
            teacher[1],
            mask,
            beta,
            student_lm_head_bias=bias,
            teacher_lm_head_bias=teacher[2] if len(teacher) > 2 else None,
            **options,
        )

    return outcome(call, student)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.5},
        {"num_items_in_batch": 29},
        {"num_items_in_batch": torch.tensor(29.0)},
        {"student_logit_scale": 0.25, "teacher_logit_scale": 0.5},
        {"student_final_logit_softcapping": 5.0, "teacher_final_logit_softcapping": 7.0, "temperature": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_divergence(beta, options, bias):
    student, teacher, mask = heads(bias=bias)
    ours, theirs = (
        chunked(f, student, teacher, mask, beta, **options)
        for f in (dropin.chunked_divergence_loss, their_chunked)
    )
    assert_same(ours, theirs, FP32)
    assert ours[0][1] > 0 and ours[0][2] == mask.sum() and ours[0][2].dtype == theirs[0][2].dtype


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_chunked_divergence_masks(mask_dtype):
    student, teacher, mask = heads()
    ours, theirs = (
        chunked(f, student, teacher, mask.to(mask_dtype), 0.5)
        for f in (dropin.chunked_divergence_loss, their_chunked)
    )
    assert_same(ours, theirs, FP32)
    poisoned = [torch.where(mask[..., None], student[0], torch.inf), student[1]]
    again = chunked(dropin.chunked_divergence_loss, poisoned, teacher, mask, 0.5)
    assert_same(again, ours, FP32)


@pytest.mark.parametrize("items", [None, 7])
def test_chunked_divergence_all_masked(items):
    student, teacher, mask = heads()
    ours, theirs = (
        chunked(f, student, teacher, mask & False, 0.5, num_items_in_batch=items)
        for f in (dropin.chunked_divergence_loss, their_chunked)
    )
    assert_same(ours, theirs, 0.0, zero_gradient=True)


def test_chunked_divergence_frozen_head_and_master_weights():
    (hidden, weight), (t_hidden, t_weight), mask = heads()
    hidden, t_hidden = hidden.bfloat16().requires_grad_(), t_hidden.bfloat16()
    loss, *_ = dropin.chunked_divergence_loss(hidden, t_hidden, weight, t_weight, mask, 0.5)
    loss.backward()
    assert weight.grad is None and hidden.grad.dtype == torch.bfloat16
    weight.requires_grad_()
    dropin.chunked_divergence_loss(hidden, t_hidden, weight, t_weight, mask, 0.5)[0].backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.norm() > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_chunked_divergence_under_autocast(beta):
    student, teacher, mask = heads()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (
            chunked(f, student, teacher, mask, beta) for f in (dropin.chunked_divergence_loss, their_chunked)
        )
    assert ours[0][0].dtype == theirs[0][0].dtype == torch.float32
    assert_same(ours, theirs, 0.05)


CASES = [
    dict(reduction=r, num_items_in_batch=n)
    for r in ("batchmean", "sum", "mean", "none")
    for n in (None, 11, torch.tensor(11))
]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_generalized_jsd(beta, labelled, case):
    student, teacher = logits()
    options = dict(labels=masked() if labelled else None, beta=beta, temperature=1.7, **case)
    pairs = [(dropin.generalized_jsd_loss, their_gkd), (dropin.gold_generalized_jsd_loss, their_gold)]
    for ours, theirs in pairs:
        assert_same(
            outcome(ours, [student], teacher, **options), outcome(theirs, [student], teacher, **options), FP64
        )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    beta=st.floats(0, 1),
    temperature=st.floats(0.3, 8),
    scale=st.floats(0.1, 30),
    shape=st.sampled_from([(1, 1, 2), (2, 3, 5), (7, 65), (2, 1, 129)]),
)
def test_generalized_jsd_over_random_inputs(seed, beta, temperature, scale, shape):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "st")
    labels = torch.where(torch.rand(shape[:-1], generator=generator) < 0.3, -100, 1)
    options = dict(labels=labels, beta=beta, temperature=temperature)
    (value,), (gradient,) = outcome(dropin.generalized_jsd_loss, [student], teacher, **options)
    (their_value,), (their_gradient,) = outcome(their_gkd, [student], teacher, **options)
    # TRL's terms cancel at the scale of the logits, and its log(1 - beta) near the ends of beta.
    room = 1e-9 * (1 + scale / temperature)
    assert abs(value - their_value) <= room
    assert (gradient - their_gradient).norm() <= room


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gold_on_probabilities(beta, labelled, case):
    """ULD's rows are parts of distributions, with entries below the clamp of 1e-8."""
    student, teacher = (z.softmax(-1)[..., :20] * 0.9 for z in logits())
    student[..., 0], teacher[..., 1] = 0.0, 1e-12
    options = dict(labels=masked() if labelled else None, beta=beta, logits_are_probs=True, **case)
    assert_same(
        outcome(dropin.gold_generalized_jsd_loss, [student], teacher, **options),
        outcome(their_gold, [student], teacher, **options),
        1e-9,
    )


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_all_masked_is_zero_as_theirs(reduction):
    student, teacher = logits()
    options = dict(labels=masked(all_of_it=True), reduction=reduction)
    assert_same(
        outcome(dropin.generalized_jsd_loss, [student], teacher, **options),
        outcome(their_gkd, [student], teacher, **options),
        0.0,
        zero_gradient=True,
    )


def test_difference_all_masked_mean_is_not_nan():
    student, teacher = logits()
    options = dict(labels=masked(all_of_it=True), reduction="mean")
    (ours,), (gradient,) = outcome(dropin.generalized_jsd_loss, [student], teacher, **options)
    assert ours == 0 and not gradient.any()
    assert outcome(their_gkd, [student], teacher, **options)[0][0].isnan()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_difference_half_precision_rows_are_fp32(beta):
    """bf16 logits: both against the fp64 result on the same rounded logits."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(64, 2048, generator=generator)
    student = teacher + 0.3 * torch.randn(64, 2048, generator=generator)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    truth = outcome(their_gkd, [student.double()], teacher.double(), beta=beta)
    ours = outcome(dropin.generalized_jsd_loss, [student], teacher, beta=beta)
    theirs = outcome(their_gkd, [student], teacher, beta=beta)
    assert ours[0][0].dtype == torch.float32 and theirs[0][0].dtype == torch.bfloat16
    assert relative(ours[0][0], truth[0][0]) < 1e-5 and relative(ours[1][0], truth[1][0]) < 3e-3
    assert relative(theirs[1][0], truth[1][0]) > 3 * relative(ours[1][0], truth[1][0])


def test_difference_refusals():
    student, teacher = logits()
    with pytest.raises(ValueError, match="vocabulary"):
        dropin.generalized_jsd_loss(student[..., :5], teacher)
    with pytest.raises(ValueError, match="beta"):
        dropin.generalized_jsd_loss(student, teacher, beta=1.5)
    with pytest.raises(ValueError, match="num_items"):
        dropin.generalized_jsd_loss(student, teacher, num_items_in_batch=0)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_minillm_single_step(reduction, with_mask):
    """TRL 1.16 has no MiniLLM any more: beside the formula of its 1.14, F.kl_div on log-probabilities."""
    student, teacher = logits()
    mask = masked() != -100 if with_mask else None

    def formula(s):
        s, t = s.log_softmax(-1), teacher.log_softmax(-1)
        terms = torch.nn.functional.kl_div(t, s, reduction="none", log_target=True)
        terms = terms if mask is None else terms[mask]
        by_batch = terms.sum() / (mask.sum() if with_mask else terms.shape[0])
        return {"batchmean": by_batch, "sum": terms.sum(), "mean": terms.mean(), "none": terms}[reduction]

    for they in (teacher, teacher.log_softmax(-1)):
        ours = outcome(
            lambda s, t=they: dropin.minillm_single_step_loss(None, s.log_softmax(-1), t, mask, reduction),
            [student],
        )
        assert_same(ours, outcome(formula, [student]), FP64)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (dropin.chunked_divergence_loss, their_chunked),
        (dropin.generalized_jsd_loss, their_gkd),
        (dropin.gold_generalized_jsd_loss, their_gold),
    ],
    ids=["distillation", "gkd", "gold"],
)
def test_signatures(ours, theirs):
    ours, theirs = (
        [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]
        for f in (ours, theirs)
    )
    assert ours == theirs


def test_a_zeroed_gradient_is_seen(monkeypatch):
    student, teacher = logits()
    theirs = outcome(their_gkd, [student], teacher)
    values, gradients = outcome(dropin.generalized_jsd_loss, [student], teacher)
    with pytest.raises(AssertionError):
        assert_same((values, [0 * g for g in gradients]), theirs, FP64)
    monkeypatch.setattr(
        dropin, "js_divergence", lambda *sides, mask, **rest: kd.js_divergence(*sides, **rest)
    )
    with pytest.raises(AssertionError):
        test_generalized_jsd(0.5, True, CASES[0])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_difference_bf16_heads_on_a_cpu(beta):
    """TRL multiplies a bf16 model's hidden states in fp32; here, as in the model's own lm_head, the
    logits are rounded to bf16 (on a GPU they are fp32 on both sides)."""
    student, teacher, mask = heads(torch.bfloat16)
    wide = [x.double() for x in student], [x.double() for x in teacher]
    truth = chunked(dropin.chunked_divergence_loss, *wide, mask, beta)
    ours = chunked(dropin.chunked_divergence_loss, student, teacher, mask, beta)
    theirs = chunked(their_chunked, student, teacher, mask, beta)
    assert relative(theirs[0][0], truth[0][0]) < 1e-5 < relative(ours[0][0], truth[0][0]) < 2e-2
    for mine, their, true in zip(ours[1], theirs[1], truth[1]):
        assert relative(mine, true) < 3e-2 and relative(their, true) < 1e-2


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gold_probabilities_keep_a_rare_tokens_gradient(beta):
    """A token that the student all but rules out and the teacher does not: p / q = 1e6 must not cost digits."""
    student = torch.tensor([[[1e-6, 0.5, 0.499999]]])
    teacher = torch.tensor([[[0.4, 0.3, 0.3]]])
    options = dict(beta=beta, logits_are_probs=True)
    ours = outcome(dropin.gold_generalized_jsd_loss, [student], teacher, **options)
    truth = outcome(their_gold, [student.double()], teacher.double(), **options)
    torch.testing.assert_close(ours[1][0].double(), truth[1][0], rtol=1e-5, atol=1e-7)
    assert truth[1][0][0, 0, 0] < -0.1
