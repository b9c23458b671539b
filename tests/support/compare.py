"""A drop-in beside the function that it replaces: same leaves, values and gradients compared."""

import torch


def outcome(function, leaves, *arguments, **options):
    """([values], [gradients of the first value for the leaves]); a value is a tensor of ``function``'s."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    values = function(*leaves, *arguments, **options)
    values = list(values) if isinstance(values, tuple) else [values]
    gradients = torch.autograd.grad(values[0].sum(), leaves, allow_unused=True, materialize_grads=True)
    return [value.detach() for value in values], gradients


def relative(ours, theirs):
    scale = theirs.double().norm().item()
    return (ours.double() - theirs.double()).norm().item() / max(scale, 1e-300)


def assert_same(ours, theirs, tolerance, *, zero_gradient=False):
    """Two outcomes agree; the gradient must be well away from zero unless it has to be zero."""
    (values, gradients), (their_values, their_gradients) = ours, theirs
    assert len(values) == len(their_values)
    for mine, their in zip(values, their_values):
        assert mine.shape == their.shape
        torch.testing.assert_close(mine.double(), their.double(), rtol=tolerance, atol=tolerance)
    for mine, their in zip(gradients, their_gradients):
        assert mine.shape == their.shape
        if zero_gradient:
            assert not mine.any() and not their.any()
        else:
            assert their.norm() > 1e-6, "nothing to compare with"
            assert relative(mine, their) <= tolerance
