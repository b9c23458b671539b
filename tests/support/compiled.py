"""A function beside itself compiled: every value and every gradient."""

from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves


@contextmanager
def unwritten_memory_is_nan():
    """What an operator leaves unwritten would else hold what the last run of the same numbers left there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def outcome(function, leaves):
    """(values, gradients of their weighted sum); the weights make what arrives at each one its own."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    values = tree_leaves(function(*leaves))
    loss = sum((i + 2) * value.sum() for i, value in enumerate(v for v in values if v.requires_grad))
    return [value.detach() for value in values], torch.autograd.grad(loss, leaves)


def assert_compiled(
    function, leaves, *, backend="aot_eager", fullgraph=True, dynamic=None, around=lambda function: function
):
    """``around`` is what is done to either function that is not to be compiled."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=fullgraph, dynamic=dynamic)
    with unwritten_memory_is_nan():
        values, gradients = outcome(around(compiled), leaves)
    their_values, their_gradients = outcome(around(function), leaves)
    assert len(values) == len(their_values)
    for mine, theirs in zip([*values, *gradients], [*their_values, *their_gradients]):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)
    for theirs in their_gradients:
        assert theirs.norm() > 1e-4, "nothing to compare with"
