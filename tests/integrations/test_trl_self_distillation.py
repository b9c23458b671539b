"""SDFT's and SDPO's losses beside TRL's own."""

import warnings

import pytest
import torch
from compare import assert_same, outcome

from kdkernels.integrations import trl as dropin

pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "experimental"
    from trl.experimental.sdft import loss_utils as sdft
    from trl.experimental.sdft import sdft_trainer
    from trl.experimental.sdpo import loss_utils as sdpo
    from trl.experimental.sdpo import sdpo_trainer

B, T, V = 3, 4, 37
ALPHAS = [0.0, 0.3, 1.0]


def logits(dtype=torch.float64):
    return [(2 * torch.randn(B, T, V)).to(dtype) for _ in range(2)]


def weighed(loss, student, teacher, **options):
    weights = torch.randn(B, T, dtype=student.dtype)
    return lambda s: ((loss(s, teacher, **options) * weights).sum(), loss(s, teacher, **options))


@pytest.mark.parametrize("theirs", [sdft, sdpo], ids=["sdft", "sdpo"])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("add_tail", [True, False])
def test_top_k(theirs, alpha, add_tail):
    student, teacher = logits()
    options = dict(distillation_topk=6, distillation_alpha=alpha, distillation_add_tail=add_tail)
    results = []
    for loss in (dropin.topk_self_distillation_loss, theirs.compute_topk_self_distillation_loss):
        torch.manual_seed(1)
        results.append(outcome(weighed(loss, student, teacher, **options), [student]))
    assert_same(*results, 1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 3e-5)])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_whole_vocabulary(alpha, dtype, tolerance):
    student, teacher = logits(dtype)
    results = []
    for loss in (dropin.full_logit_self_distillation_loss, sdft.compute_full_logit_self_distillation_loss):
        torch.manual_seed(1)
        results.append(outcome(weighed(loss, student, teacher, distillation_alpha=alpha), [student]))
    assert_same(*results, tolerance)


def test_a_tail_of_next_to_nothing_still_teaches():
    """TRL clamps what is kept to 1 - 1e-7: beyond, its tail is not the model's and has no gradient."""
    student = torch.zeros(1, 1, V, dtype=torch.float64)
    student[..., :2] = 40.0
    teacher = student.clone()
    teacher[..., 5] = 39.0
    options = dict(distillation_topk=2, distillation_alpha=0.0, distillation_add_tail=True)
    ours, theirs = (
        outcome(weighed(loss, student, teacher, **options), [student])[1][0]
        for loss in (dropin.topk_self_distillation_loss, sdpo.compute_topk_self_distillation_loss)
    )
    assert ours[0, 0, 2:].abs().sum() > 1e-2 and theirs[0, 0, 2:].abs().max() < 1e-15


def test_patch_reaches_both_trainers():
    with dropin.patch():
        for trainer in (sdft_trainer, sdpo_trainer):
            assert trainer.compute_topk_self_distillation_loss is dropin.topk_self_distillation_loss
            assert (
                trainer.compute_full_logit_self_distillation_loss is dropin.full_logit_self_distillation_loss
            )
    assert sdpo_trainer.compute_topk_self_distillation_loss is sdpo.compute_topk_self_distillation_loss
