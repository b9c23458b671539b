"""Log-probabilities of given ids, and entropies: values in the forward, the gradient when its weights arrive.

A row is folded without its K ids, whose logits are taken out of the tile first, as a sparse target's are
(:mod:`..backends.sparse_rows`): so the log-probability of a token that has nearly all the mass keeps its digits. The
row's state goes from the forward to the backward, which makes each tile again and writes its gradient in one pass.
With w_k what arrives for the ids, each id once, and v for the entropy,

    d/dz_j = (w_j - (sum w) q_j + v q_j (mean_shift - shift_j)) / T        (w_j = 0 where j is none of the ids).

Where the hidden states alone need a gradient, no tile is made again: dH is linear in w and v. The lm_head's product
with the softmax of the ids' others, and that with the entropy's gradient, are made in the forward. What is left for
the backward is the lm_head's rows at the ids.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import serving
from ..backends.outcomes import distinct_ids, student_spec
from ..backends.protocol import Backend, Gradients, SparseGradient, Tile
from ..backends.row_state import COLUMNS, RowState, first_pass, new_state
from ..backends.sparse_rows import WholeRow, gather_stored, top_token, whole_row
from ..backends.spec import OUTPUTS, Asked, Output
from .exchange import Exchange
from .layout import flat
from .request import Request
from .rows import HeadRows
from .schedule import plan
from .walk import SLOT_BYTES, Rows, live_tokens, rows_of


class Values(NamedTuple):
    """Of each token; 0 where it is masked."""

    log_probs: Tensor  # fp64 [N, K]; 0 where there is no id
    entropy: Tensor  # fp64 [N], where it is asked for
    logsumexp: Tensor  # fp64 [N], at the temperature
    top1: Tensor  # int64 [N], with statistics; -1 where it is masked or nobody asked


class Finished(NamedTuple):
    """What the backward needs of each token."""

    state: Tensor  # fp64 [N, COLUMNS], without the ids
    stored: Tensor  # [N, K] logits at the distinct ids, mapped
    others_rows: (
        Tensor  # [N, H]: the lm_head times the softmax of the ids' others, over T; [0] where more learns
    )
    entropy_rows: Tensor  # [N, H]: the lm_head times the entropy's gradient; [0] if not asked either


def empty(request: Request) -> tuple[Values, Finished]:
    """Tensors like those that :func:`values` gives."""
    tokens, slots = request.teacher[0].shape
    hidden, numbers = request.student[0], request.weights
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    saved = [tokens, hidden.shape[-1]] if request.only_hidden_learns else [0]
    entropy = saved if request.spec.asked & Asked.ENTROPY else [0]
    return (
        Values(
            numbers.new_zeros(tokens, slots),
            numbers.new_zeros(tokens),
            numbers.new_zeros(tokens),
            numbers.new_full([tokens], -1, dtype=torch.int64),
        ),
        Finished(
            numbers.new_zeros(tokens, COLUMNS),
            numbers.new_zeros(tokens, slots, dtype=wide),
            hidden.new_zeros(saved),
            hidden.new_zeros(entropy),
        ),
    )


def values(request: Request) -> tuple[Values, Finished]:
    """Of a request whose teacher is [ids ``[N, K]``]."""
    live = _projected(request)
    if live is None:
        return _Walk(request).values()
    made, nothing = _Walk(_of(live, request)).values(), empty(request)

    def spread(few: Tensor, all_of_them: Tensor) -> Tensor:
        return all_of_them.index_copy_(0, live, few) if all_of_them.numel() else all_of_them

    return Values(*map(spread, made[0], nothing[0])), Finished(*map(spread, made[1], nothing[1]))


def gradients(
    request: Request, arriving: Tensor, finished: Finished, grad: Tensor | None = None
) -> list[Tensor]:
    """Those that are needed. ``arriving`` ``[N, K]`` is for the log-probabilities; the entropy's is a column of the
    request's weights. ``grad``: a buffer ``[..., V]`` for the gradient of given logits."""
    # Where nothing is projected nothing is left out: knowing which tokens are live is a wait for the whole forward.
    live = None if request.only_hidden_learns else _projected(request)
    if live is None:
        return _Walk(request, grad).gradients(arriving, finished)
    few = Finished(*(t[live] if t.dim() > 1 else t for t in finished))
    made = _Walk(_of(live, request)).gradients(arriving[live], few)
    if request.needs_grad[0]:
        hidden = flat(request.student[0])
        made[0] = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(
            0, live, made[0]
        )
    return made


def _projected(request: Request) -> Tensor | None:
    """The tokens that an lm_head projects; None: all, or there is no lm_head."""
    split = live_tokens(request.labels) if request.has_head else None
    return None if split is None else split[0]


def _of(live: Tensor, request: Request) -> Request:
    """The request of these tokens alone."""
    hidden, *others = request.student
    return replace(
        request,
        student=[flat(hidden)[live], *others],
        teacher=[request.teacher[0][live]],
        labels=None,
        temperature=request.temperature if request.temperature.shape[0] == 1 else request.temperature[live],
        weights=request.weights[live],
    )


class _Walk:
    """A request's chunks of tokens, one after the other."""

    def __init__(self, request: Request, grad: Tensor | None = None) -> None:
        self.request, self.spec = request, student_spec(request.spec)
        self.given = request.teacher[0]
        self.ids, self.place = distinct_ids(self.given)
        place, here = request.place, request.columns_here
        self.exchange = None if place is None else Exchange(place)
        self.student: Rows = rows_of(request.student, here, request.needs_grad, grad, self.exchange)
        dtypes = self.student.dtypes
        self.backend: Backend = serving(request.backend, request.weights.device, dtypes, self.spec)
        each = self.student.bytes_per_logit + self.backend.bytes_per_logit(dtypes)
        if request.only_hidden_learns and self.spec.asked & Asked.ENTROPY:
            each += request.student[0].itemsize  # two gradients of a tile
        tiles = plan(
            tokens=self.student.tokens,
            vocab=here if place is None else place.widest,
            bytes_per_logit=each,
            bytes_per_row=self.ids.shape[1] * SLOT_BYTES,
            chunk_bytes=request.chunk_bytes,
            segment=self.student.segment,
        )
        self.tiles = replace(tiles, vocab=here)  # all ranks have the same chunks of tokens

    def temperature(self, rows: slice) -> Tensor:
        given = self.request.temperature
        return given if given.shape[0] == 1 else given[rows]

    def tile(self, rows: slice, columns: slice) -> Tile:
        request = self.request
        return Tile(
            self.student.tile(rows, columns),
            None,
            None if request.labels is None else request.labels[rows],
            self.temperature(rows),
            request.parameters,
            columns.start + (0 if self.exchange is None else self.exchange.place.start),
            request.vocab,
        )

    def column_chunks(self) -> list[slice]:
        """On an empty shard one chunk without columns: it has a part in the sum of dH."""
        return list(self.tiles.column_chunks()) or [slice(0, 0)]

    def fold(self, rows: slice, state: Tensor, stored: Tensor) -> Tile:
        """Fill the states of a chunk of tokens and the logits at its ids; its last tile is returned."""
        ids, tile = self.ids[rows], None

        def here() -> None:
            nonlocal tile
            for columns in self.column_chunks():
                tile = self.tile(rows, columns)
                if tile.student.shape[1]:
                    self.backend.accumulate(tile, self.spec, state, skipped=ids)
                    gather_stored(stored, tile.student, ids, tile.offset, self.spec.student_map)

        if self.exchange is None:
            here()
        else:
            self.exchange.merge(here, first_pass(self.spec, self.temperature(rows)), state)
            stored.copy_(self.exchange.stored(lambda: stored, ids, stored.dtype))
        assert tile is not None
        return tile

    def values(self) -> tuple[Values, Finished]:
        nothing = empty(self.request)[1]
        state = new_state(len(self.ids), self.ids.device)
        stored = torch.full_like(nothing.stored, -torch.inf)
        products = _Products(self) if self.request.only_hidden_learns else None
        for rows in self.tiles.row_chunks():
            tile = self.fold(rows, state[rows], stored[rows])
            if products is not None:
                products.add(rows, tile, state[rows], stored[rows])
        saved = products.rows() if products is not None else nothing[2:]
        return self._read_off(state, stored), Finished(state, stored, *saved)

    def _read_off(self, state: Tensor, stored: Tensor) -> Values:
        side, temperature = RowState.of(state).student, self.request.temperature
        whole = whole_row(side, stored, temperature)
        made = Values(
            log_probs=torch.where(self.given >= 0, whole.log_q.gather(1, self.place), 0.0),
            entropy=whole.entropy if self.spec.asked & Asked.ENTROPY else torch.zeros_like(side.reference),
            logsumexp=whole.reference / temperature + whole.log_sum_exp,
            top1=top_token(self.ids, stored, side)
            if self.spec.stats
            else torch.full_like(self.ids[:, 0], -1),
        )
        if self.request.labels is None:
            return made
        live, masked = self.request.labels >= 0, empty(self.request)[0]
        return Values(
            *(torch.where(live if t.dim() == 1 else live[:, None], t, m) for t, m in zip(made, masked))
        )

    def gradients(self, arriving: Tensor, finished: Finished) -> list[Tensor]:
        weights = self._weights(arriving)
        if self.request.only_hidden_learns:
            return [self._hidden_gradient(weights, finished)]
        if isinstance(self.student, HeadRows):
            self.student.leave_out((weights.rows == 0).all(-1))
        spec = self.spec._replace(stats=0)
        for rows in self.tiles.row_chunks():
            sparse = self._solved(rows, weights, finished)
            for columns in self.column_chunks():
                tile = self.tile(rows, columns)
                buffers = Gradients(self.student.gradient_tile(tile.student, rows, columns), None)
                assert buffers.student is not None
                if tile.student.shape[1]:
                    self.backend.gradient(
                        tile, weights.rows[rows], spec, finished.state[rows], buffers, sparse
                    )
                self.student.backward(buffers.student, rows, columns)
        return self.student.gradients()

    def _weights(self, arriving: Tensor) -> _Weights:
        arriving = torch.where(self.given >= 0, arriving, 0.0)
        each = torch.zeros_like(arriving).scatter_add_(1, self.place, arriving)
        rows = each.new_zeros(each.shape[0], OUTPUTS)
        rows[:, Output.SOFT] = (each != 0).any(-1).to(rows.dtype)
        rows[:, Output.ENTROPY] = self.request.weights[:, Output.ENTROPY]
        return _Weights(each, each.sum(-1), rows)

    def _solved(self, rows: slice, weights: _Weights, finished: Finished) -> SparseGradient:
        state, stored, temperature = finished.state[rows], finished.stored[rows], self.temperature(rows)
        whole = whole_row(RowState.of(state).student, stored, temperature)
        total = weights.total[rows]
        rest = -total * whole.q_rest / temperature
        return _sparse(self.ids[rows], rest, self._stored(rows, weights, whole).to(stored.dtype), whole)

    def _stored(self, rows: slice, weights: _Weights, whole: WholeRow) -> Tensor:
        """The gradient of the weighed log-probabilities for the logits at the distinct ids, w_k - (sum w) q_k, so
        that 1 - q_k keeps its digits."""
        each, total, q = weights.each[rows], weights.total[rows, None], whole.log_q.exp()
        made = -each * whole.log_q.expm1() - (total - each) * q
        return torch.where(self.ids[rows] >= 0, made / self.temperature(rows)[:, None], 0.0)

    def _hidden_gradient(self, weights: _Weights, finished: Finished) -> Tensor:
        """dH without another projection."""
        hidden, weight = self.request.student[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        made = torch.empty_like(flat(hidden), memory_format=torch.contiguous_format)
        logit_map, slots = self.spec.student_map, self.ids.shape[1]
        each_row = slots * (SLOT_BYTES + self.student.bytes_per_stored)
        step = max(self.request.chunk_bytes // each_row, 1)
        for start in range(0, len(made), step):
            rows = slice(start, start + step)
            ids, stored = self.ids[rows], finished.stored[rows]
            whole = whole_row(RowState.of(finished.state[rows]).student, stored, self.temperature(rows))
            each = logit_map.backward(self._stored(rows, weights, whole), stored.double())
            each = torch.where(ids >= 0, each, 0.0)
            lm_head_rows = F.embedding(ids.clamp(min=0), weight).to(wide)
            each = each.to(wide)
            # A product over one id is a multiplication, at which cuBLAS is slow.
            grad = each * lm_head_rows[:, 0] if slots == 1 else torch.bmm(each[:, None], lm_head_rows)[:, 0]
            grad -= weights.total[rows, None].to(wide) * finished.others_rows[rows]
            if self.spec.asked & Asked.ENTROPY:
                by = weights.rows[rows, Output.ENTROPY, None].to(wide)
                grad += torch.where(by == 0, 0.0, by * finished.entropy_rows[rows])
            nothing = (weights.rows[rows] == 0).all(-1, keepdim=True)
            if self.request.labels is not None:
                nothing |= self.request.labels[rows, None] < 0
            made[rows] = grad.masked_fill(nothing, 0.0)
        return made


def _sparse(ids: Tensor, rest: Tensor, stored: Tensor, whole: WholeRow) -> SparseGradient:
    nothing_at_1 = torch.zeros_like(rest)
    return SparseGradient(
        ids, rest, stored, whole.reference, nothing_at_1, whole.log_sum_exp, whole.mean_shift
    )


class _Products:
    """What dH is made of where hidden states alone need a gradient: see :class:`Finished`."""

    def __init__(self, walk: _Walk) -> None:
        request = walk.request
        self.walk = walk
        self.outputs = [Output.SOFT] + [Output.ENTROPY] * bool(walk.spec.asked & Asked.ENTROPY)
        student = [flat(request.student[0]), *request.student[1:]]
        self.heads = [HeadRows(student, request.vocab, request.needs_grad) for _ in self.outputs]

    def add(self, rows: slice, tile: Tile, state: Tensor, stored: Tensor) -> None:
        """Of a chunk of tokens whose states are finished. ``tile``: its last."""
        walk = self.walk
        temperature = walk.temperature(rows)
        whole = whole_row(RowState.of(state).student, stored, temperature)
        sparse = _sparse(walk.ids[rows], whole.q_rest / temperature, torch.zeros_like(stored), whole)
        for columns in walk.tiles.column_chunks():
            if not walk.tiles.one_tile_per_row:
                tile = walk.tile(rows, columns)
            for output, head in zip(self.outputs, self.heads):
                weights = state.new_zeros(len(state), OUTPUTS)
                weights[:, output] = 1
                if output == self.outputs[-1]:  # it may overwrite the tile
                    grad = head.gradient_tile(tile.student, rows, columns)
                else:
                    grad = torch.empty_like(tile.student, dtype=head.dtype)
                assert grad is not None
                walk.backend.gradient(tile, weights, walk.spec, state, Gradients(grad, None), sparse)
                head.backward(grad, rows, columns)

    def rows(self) -> list[Tensor]:
        """Of every token: the fields of :class:`Finished`."""
        made = [head.gradients()[0] for head in self.heads]
        return made if len(made) > 1 else [*made, made[0].new_zeros(0)]


class _Weights(NamedTuple):
    each: Tensor  # fp64 [n, K], of the distinct ids
    total: Tensor  # fp64 [n]
    rows: Tensor  # fp64 [n, OUTPUTS], as backends take them: SOFT says whether any of `each` is not 0
