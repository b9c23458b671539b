"""speculators' losses of draft models beside its own, loaded file by file: its package wants servers and codecs."""

import sys
import types

import pytest
import torch
from compare import assert_same, outcome, relative
from source import load

import kdkernels as kd
from kdkernels.integrations import speculators as dropin

eager = load("speculators", "speculators/losses/eager.py")
NAMES = [
    "kl_div_loss",
    "reverse_kl_div_loss",
    "js_div_loss",
    "ce_loss",
    "tv_loss",
    "neg_log_acceptance_loss",
    "lk_hybrid_loss",
]


def batch(apart=1.0, tokens=9, vocab=97):
    targets = 2 * torch.randn(1, tokens, vocab)
    return targets + apart * torch.randn(1, tokens, vocab), targets


@pytest.fixture
def utils(monkeypatch):
    """speculators.losses.utils, whose package is only what it imports."""
    for name in ("speculators", "speculators.losses"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["speculators.losses"], "eager", eager, raising=False)
    module = load("speculators", "speculators/losses/utils.py")
    monkeypatch.setitem(sys.modules, "speculators.losses.utils", module)
    return module


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("apart", [0.3, 3.0])
def test_every_loss(name, apart):
    draft, targets = batch(apart)
    weights = torch.randn(1, 9)

    def weighed(loss):
        return outcome(
            lambda d: tuple((loss(d, targets) * w).sum() for w in (weights, weights.abs())), [draft]
        )

    assert_same(weighed(getattr(dropin, name)), weighed(getattr(eager, name)), 2e-5)
    each = getattr(dropin, name)(draft, targets)
    assert each.shape == (1, 9) and each.dtype == torch.float32
    torch.testing.assert_close(each, getattr(eager, name)(draft, targets), rtol=2e-5, atol=2e-6)


def test_lk_hybrids_eta():
    draft, targets = batch()
    ours, theirs = (
        outcome(hybrid, [draft], targets, eta=0.7) for hybrid in (dropin.lk_hybrid_loss, eager.lk_hybrid_loss)
    )
    assert_same(ours, theirs, 2e-5)


def test_an_acceptance_of_nearly_nothing_still_teaches():
    """Theirs stops at -log 1e-5, with a gradient of 0."""
    draft, targets = torch.zeros(1, 3, 50), torch.zeros(1, 3, 50)
    draft[..., ::2] = 30.0
    targets[..., 1::2] = 30.0
    losses = dropin.neg_log_acceptance_loss, eager.neg_log_acceptance_loss
    ours, theirs = (outcome(loss, [draft], targets) for loss in losses)
    assert not theirs[1][0].any()
    wide = draft.double().requires_grad_()
    p, q = targets.double().softmax(-1), wide.softmax(-1)
    exact = -torch.minimum(p, q).sum(-1).log().sum()
    assert relative(ours[1][0], torch.autograd.grad(exact, wide)[0]) < 1e-5
    assert abs(ours[0][0].sum() - exact.detach()) < 1e-3 and exact > 3 * 25


def test_nothing_in_common_spoils_no_batch(utils):
    """The overlap underflows, at a position that the mask takes out and at one that it does not."""
    draft, targets = batch(tokens=5)
    draft[0, :2], targets[0, :2] = torch.zeros(97), torch.zeros(97)
    draft[0, :2, 0] = targets[0, :2, 1] = 100.0
    mask, positions = torch.tensor([[0, 1, 1, 1, 1]]), torch.arange(5)[None]

    def masked():
        loss = utils.resolve_loss_config("nla", "eager")["nla"][0]
        return outcome(lambda d: utils.loss_function(d, targets, mask, positions, loss_fn=loss), [draft])

    (theirs,), (their_slope,) = masked()
    with dropin.patch():
        (ours,), (slope,) = masked()
    assert ours.isfinite() and ours > theirs
    torch.testing.assert_close(slope, their_slope)
    assert slope[0, 2:].norm() > 1e-3 and not slope[0, :2].any()


def test_the_target_is_a_constant():
    draft, targets = batch()
    loss = dropin.kl_div_loss(draft.requires_grad_(), targets.requires_grad_()).sum()
    (slope,) = torch.autograd.grad(loss, targets, allow_unused=True)
    assert slope is None
    assert torch.autograd.grad(eager.kl_div_loss(draft, targets).sum(), targets)[0].any()


def test_half_precision_is_taken_in_fp32():
    draft, targets = (x.bfloat16() for x in batch())
    assert eager.ce_loss(draft, targets).dtype == torch.bfloat16
    assert dropin.ce_loss(draft, targets).dtype == torch.float32


def test_patch_is_what_a_trainers_configuration_means(utils):
    before = {**utils._FUSED_LOSS_FN_MAP}, {**utils._EAGER_LOSS_FN_MAP}
    assert set(utils._FUSED_LOSS_FN_MAP) == set(dropin._LOSSES)
    draft, targets = batch()
    mask, positions = torch.rand(1, 9) > 0.4, torch.arange(9)[None] % 3
    mix = '{"ce": 0.1, "nla": 0.5, "lk_hybrid": 0.4}'

    def compound(implementation):
        config = utils.resolve_loss_config(mix, implementation)
        return outcome(lambda d: utils.compound_loss(d, targets, mask, positions, config)[0], [draft])

    theirs = compound("eager")
    with dropin.patch():
        for implementation in ("eager", "fused"):
            assert utils.resolve_loss_config("tv", implementation)["tv"][0] is dropin.tv_loss
            assert_same(compound(implementation), theirs, 2e-5)
    assert (utils._FUSED_LOSS_FN_MAP, utils._EAGER_LOSS_FN_MAP) == before
    dropin.unpatch()


def test_another_version_is_refused(utils, monkeypatch):
    monkeypatch.setattr(dropin._PATCHES, "tested", ((0, 10), (0, 11)))
    with pytest.raises(RuntimeError, match="tested with speculators >=0.10,<0.11 and speculators 0.9"):
        dropin.patch()
    monkeypatch.undo()


#: What its own suite asks of these losses, as cases of ours: a perfect draft, one without any overlap, a target that
#: is sure, and the same rows in another order.
def test_laws_of_acceptance():
    draft, targets = batch()
    for name in ("kl_div_loss", "reverse_kl_div_loss", "js_div_loss", "tv_loss", "neg_log_acceptance_loss"):
        assert getattr(dropin, name)(targets, targets).abs().max() < 1e-6
    sure = torch.full((1, 4, 6), -torch.inf)
    sure[..., 2] = 0.0
    logits = torch.randn(1, 4, 6)
    expected = -logits.log_softmax(-1)[..., 2]
    for name in ("kl_div_loss", "ce_loss", "neg_log_acceptance_loss"):
        torch.testing.assert_close(getattr(dropin, name)(logits, sure), expected)
    order = torch.randperm(97)
    for name in NAMES:
        mine = getattr(dropin, name)
        torch.testing.assert_close(mine(draft[..., order], targets[..., order]), mine(draft, targets))
    acceptance = kd.distillation_loss(draft, targets, divergence=kd.Overlap(), reduction="none")
    torch.testing.assert_close(dropin.neg_log_acceptance_loss(draft, targets).neg().exp(), acceptance)
    torch.testing.assert_close(1 - dropin.tv_loss(draft, targets), acceptance)
