"""Where tiles of logits come from and where their gradients go: given logits, or hidden states and an lm_head.

Both sources have the same methods. ``tile`` gives the logits of some tokens and columns, which hold until it is called
again, ``gradient_tile`` a buffer for their gradient, and ``backward`` takes that gradient to where it belongs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import HALF, wide
from .exchange import Exchange, OwnTokens
from .head_gradient import HiddenGradient, WeightGradient, add_rows
from .layout import columns_adjoin, flat, folding_tokens, folds
from .tolerance import keep


class Stored(NamedTuple):
    """The logits of a sparse target's ids ``[n, K]``, and the lm_head's rows that they were made of, if any."""

    logits: Tensor
    lm_head_rows: Tensor | None


class LogitRows:
    """Rows of given logits ``[..., V]`` and their gradient: a buffer ``[..., V]``, or the logits themselves.

    A tile is a view, if its columns adjoin and its tokens lie in one ``segment``: so many tokens, or a multiple,
    fold into one dimension. It is a copy where only some tokens are live, or where they were ``gathered``;
    its gradient is then written over the copy.
    """

    #: Beside the budget for outcomes, a stored logit costs nothing worth counting.
    bytes_per_stored = 0
    is_head = False

    def __init__(self, logits: Tensor, vocab: int, grad: Tensor | None) -> None:
        self.logits, self.vocab, self.grad = logits, vocab, grad
        self.tokens = math.prod(logits.shape[:-1])
        self.index: Tensor | None = None
        if grad is not None and vocab < grad.shape[-1]:
            grad[..., vocab:].zero_()  # columns beyond the vocabulary, which no tile has
        self.segment = folding_tokens(logits) if grad is None else min(map(folding_tokens, (logits, grad)))

    @property
    def needs_grad(self) -> bool:
        return self.grad is not None

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [self.logits.dtype]

    @property
    def bytes_per_logit(self) -> int:
        if self.index is not None:
            return self.logits.element_size() * (1 + self.needs_grad)
        return 0 if columns_adjoin(self.logits) else self.logits.element_size()

    def keep_live(self, live: Tensor, others: Tensor) -> None:
        """Only the tokens ``live``; the gradient of the ``others`` is zero."""
        self.index, self.tokens, self.segment = live, live.numel(), live.numel()
        if self.grad is not None:
            self.grad[self._places(others)] = 0

    def gather(self) -> None:
        """Copy each tile, so that it may hold tokens of several segments."""
        if self.index is None and self.segment < self.tokens:
            self.index, self.segment = torch.arange(self.tokens, device=self.logits.device), self.tokens

    def _places(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """An index for each leading dimension. torch.unravel_index would copy their sizes to a GPU, and wait."""
        inner: list[Tensor] = []
        for size in reversed(self.logits.shape[1:-1]):
            inner.insert(0, tokens % size)
            tokens = tokens // size
        return (tokens, *inner) if self.logits.dim() > 1 else ()

    def _view(self, full: Tensor, rows: slice, columns: slice) -> Tensor:
        """Tokens of one segment."""
        which, first = divmod(rows.start, self.segment)
        outer = [
            size for at, size in enumerate(full.shape[:-1]) if math.prod(full.shape[at:-1]) > self.segment
        ]
        for depth in range(len(outer)):
            each = math.prod(outer[depth + 1 :])
            full, which = full[which // each], which % each
        return flat(full)[first : first + rows.stop - rows.start, columns]

    def tile(self, rows: slice, columns: slice) -> Tensor:
        if self.index is not None:
            return self.logits[..., columns][self._places(self.index[rows])].contiguous()
        tile = self._view(self.logits, rows, columns)
        return tile if columns_adjoin(tile) else tile.contiguous()

    def gradient_tile(self, tile: Tensor, rows: slice, columns: slice) -> Tensor | None:
        if self.grad is None:
            return None
        copied = self.index is not None or not columns_adjoin(self.grad)
        return tile if copied else self._view(self.grad, rows, columns)

    def backward(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        if self.grad is None:
            return
        if self.index is not None:
            self.grad[..., columns][self._places(self.index[rows])] = gradient
        elif not columns_adjoin(self.grad):
            self._view(self.grad, rows, columns).copy_(gradient)

    def stored(self, rows: slice, ids: Tensor) -> Stored:
        """The logits at ``ids`` ``[n, K]``, anything where an id is -1."""
        if not self.vocab:  # an empty shard
            return Stored(self.logits.new_zeros(ids.shape), None)
        if self.index is None and folds(self.logits):
            return Stored(flat(self.logits)[rows].gather(1, ids.clamp(min=0)), None)
        return Stored(self.logits[self._entries(rows, ids)], None)

    def backward_stored(self, gradient: Tensor, rows: slice, ids: Tensor, stored: Stored) -> None:
        """The gradient at ``ids`` (0 where an id is -1), and zero everywhere else."""
        if self.grad is None or not self.vocab:
            return
        gradient = gradient.to(self.grad.dtype)
        # Of adjacent rows torch has plainer operations: a GPU fills them eight times as fast, a CPU adds on all its cores.
        if self.index is None and folds(self.grad):
            flat(self.grad)[rows].zero_().scatter_add_(1, ids.clamp(min=0), gradient)
            return
        self.grad[self._places(self._tokens(rows))] = 0
        self.grad.index_put_(self._entries(rows, ids), gradient, accumulate=True)

    def _tokens(self, rows: slice) -> Tensor:
        if self.index is not None:
            return self.index[rows]
        return torch.arange(rows.start, rows.stop, device=self.logits.device)

    def _entries(self, rows: slice, ids: Tensor) -> tuple[Tensor, ...]:
        return (*(place[:, None] for place in self._places(self._tokens(rows))), ids.clamp(min=0))

    def gradients(self) -> list[Tensor]:
        return [] if self.grad is None else [self.grad]


class HeadRows:
    """Rows of ``hidden @ weight.T + bias``: tiles are projected, their gradients go to dH, dW, db.

    ``wanted`` says which of (hidden, weight, bias) need a gradient; nothing is computed for others.
    A tile is written over the one before it. Products are added up in fp32 (fp64 stays), where there is more than one.
    With an ``exchange`` the lm_head is one rank's shard, and dH is summed over the group. ``tolerance`` lets products
    leave out columns (:mod:`.tolerance`).
    """

    is_head = True

    def __init__(
        self,
        tensors: list[Tensor],
        vocab: int,
        wanted: list[bool],
        exchange: Exchange | None = None,
        tolerance: float = 0.0,
    ) -> None:
        self.exchange, self.tolerance = exchange, tolerance
        self.hidden, self.weight = tensors[0], tensors[1][:vocab]
        self.bias = tensors[2][:vocab] if len(tensors) > 2 else None
        self.given, self.vocab, self.wanted = tensors, vocab, wanted + [False] * (3 - len(wanted))
        self.dtype = self.hidden.dtype
        self.tokens = self.hidden.shape[0]
        self.memory: Tensor | None = None  # a tile's
        self.index: Tensor | None = None
        self.weightless: Tensor | None = None
        self.grad_hidden = HiddenGradient(self.weight, exchange, in_parts=bool(tolerance))
        self.grad_weight = WeightGradient(tensors[1], vocab)
        self.grad_bias: Tensor | None = None
        self.wide = wide(self.dtype)

    @property
    def segment(self) -> int:
        """All tokens fold into one dimension."""
        return self.tokens

    @property
    def needs_grad(self) -> bool:
        return any(self.wanted)

    def gather(self) -> None:
        """Tiles are copies already."""

    @property
    def bytes_per_stored(self) -> int:
        """A gathered row of the lm_head, and the same in the arithmetic's dtype."""
        return self.hidden.shape[1] * (self.wide.itemsize + self.dtype.itemsize)

    @property
    def tile_dtype(self) -> torch.dtype:
        """fp32 tiles for half-precision models where torch can multiply into fp32: on CUDA."""
        wide = self.hidden.is_cuda and self.dtype in HALF
        return torch.float32 if wide else self.dtype

    @property
    def bytes_per_logit(self) -> int:
        extra = self.dtype.itemsize if self.tile_dtype != self.dtype and self.needs_grad else 0
        return self.tile_dtype.itemsize + extra

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [self.tile_dtype, self.dtype]

    def keep_live(self, live: Tensor, others: Tensor) -> None:
        """Only the tokens ``live``; the gradient of the ``others`` is zero."""
        self.index, self.tokens = live, live.numel()
        self.hidden = self.hidden.index_select(0, live)

    def leave_out(self, weightless: Tensor) -> None:
        """The rows marked ``[N]`` have a gradient of 0. Their hidden states may be anything and stay out of dW's
        product, where 0 * NaN would be NaN. On a GPU nobody waits to see whether there are any."""
        if self.hidden.is_cuda or bool(weightless.any()):
            self.weightless = weightless

    def _hidden_with_weight(self, rows: slice) -> Tensor:
        """The hidden states, 0 where :meth:`leave_out` said so."""
        hidden = self.hidden[rows]
        return hidden if self.weightless is None else hidden.masked_fill(self.weightless[rows, None], 0.0)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        hidden, weight = self.hidden[rows], self.weight[columns]
        bias = None if self.bias is None else self.bias[columns]
        tile = self._room(hidden.shape[0], weight.shape[0])
        if self.tile_dtype != self.dtype:
            torch.mm(hidden, weight.t(), out_dtype=self.tile_dtype, out=tile)
            return tile if bias is None else tile.add_(bias)
        if bias is None:
            return torch.mm(hidden, weight.t(), out=tile)
        return torch.addmm(bias, hidden, weight.t(), out=tile)

    def _room(self, rows: int, columns: int) -> Tensor:
        """The memory of the tile before, which nobody reads any more. To be given new pages for each tile costs a CPU up
        to a tenth of the products' time."""
        size = rows * columns
        if self.memory is None or self.memory.numel() < size:
            self.memory = None  # first, so that there are never two
            self.memory = self.hidden.new_empty(size, dtype=self.tile_dtype)
        return self.memory[:size].view(rows, columns)

    def gradient_tile(self, tile: Tensor, rows: slice, columns: slice) -> Tensor | None:
        if not self.needs_grad:
            return None
        return tile if tile.dtype == self.dtype else torch.empty_like(tile, dtype=self.dtype)

    def backward(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        """``gradient`` is overwritten where a tolerance moves its columns."""
        if self.wanted[2]:
            self._bias_gradient()[columns] += gradient.sum(0, dtype=self.wide)
        kept = keep(gradient, self.tolerance) if any(self.wanted[:2]) else None
        if self.wanted[0]:
            self.grad_hidden.add(gradient if kept is None else kept, self.hidden, rows, columns)
        if self.wanted[1]:
            hidden = self._hidden_with_weight(rows)
            which = {"first": rows.start == 0, "all_tokens": rows == slice(0, self.tokens)}
            if kept is None:
                self.grad_weight.add(gradient, hidden, columns, **which)
            else:
                self.grad_weight.add_kept(kept, hidden, columns, **which)

    def stored(self, rows: slice, ids: Tensor) -> Stored:
        """The logits at ``ids`` ``[n, K]``, anything where an id is -1, in fp32 or fp64."""
        if not self.vocab:  # an empty shard
            nothing = self.hidden.new_zeros(*ids.shape, self.hidden.shape[1], dtype=self.wide)
            return Stored(nothing[..., 0], nothing)
        ids = ids.clamp(min=0)
        lm_head_rows = F.embedding(ids, self.weight).to(self.wide)
        logits = torch.bmm(lm_head_rows, self.hidden[rows].to(self.wide)[:, :, None])[:, :, 0]
        return Stored(logits if self.bias is None else logits + self.bias[ids].to(self.wide), lm_head_rows)

    def backward_stored(self, gradient: Tensor, rows: slice, ids: Tensor, stored: Stored) -> None:
        """The gradient at ``ids`` (0 where an id is -1). It overwrites ``stored``'s rows of the lm_head."""
        assert stored.lm_head_rows is not None
        ids = ids.clamp(min=0).flatten()
        if self.wanted[0]:
            product = torch.bmm(gradient[:, None], stored.lm_head_rows)[:, 0]
            self.grad_hidden.write(product, self.hidden, rows)
        if not self.vocab:
            return
        if self.wanted[1]:
            hidden = self._hidden_with_weight(rows).to(self.wide)[:, None]
            products = torch.mul(gradient[:, :, None], hidden, out=stored.lm_head_rows)
            self.grad_weight.add_rows(ids, products.flatten(0, 1))
        if self.wanted[2]:
            add_rows(self._bias_gradient(), ids, gradient.flatten())

    def _bias_gradient(self) -> Tensor:
        if self.grad_bias is None:
            self.grad_bias = self.hidden.new_zeros(self.vocab, dtype=self.wide)
        return self.grad_bias

    def gradients(self) -> list[Tensor]:
        """dH, dW, db as wanted, in the dtypes and shapes of what was given."""
        if self.exchange is not None:
            self.exchange.wait()
            if self.exchange.own_tokens is not None:
                return self._own_gradients(self.exchange.own_tokens)
        made = self.grad_hidden.total, self.grad_weight.finished(), self.grad_bias
        return [self._complete(t, grad) for t, grad, want in zip(self.given, made, self.wanted) if want]

    def _own_gradients(self, tokens: OwnTokens) -> list[Tensor]:
        """dH of this rank's tokens, whose weights were divided by the number of ranks where gradients are averaged;
        dW and db of its shard."""
        assert self.exchange is not None
        made: list[Tensor] = []
        if self.wanted[0]:
            all_tokens = self.given[0].new_zeros(self.given[0].shape, dtype=self.grad_hidden.summed_in)
            if self.grad_hidden.total is not None:
                at = slice(None) if self.index is None else self.index
                all_tokens[at] = self.grad_hidden.total
            made.append((tokens.sum_own(all_tokens) * tokens.averaged_over).to(self.dtype))
        shard = zip(self.given[1:], (self.grad_weight.finished(), self.grad_bias), self.wanted[1:])
        return made + [self._complete(tensor, grad) for tensor, grad, want in shard if want]

    def _complete(self, tensor: Tensor, grad: Tensor | None) -> Tensor:
        if grad is None or not self.tokens:
            return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        if tensor is self.given[0] and self.index is not None:
            full = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            return full.index_copy_(0, self.index, grad.to(self.dtype))
        if grad.shape != tensor.shape:
            grad = F.pad(grad, (0, tensor.shape[0] - grad.shape[0]))
        return grad.to(self.dtype)
