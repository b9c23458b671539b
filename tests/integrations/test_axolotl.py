"""axolotl's top-k loss beside its own: where axolotl is right the same, and where it is wrong by how much."""

import importlib.metadata
import inspect
from types import SimpleNamespace

import pytest
import torch
from compare import assert_same, outcome, relative

from benchmarks.peers.axolotl import axolotl_module
from kdkernels.integrations import axolotl as dropin

pytest.importorskip("liger_kernel")
try:
    original = axolotl_module().LigerFusedLinearKLTopKLogprobLoss
except importlib.metadata.PackageNotFoundError:
    pytest.skip("axolotl is not installed", allow_module_level=True)

B, N, K, V, H = 2, 5, 6, 43, 16


def batch(dtype=torch.float64, *, masked=True):
    """Slots are all or none of a token's, as axolotl's collator pads, unless a test says otherwise."""
    hidden, weight, bias = torch.randn(B, N, H), torch.randn(V, H), torch.randn(V)
    top = (2 * torch.randn(B, N, V)).log_softmax(-1).topk(K, -1)
    labels = torch.randint(0, V, (B, N))
    labels[:, :2] = -100
    mask = torch.ones(B, N, K)
    if masked:
        mask[:, -1] = 0
    return (
        [x.to(dtype) for x in (hidden, weight, bias)],
        top.indices,
        top.values.log_softmax(-1),
        mask,
        labels,
    )


def run(cls, given, *, bias=True, **options):
    leaves, ids, logprobs, mask, labels = given
    loss = cls(compiled=False, **options)

    def call(hidden, weight, bias=None):
        return loss(weight, hidden, ids, logprobs, mask, labels, bias)

    return outcome(call, leaves if bias else leaves[:2])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.3, 0.9)])
@pytest.mark.parametrize("bias", [True, False])
def test_as_theirs_at_temperature_one(beta, weights, bias):
    given = batch()
    options = dict(weight_hard_loss=weights[0], weight_soft_loss=weights[1], beta=beta, bias=bias)
    assert_same(
        run(dropin.LigerFusedLinearKLTopKLogprobLoss, given, **options), run(original, given, **options), 2e-6
    )


def test_without_renormalizing():
    given = batch()
    options = dict(beta=0.0, normalize_topk=False, weight_hard_loss=0.0, weight_soft_loss=1.0)
    assert_same(
        run(dropin.LigerFusedLinearKLTopKLogprobLoss, given, **options), run(original, given, **options), 2e-6
    )
    with pytest.raises(ValueError, match="ForwardKL"):
        run(dropin.LigerFusedLinearKLTopKLogprobLoss, given, beta=0.5, normalize_topk=False)


@pytest.mark.parametrize("normalize_topk", [True, False])
@pytest.mark.parametrize("temperature", [2.0, 3.0])
def test_difference_t_squared_is_on_the_gradient(temperature, normalize_topk):
    """The same loss; axolotl's gradient of the soft term is smaller by T^2."""
    given = batch()
    options = dict(
        temperature=temperature,
        beta=0.0,
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        normalize_topk=normalize_topk,
    )
    ours = run(dropin.LigerFusedLinearKLTopKLogprobLoss, given, **options)
    values, gradients = run(original, given, **options)
    assert_same(ours, (values, [g * temperature**2 for g in gradients]), 2e-6)
    # And the difference quotient of its own loss says who is right.
    (hidden, *head), step = given[0], 3e-3
    ahead, behind = ([hidden + sign * step * ours[1][0] / ours[1][0].norm(), *head] for sign in (1, -1))
    rise = (
        run(original, (ahead, *given[1:]), **options)[0][0]
        - run(original, (behind, *given[1:]), **options)[0][0]
    )
    assert rise / (2 * step) == pytest.approx(ours[1][0].norm().item(), rel=5e-3)


def test_difference_padding_slots_take_no_part():
    """A token with empty slots: what ids they hold changes axolotl's loss, and not ours."""
    given = batch(masked=False)
    leaves, ids, logprobs, mask, labels = given
    mask[..., -2:] = 0
    logprobs = logprobs.masked_fill(mask == 0, -torch.inf).log_softmax(-1)
    other = torch.where(mask == 0, (ids + 1) % V, ids)
    options = dict(beta=0.0, weight_hard_loss=0.0, weight_soft_loss=1.0)
    ours, theirs = (
        [run(cls, (leaves, i, logprobs, mask, labels), **options) for i in (ids, other)]
        for cls in (dropin.LigerFusedLinearKLTopKLogprobLoss, original)
    )
    assert_same(ours[0], ours[1], 1e-12)
    assert relative(theirs[0][0][0], theirs[1][0][0]) > 1e-2
    cut = run(original, (leaves, ids[..., :-2], logprobs[..., :-2], mask[..., :-2], labels), **options)
    assert_same(ours[0], cut, 2e-6)


def test_signature():
    for method in ("__init__", "forward"):
        ours, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(cls, method)).parameters.values()]
            for cls in (dropin.LigerFusedLinearKLTopKLogprobLoss, original)
        )
        assert ours == theirs


def test_replace():
    trainer = SimpleNamespace(_kd_loss_fn=original(0.25, 0.75, 2.0, 0.0, normalize_topk=False))
    dropin.replace(trainer)
    ours = trainer._kd_loss_fn
    assert isinstance(ours, dropin.LigerFusedLinearKLTopKLogprobLoss)
    assert (
        ours.weight_hard_loss,
        ours.weight_soft_loss,
        ours.temperature,
        ours.beta,
        ours.normalize_topk,
    ) == (0.25, 0.75, 2.0, 0.0, False)
    with pytest.raises(TypeError, match="_kd_loss_fn"):
        dropin.replace(SimpleNamespace())
    with pytest.raises(ValueError, match="temperature"):
        dropin.LigerFusedLinearKLTopKLogprobLoss(temperature=0.0)
    with pytest.raises(ValueError, match="loss weights"):
        dropin.LigerFusedLinearKLTopKLogprobLoss(weight_hard_loss=2.0)
