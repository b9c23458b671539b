"""Gradients of hidden states and an lm_head: dH, added up over chunks of the vocabulary, and dW, over chunks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import wide
from .exchange import Exchange
from .tolerance import Kept

#: Rows of dW that are multiplied at a time where the product cannot be accumulated in place.
_SLAB_BYTES = 2**22
#: Chunks whose means wait for one pass over dW.
_MOST_MEANS = 64


class HiddenGradient:
    """dH ``[N, H]``. A row that is one product is written in the model's dtype. Where it comes ``in_parts`` (kept columns
    and a mean) or the vocabulary is cut, parts are added up in fp32 (fp64 stays). With an ``exchange`` the lm_head is one
    rank's shard, and rows are summed over the group once they have this rank's whole part."""

    def __init__(self, weight: Tensor, exchange: Exchange | None, *, in_parts: bool) -> None:
        self.weight, self.exchange, self.in_parts = weight, exchange, in_parts
        self.dtype, self.vocab = weight.dtype, weight.shape[0]
        self.total: Tensor | None = None
        self.weight_sums: dict[tuple[int, int], Tensor] = {}

    @property
    def summed_in(self) -> torch.dtype | None:
        """What rows are summed in over the group of a shard; None where they are not."""
        return None if self.exchange is None else self.exchange.hidden_dtype(self.dtype)

    def add(self, gradient: Tensor | Kept, hidden: Tensor, rows: slice, columns: slice) -> None:
        """``gradient @ weight[columns]``, or what is kept of it, to the ``rows`` of ``hidden``."""
        whole_rows = columns == slice(0, self.vocab)
        target = self._rows(hidden, rows, once=whole_rows and not self.in_parts)
        weight = self.weight[columns]
        if isinstance(gradient, Kept):
            self._add_kept(target, gradient, weight, columns)
        elif whole_rows and target.dtype == self.dtype:
            torch.mm(gradient, weight, out=target)
        else:
            _add(target, gradient, weight)
        if columns.stop == self.vocab:
            self._sum(target)

    def write(self, product: Tensor, hidden: Tensor, rows: slice) -> None:
        target = self._rows(hidden, rows, once=True)
        target.copy_(product)
        self._sum(target)

    def _rows(self, hidden: Tensor, rows: slice, *, once: bool) -> Tensor:
        if self.total is None:
            dtype = self.summed_in or (self.dtype if once else wide(self.dtype))
            self.total = hidden.new_zeros(hidden.shape, dtype=dtype)
        return self.total[rows]

    def _add_kept(self, target: Tensor, kept: Kept, weight: Tensor, columns: slice) -> None:
        """The columns that are kept, and each row's rest by the mean of the others."""
        others = self._weight_sum(columns).clone()
        for ids, gradient in kept.parts(weight.shape[1] * weight.element_size()):
            lm_head_rows = weight.index_select(0, ids)
            _add(target, gradient, lm_head_rows)
            others -= lm_head_rows.sum(0, dtype=others.dtype)
        target.addr_(kept.rest.to(target.dtype), (others / kept.dropped).to(target.dtype))

    def _weight_sum(self, columns: slice) -> Tensor:
        """The sum of the lm_head's rows ``columns``: read once for all chunks of tokens."""
        key = columns.start, columns.stop
        if key not in self.weight_sums:
            self.weight_sums[key] = self.weight[columns].sum(0, dtype=wide(self.dtype))
        return self.weight_sums[key]

    def _sum(self, target: Tensor) -> None:
        if self.exchange is not None and self.summed_in is not None:
            self.exchange.start_sum(target)


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


def _add(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target += left @ right."""
    if target.dtype == left.dtype:
        target.addmm_(left, right)
    elif accumulates_in_fp32(target):
        add_product(target, left, right)
    else:
        target += left @ right


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
