"""Liger's scaled cross entropy on hidden states beside its own, whose torch form runs where no GPU is."""

import pytest
import torch
from compare import assert_same, outcome
from source import load

from kdkernels.integrations import liger as dropin

original = load("liger-kernel", "liger_kernel/ops/fused_linear_scaled_cross_entropy.py")
M, H, V = 11, 12, 53
FUNCTIONS = (
    dropin.LigerFusedLinearScaledCrossEntropyFunction,
    original.LigerFusedLinearScaledCrossEntropyFunction,
)


def batch(dtype=torch.float32):
    target = torch.randint(0, V, (M,))
    target[torch.rand(M) < 0.3] = -100
    return torch.randn(M, H, dtype=dtype), torch.randn(V, H, dtype=dtype), target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("selected", [None, [5, 0, 5, 52]], ids=["no ids", "ids"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_output(temperature, selected, entropy, dtype):
    """Liger's arithmetic is fp32 whatever the hidden states are."""
    hidden, weight, target = batch(dtype)
    ids = None if selected is None else torch.tensor(selected)

    def call(function):
        def loss(h, w):
            made = function.apply(h, w, target, temperature, return_entropy=entropy, selected_token_ids=ids)
            made = made if isinstance(made, tuple) else (made,)
            assert len(made) == 1 + entropy + (selected is not None)
            torch.manual_seed(5)
            weights = [torch.randn(value.shape) for value in made]
            return sum((value * w).sum() for value, w in zip(made, weights)), *(v.double() for v in made)

        return outcome(loss, [hidden, weight])

    ours, theirs = map(call, FUNCTIONS)
    assert_same(ours, theirs, 3e-5)
    assert all(not value[target == -100].any() for value in ours[0][1:])


def test_a_selected_id_may_be_the_ignored_label():
    hidden, weight, target = batch()
    target, ids = torch.where(target == -100, 0, target.clamp(min=1)), torch.tensor([4, 0, 2])
    call = lambda f: lambda h, w: f.apply(h, w, target, 1.3, 0, selected_token_ids=ids)[::-1]  # noqa: E731
    ours, theirs = (outcome(call(f), [hidden, weight]) for f in FUNCTIONS)
    assert_same(ours, theirs, 3e-5)
    assert not ours[0][0][target == 0].any() and ours[0][0][target != 0, 1].all()


@pytest.mark.parametrize("bad", [-1, -100])
def test_an_id_below_0_is_none(bad):
    """To kd.token_log_probs -1 is no id."""
    hidden, weight, target = batch()
    target = target.clamp(min=0)
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match="target contains|found"):
            function.apply(hidden, weight, target.index_fill(0, torch.tensor([3]), bad), ignore_index=7)
        with pytest.raises(ValueError, match=r"\[0, 53\)|found"):
            function.apply(hidden, weight, target, selected_token_ids=torch.tensor([bad, 2]))


def test_another_ignored_label_and_half_precision():
    hidden, weight, target = batch()
    target = torch.where(target == -100, 7, target)
    results = [
        outcome(lambda h, w, f=f: f.apply(h, w, target, ignore_index=7), [hidden, weight]) for f in FUNCTIONS
    ]
    assert_same(*results, 3e-5)
    half = [f.apply(hidden.bfloat16(), weight.bfloat16(), target, return_entropy=True) for f in FUNCTIONS]
    assert [value.dtype for values in half for value in values] == [torch.float32] * 3 + [torch.bfloat16]
