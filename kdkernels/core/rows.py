"""Where tiles of logits come from and where their gradients go: given logits, or hidden states and an lm_head."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import columns_adjoin, flat, folds

HALF = (torch.bfloat16, torch.float16)
#: Rows of dW that are multiplied at a time where the product cannot be accumulated in place.
_SLAB_BYTES = 2**22


class LogitRows:
    """Rows of given logits ``[..., V]`` and their gradient: a buffer ``[..., V]``, or the logits themselves.

    A tile is a view where it can be. It is a copy where only some rows are kept, where the leading
    dimensions do not fold into one, and where columns do not adjoin; its gradient is then written over
    the copy, and put where it belongs by ``backward``.
    """

    def __init__(self, logits: Tensor, vocab: int, grad: Optional[Tensor]) -> None:
        self.vocab, self.tokens = vocab, logits.numel() // logits.shape[-1]
        self.index: Optional[Tensor] = None
        self.folded = folds(logits) and (grad is None or folds(grad))
        self.full = flat(logits) if self.folded else logits
        self.grad = flat(grad) if self.folded and grad is not None else grad

    @property
    def bytes_per_logit(self) -> int:
        if self._gathered:
            return self.full.element_size() * (1 + (self.grad is not None))
        return 0 if columns_adjoin(self.full) else self.full.element_size()

    #: Beside the budget for outcomes, a kept logit costs nothing worth counting.
    bytes_per_kept = 0

    @property
    def _gathered(self) -> bool:
        return self.index is not None or not self.folded

    @property
    def wants_gradient(self) -> bool:
        return self.grad is not None

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [self.full.dtype]

    def keep(self, index: Tensor, others: Tensor) -> None:
        """Only the rows ``index``; the gradient of the ``others`` is zero."""
        self.index, self.tokens = index, index.numel()
        if self.grad is not None:
            self.grad[self._places(others)] = 0

    def _places(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """An index for each leading dimension."""
        return (tokens,) if self.folded else torch.unravel_index(tokens, self.full.shape[:-1])

    def _at(self, rows: slice) -> tuple[Tensor, ...]:
        if self.index is not None:
            return self._places(self.index[rows])
        return self._places(torch.arange(rows.start, rows.stop, device=self.full.device))

    def tile(self, rows: slice, columns: slice) -> Tensor:
        if not self._gathered:
            tile = self.full[rows, columns]
            return tile if columns_adjoin(tile) else tile.contiguous()
        if self.folded:
            return self.full[:, columns].index_select(0, self._at(rows)[0])
        return self.full[..., columns][self._at(rows)].contiguous()

    def gradient_tile(self, tile: Tensor, rows: slice, columns: slice) -> Optional[Tensor]:
        if self.grad is None:
            return None
        return tile if self._gathered or not columns_adjoin(self.grad) else self.grad[rows, columns]

    def backward(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        if self.grad is None:
            return
        if not self._gathered:
            if not columns_adjoin(self.grad):
                self.grad[rows, columns] = gradient
        elif self.folded:
            self.grad[:, columns].index_copy_(0, self._at(rows)[0], gradient)
        else:
            self.grad[..., columns][self._at(rows)] = gradient

    def kept_tile(self, rows: slice, ids: Tensor) -> Tensor:
        """The logits at ``ids`` ``[rows, K]``, anything where an id is -1."""
        return self.full[self._entries(rows, ids)]

    def backward_kept(self, gradient: Tensor, rows: slice, ids: Tensor) -> None:
        """The gradient at ``ids`` (0 where an id is -1), and zero everywhere else."""
        if self.grad is None:
            return
        if self._gathered:
            self.grad[self._at(rows)] = 0
        else:
            self.grad[rows].zero_()
        self.grad.index_put_(self._entries(rows, ids), gradient.to(self.grad.dtype), accumulate=True)

    def _entries(self, rows: slice, ids: Tensor) -> tuple[Tensor, ...]:
        return (*(place[:, None] for place in self._at(rows)), ids.clamp(min=0))

    def gradients(self) -> list[Tensor]:
        return [] if self.grad is None else [self.grad]


class HeadRows:
    """Rows of ``hidden @ weight.T + bias``: tiles are projected, their gradients go to dH, dW, db.

    ``wants`` says which of (hidden, weight, bias) need a gradient; nothing is computed for others.
    Products are accumulated in fp32 (fp64 stays): dW in place where its dtype allows, else in one
    fp32 buffer, and only when there is more than one token chunk.
    """

    def __init__(self, tensors: list[Tensor], vocab: int, wants: list[bool]) -> None:
        self.hidden, self.weight = tensors[0], tensors[1][:vocab]
        self.bias = tensors[2][:vocab] if len(tensors) > 2 else None
        self.given, self.vocab, self.wants = tensors, vocab, wants + [False] * (3 - len(wants))
        self.dtype = self.hidden.dtype
        self.tokens = self.hidden.shape[0]
        self.index: Optional[Tensor] = None
        self.weightless: Optional[Tensor] = None
        self.grad_hidden: Optional[Tensor] = None
        self.grad_weight: Optional[Tensor] = None
        self.grad_bias: Optional[Tensor] = None
        self.wide = torch.float32 if self.dtype in HALF else self.dtype

    @property
    def wants_gradient(self) -> bool:
        return any(self.wants)

    @property
    def bytes_per_kept(self) -> int:
        """A gathered row of the lm_head, and the same in the arithmetic's dtype."""
        return self.hidden.shape[1] * (self.wide.itemsize + self.dtype.itemsize)

    @property
    def tile_dtype(self) -> torch.dtype:
        """fp32 tiles for half-precision models where torch can multiply into fp32: on CUDA."""
        wide = self.hidden.is_cuda and self.dtype in HALF
        return torch.float32 if wide else self.dtype

    @property
    def bytes_per_logit(self) -> int:
        extra = self.dtype.itemsize if self.tile_dtype != self.dtype and any(self.wants) else 0
        return self.tile_dtype.itemsize + extra

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [self.tile_dtype, self.dtype]

    def keep(self, index: Tensor, others: Tensor) -> None:
        """Only the rows ``index``; the gradient of the ``others`` is zero."""
        self.index, self.tokens = index, index.numel()
        self.hidden = self.hidden.index_select(0, index)

    def leave_out(self, weightless: Tensor) -> None:
        """The rows marked ``[N]`` have a gradient of 0. Their hidden states may be anything and stay out of dW's
        product, where 0 * NaN would be NaN. On a GPU nobody waits to see whether there are any."""
        if self.hidden.is_cuda or bool(weightless.any()):
            self.weightless = weightless

    def _weighed(self, rows: slice) -> Tensor:
        hidden = self.hidden[rows]
        return hidden if self.weightless is None else hidden.masked_fill(self.weightless[rows, None], 0.0)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        hidden, weight = self.hidden[rows], self.weight[columns]
        bias = None if self.bias is None else self.bias[columns]
        if self.tile_dtype == self.dtype:
            return F.linear(hidden, weight, bias)
        tile = torch.mm(hidden, weight.t(), out_dtype=self.tile_dtype)
        return tile if bias is None else tile.add_(bias)

    def gradient_tile(self, tile: Tensor, rows: slice, columns: slice) -> Optional[Tensor]:
        if not any(self.wants):
            return None
        return tile if tile.dtype == self.dtype else torch.empty_like(tile, dtype=self.dtype)

    def backward(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        if self.wants[0]:
            self._backward_hidden(gradient, rows, columns)
        if self.wants[1]:
            self._backward_weight(gradient, rows, columns)
        if self.wants[2]:
            if self.grad_bias is None:
                wide = torch.float32 if self.dtype in HALF else self.dtype
                self.grad_bias = gradient.new_zeros(self.vocab, dtype=wide)
            self.grad_bias[columns] += gradient.sum(0, dtype=self.grad_bias.dtype)

    def _backward_hidden(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        whole = columns == slice(0, self.vocab)
        if self.grad_hidden is None:
            wide = torch.float32 if self.dtype in HALF and not whole else self.dtype
            self.grad_hidden = self.hidden.new_zeros(self.hidden.shape, dtype=wide)
        target, weight = self.grad_hidden[rows], self.weight[columns]
        if whole:
            torch.mm(gradient, weight, out=target)
        elif target.dtype == self.dtype:
            target.addmm_(gradient, weight)
        else:
            target += gradient @ weight

    def _backward_weight(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        whole = rows == slice(0, self.tokens)
        if self.grad_weight is None:
            wide = torch.float32 if self.dtype in HALF and not whole else self.dtype
            shape = self.given[1].shape
            # The first product writes every row below vocab; only the rows cut off need zeros.
            self.grad_weight = self.weight.new_empty(shape, dtype=wide)
            self.grad_weight[self.vocab :].zero_()
        target, hidden = self.grad_weight[columns], self._weighed(rows)
        if whole:
            torch.mm(gradient.t(), hidden, out=target)
        elif target.dtype == self.dtype:
            target.addmm_(gradient.t(), hidden, beta=1 if rows.start else 0)
        else:
            self._add_in_slabs(target, gradient, hidden, first=rows.start == 0)

    @staticmethod
    def _add_in_slabs(target: Tensor, gradient: Tensor, hidden: Tensor, *, first: bool) -> None:
        step = max(_SLAB_BYTES // (hidden.shape[1] * hidden.element_size()), 1)
        for start in range(0, target.shape[0], step):
            product = gradient[:, start : start + step].t() @ hidden
            slab = target[start : start + step]
            slab.copy_(product) if first else slab.add_(product)

    def kept_tile(self, rows: slice, ids: Tensor) -> Tensor:
        """The logits at ``ids`` ``[rows, K]``, anything where an id is -1, in fp32 or fp64."""
        ids = ids.clamp(min=0)
        self._gathered = F.embedding(ids, self.weight).to(self.wide)
        tile = torch.bmm(self._gathered, self.hidden[rows].to(self.wide)[:, :, None])[:, :, 0]
        return tile if self.bias is None else tile + self.bias[ids].to(self.wide)

    def backward_kept(self, gradient: Tensor, rows: slice, ids: Tensor) -> None:
        """The gradient at ``ids`` (0 where an id is -1) of the last ``kept_tile``."""
        ids = ids.clamp(min=0).flatten()
        if self.wants[0]:
            if self.grad_hidden is None:
                self.grad_hidden = self.hidden.new_zeros(self.hidden.shape)
            self.grad_hidden[rows] = torch.bmm(gradient[:, None], self._gathered)[:, 0].to(self.dtype)
        if self.wants[1]:
            if self.grad_weight is None:
                self.grad_weight = self.weight.new_zeros(self.given[1].shape, dtype=self.wide)
            hidden = self._weighed(rows).to(self.wide)[:, None]
            products = torch.mul(gradient[:, :, None], hidden, out=self._gathered)
            _add_rows(self.grad_weight, ids, products.flatten(0, 1))
        if self.wants[2]:
            if self.grad_bias is None:
                self.grad_bias = gradient.new_zeros(self.vocab, dtype=self.wide)
            _add_rows(self.grad_bias, ids, gradient.flatten())

    def gradients(self) -> list[Tensor]:
        """dH, dW, db as wanted, in the dtypes and shapes of what was given."""
        grads = []
        for tensor, grad, want in zip(
            self.given, (self.grad_hidden, self.grad_weight, self.grad_bias), self.wants
        ):
            if want:
                grads.append(self._complete(tensor, grad))
        return grads

    def _complete(self, tensor: Tensor, grad: Optional[Tensor]) -> Tensor:
        if grad is None or not self.tokens:
            return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        if tensor is self.given[0] and self.index is not None:
            full = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            return full.index_copy_(0, self.index, grad.to(self.dtype))
        if grad.shape != tensor.shape:
            grad = F.pad(grad, (0, tensor.shape[0] - grad.shape[0]))
        return grad.to(self.dtype)


def _add_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """target[index] += rows, in the same order each time: index_add_ is not that on a GPU."""
    if target.is_cuda:
        target.index_put_((index,), rows, accumulate=True)
    else:
        target.index_add_(0, index, rows)
