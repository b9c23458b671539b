"""dW of an lm_head, added up over chunks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import wide
from .tolerance import Kept

#: Rows of dW that are multiplied at a time where the product cannot be accumulated in place.
_SLAB_BYTES = 2**22
#: Chunks whose means wait for one pass over dW.
_MOST_MEANS = 64


class WeightGradient:
    """dW ``[V, H]``. The product of all tokens at once is written in the weight's dtype; several are added up in
    fp32 (fp64 stays), in place where the dtype allows, else through slabs of a few rows."""

    def __init__(self, weight: Tensor, vocab: int) -> None:
        self.weight, self.vocab = weight, vocab
        self.total: Tensor | None = None
        #: Of columns (start, stop) and each of their chunks: which are dropped ``[columns]``, and their mean ``[H]``.
        self.means: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def add(self, gradient: Tensor, hidden: Tensor, columns: slice, *, first: bool, all_tokens: bool) -> None:
        """``gradient.T @ hidden`` to the rows ``columns``; ``first`` of their chunks of tokens."""
        target = self._target(columns, all_tokens)
        if all_tokens:
            torch.mm(gradient.t(), hidden, out=target)
        elif target.dtype == hidden.dtype:
            target.addmm_(gradient.t(), hidden, beta=0 if first else 1)
        elif accumulates_in_fp32(target):
            add_product(target, gradient.t(), hidden, first=first)
        else:
            self._add_in_slabs(target, gradient, hidden, first=first)

    def add_kept(self, kept: Kept, hidden: Tensor, columns: slice, *, first: bool, all_tokens: bool) -> None:
        """``add`` of the columns that are kept; the rows of the others get their mean. Of several chunks each
        touches what it keeps alone, and their means are added in one pass over all rows."""
        target = self._target(columns, all_tokens)
        mean = hidden.to(kept.rest.dtype).t() @ kept.rest / kept.dropped
        if all_tokens:
            target.copy_(mean.to(target.dtype))
        else:
            if first:
                target.zero_()
            self._add_later(mean, kept.ids, columns)
        # No row is named twice, so no GPU adds in an order of its own.
        write = target.index_copy_ if first else target.index_add_
        for ids, gradient in kept.parts(hidden.shape[1] * target.element_size()):
            write(0, ids, product_for(target, gradient.t(), hidden))

    def _add_later(self, mean: Tensor, kept: Tensor, columns: slice) -> None:
        dropped = torch.ones(columns.stop - columns.start, dtype=torch.bool, device=kept.device)
        means = self.means.setdefault((columns.start, columns.stop), [])
        means.append((dropped.index_fill_(0, kept, False), mean))
        if len(means) == _MOST_MEANS:
            self._add_means()

    def _add_means(self) -> None:
        for (start, stop), means in self.means.items():
            assert self.total is not None
            dropped, rows = (torch.stack(each) for each in zip(*means))
            self.total[start:stop].addmm_(dropped.t().to(rows.dtype), rows)
        self.means.clear()

    def finished(self) -> Tensor | None:
        """The total of all that was added; None where that is nothing."""
        self._add_means()
        return self.total

    def _target(self, columns: slice, all_tokens: bool) -> Tensor:
        if self.total is None:
            # The first product writes every row below vocab; only the rows cut off need zeros.
            dtype = self.weight.dtype if all_tokens else wide(self.weight.dtype)
            self.total = self.weight.new_empty(self.weight.shape, dtype=dtype)
            self.total[self.vocab :].zero_()
        return self.total[columns]

    @staticmethod
    def _add_in_slabs(target: Tensor, gradient: Tensor, hidden: Tensor, *, first: bool) -> None:
        step = max(_SLAB_BYTES // (hidden.shape[1] * hidden.element_size()), 1)
        for start in range(0, target.shape[0], step):
            product = gradient[:, start : start + step].t() @ hidden
            slab = target[start : start + step]
            slab.copy_(product) if first else slab.add_(product)

    def add_rows(self, ids: Tensor, rows: Tensor) -> None:
        """``rows`` ``[n, H]`` to the rows ``ids``, and zero to all that are never named."""
        if self.total is None:
            self.total = self.weight.new_zeros(self.weight.shape, dtype=wide(self.weight.dtype))
        add_rows(self.total, ids, rows)


def accumulates_in_fp32(target: Tensor) -> bool:
    """Whether a product of half-precision matrices can be added to ``target`` unrounded."""
    return target.is_cuda and target.dtype == torch.float32


def add_product(target: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> None:
    """target += left @ right, half-precision matrices into fp32, in the product's own epilogue."""
    if first:
        torch.mm(left, right, out_dtype=torch.float32, out=target)
    else:
        torch.addmm(target, left, right, out_dtype=torch.float32, out=target)


def product_for(target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ right in ``target``'s dtype, and rounded to it alone where torch can."""
    if left.dtype != target.dtype and accumulates_in_fp32(target):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(target.dtype)


def add_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """target[index] += rows, in the same order each time: index_add_ is not that on a GPU."""
    if target.is_cuda:
        target.index_put_((index,), rows, accumulate=True)
    else:
        target.index_add_(0, index, rows)
