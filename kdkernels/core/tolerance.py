"""Below the floor: the columns of a gradient that its two products can do without.

Most columns of d(loss)/d(logits) ``[n, V]`` hold next to nothing of it. Those of least norm whose squares sum to at
most tolerance^2 of the whole are dropped, and each row's dropped entries are replaced by their mean. So the products

    dH = g_kept @ W_kept + rest x mean(W_dropped)        rest: each row's sum over what is dropped
    dW = g_kept^T @ H, and (rest^T @ H) / dropped        in each dropped row

are those of one gradient g', with |g - g'| <= tolerance |g| in Frobenius' norm. The error's rows sum to 0, so

    |dW - dW'| <= tolerance |g| |H|_2        |dH - dH'| <= tolerance |g| min over c of |W - 1 c^T|_2.

Without the mean, dropping would break the sum over each row that a softmax's gradient has, which is 0, and the
component that all rows of an lm_head share would enter dH. Chunks do not add up: their bounds are of disjoint rows.

Which columns these are is known on the device. How many must be known here: one wait per chunk on a GPU,
where a multiple of 64 is kept, up to 63 more than the tolerance asks for.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple

import torch
from torch import Tensor

from ..backends import native
from ..dtypes import wide

#: What may be dropped has at least this square, or squares in fp32 would have lost what they add up to.
_LEAST = 1e-30


class _Limits(NamedTuple):
    aligned: int  #: the columns that are kept, and those of a slab, are a multiple of it
    most: float  #: beyond this share of the columns, gathering costs more than it saves
    slab_bytes: int  #: what is gathered at a time of an lm_head, and of a gradient


_PLAIN = _Limits(aligned=1, most=0.8, slab_bytes=2**25)
#: cuBLAS is slow at other widths, and its products are faster beside a gather: on an H200 keeping about 0.7 of 128k columns
#: took 12 ms more than exact products, keeping about 0.15 took 11 ms less.
_CUDA = _Limits(aligned=64, most=0.4, slab_bytes=2**28)


def _limits(tensor: Tensor) -> _Limits:
    return _CUDA if tensor.is_cuda else _PLAIN


class Kept(NamedTuple):
    """A gradient ``[n, V]`` as its products see it."""

    ids: Tensor  #: the columns that are kept, ascending
    gradient: Tensor  #: ``[n, kept]``
    rest: Tensor  #: ``[n]``, each row's sum over the other columns
    dropped: int  #: how many these are

    def parts(self, row_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(columns, their gradient), so many that their rows of an lm_head fit a slab."""
        aligned, _, slab_bytes = _limits(self.ids)
        step = max(slab_bytes // max(row_bytes, 1) // aligned, 1) * aligned
        return zip(self.ids.split(step), self.gradient.split(step, 1))


def keep(gradient: Tensor, tolerance: float) -> Kept | None:
    """What is kept of ``gradient``, in its memory; None where that is nearly all, or nothing can be told apart:
    NaN, infinity, zero."""
    if (
        tolerance == 0
        or not gradient.numel()
        or (gradient.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    vocab = gradient.shape[1]
    ascending, order = _squares(gradient).double().sort(stable=True)
    sums = ascending.cumsum(0)
    budget = tolerance**2 * sums[-1]
    dropped = int(((sums <= budget) & (budget >= _LEAST) & (budget < torch.inf)).sum())
    aligned, most, _ = _limits(gradient)
    kept = -(-(vocab - dropped) // aligned) * aligned
    if kept > most * vocab:
        return None
    ids = order[vocab - kept :].sort().values
    return Kept(ids, *_gathered(gradient, ids), vocab - kept)


def _squares(gradient: Tensor) -> Tensor:
    """Of each column, the sum of its squares."""
    if native.serves_columns(gradient):
        return native.column_squares(gradient)
    return torch.linalg.vector_norm(gradient, dim=0, dtype=wide(gradient.dtype)).square()


def _gathered(gradient: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(the columns ``ids`` moved to the front, each row's sum over the others)."""
    kept, dtype = gradient[:, : ids.numel()], wide(gradient.dtype)
    if native.serves_columns(gradient):
        return kept, native.gather_columns(gradient, ids)
    rest = gradient.sum(1, dtype=dtype)
    step = max(_limits(gradient).slab_bytes // (ids.numel() * gradient.element_size()), 1)
    for before, after in zip(gradient.split(step), kept.split(step)):
        after.copy_(before.index_select(1, ids))
    return kept, rest - kept.sum(1, dtype=dtype)
