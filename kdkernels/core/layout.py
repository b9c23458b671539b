"""What the strides of a tensor say: whether it folds into rows, and whose memory it shares."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def folds(t: Tensor) -> bool:
    """Whether the leading dimensions of ``t`` fold into one without a copy."""
    dims = [(size, stride) for size, stride in zip(t.shape[:-1], t.stride()) if size != 1]
    return all(stride == inner * step for (_, stride), (inner, step) in zip(dims, dims[1:], strict=False))


def folding_tokens(t: Tensor) -> int:
    """How many tokens ``t`` ``[..., V]`` holds in the largest of its trailing dimensions that fold into one."""
    for depth in range(t.dim() - 1):
        inner = t[(0,) * depth] if t.numel() else t.new_empty(t.shape[depth:])
        if folds(inner):
            return math.prod(inner.shape[:-1])
    return 1


def flat(t: Tensor) -> Tensor:
    """``[..., V]`` as ``[N, V]``."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])  # an empty shard has no columns


def columns_adjoin(t: Tensor) -> bool:
    """Whether a row's entries lie side by side, as every kernel reads and writes them."""
    return t.stride(-1) == 1 or t.shape[-1] <= 1


def overlaps_itself(t: Tensor) -> bool:
    """Whether two entries of ``t`` may be one place in memory. False is certain.

    It is False where each step is longer than all that the shorter ones span, as in slices and
    transpositions of a dense tensor.
    """
    steps = [
        (stride, size)
        for size, stride in zip(t.shape, t.stride())
        if _known(size > 1) or (_known(stride == 0) and not _known(size <= 1))
    ]
    for i, (stride, _) in enumerate(steps):
        shorter = [
            (s, n) for j, (s, n) in enumerate(steps) if _known(s < stride) or (j > i and _known(s == stride))
        ]
        if _known(stride <= _span(shorter)):
            return True
    return False


def _known(condition: bool) -> bool:
    """``condition``; False where a compiler cannot know, since a size depends on data."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes a while

    return guard_or_false(condition)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may have a place in memory in common. False is certain.

    Views of one storage are told apart where one ends before the other begins, or where that holds
    modulo a stride that both have: halves of a batch, of each sequence, or of the vocabulary.
    """
    if not a.numel() or not b.numel() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    ours, theirs = _byte_steps(a), _byte_steps(b)
    gap = b.data_ptr() - a.data_ptr()
    if gap > _span(ours) or -gap > _span(theirs):
        return False
    periods = {s for s, _ in ours} & {s for s, _ in theirs if s}
    return not any(_apart(gap, ours, theirs, period) for period in periods)


def _apart(gap: int, ours: list[tuple[int, int]], theirs: list[tuple[int, int]], period: int) -> bool:
    """Whether the places that are taken are different ones modulo ``period``."""
    first, second = (_span([(s, n) for s, n in steps if s % period]) for steps in (ours, theirs))
    return first < gap % period and gap % period + second < period


def _byte_steps(t: Tensor) -> list[tuple[int, int]]:
    """(stride, size) in bytes, the bytes of an entry included."""
    width = t.element_size()
    return [(stride * width, size) for size, stride in zip(t.shape, t.stride()) if size > 1] + [(1, width)]


def _span(steps: list[tuple[int, int]]) -> int:
    """How far the last entry is from the first."""
    return sum(stride * (size - 1) for stride, size in steps)
