"""Log-probabilities of given ids, and entropies: values in the forward, the gradient when its weights arrive.

A row is folded without its K ids, whose logits are skipped and gathered apart, as a sparse target's are
(:mod:`..backends.sparse_rows`): so the log-probability of a token that has nearly all the mass keeps its digits. The
row's state goes from the forward to the backward, which makes each tile again and writes its gradient in one pass.
With w_k what arrives for the ids, each id once, and v for the entropy,

    d/dz_j = (w_j - (sum w) q_j + v q_j (mean_shift - shift_j)) / T        (w_j = 0 where j is none of the ids).

Where the hidden states alone need a gradient, no tile is made again: dH is linear in w and v. The lm_head's product
with the softmax of the ids' others, and that with the entropy's gradient, are made in the forward. What is left for
the backward is the lm_head's rows at the ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.outcomes import distinct_ids, student_spec
from ..backends.protocol import Backend, Gradients, SparseGradient, Tile
from ..backends.row_state import COLUMNS, begin, first_pass, student_side
from ..backends.sparse_rows import WholeRow, fold_without, top_token, whole_row
from ..backends.spec import OUTPUTS, Asked, Output, Spec
from ..dtypes import wide
from .exchange import Exchange, OwnTokens
from .layout import flat
from .request import Request, loss_dtype
from .rows import HeadRows
from .tiles import SLOT_BYTES, Chunk, PerRow, Tiles, Writer, projected, rows_of
from .walk import fold_losses, with_all_tokens


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
    whole: Tensor  # fp64 [N, 4]: WholeRow's numbers
    #: [N, H]: the lm_head times the softmax of the ids' others, over T; [0] where more than hidden states learns
    others_rows: Tensor
    entropy_rows: Tensor  # [N, H]: the lm_head times the entropy's gradient; [0] if not asked either

    def at(self, rows: slice | Tensor) -> Finished:
        return Finished(*(t[rows] if t.dim() > 1 else t for t in self))


def empty_results(request: Request) -> tuple[Values, Finished]:
    """Tensors like those that :func:`forward` gives."""
    tokens, slots = request.teacher[0].shape
    hidden, numbers = request.student[0], request.weights
    rows_shape = [tokens, hidden.shape[-1]] if request.only_hidden_learns else [0]
    entropy_shape = rows_shape if request.spec.asked & Asked.ENTROPY else [0]
    return (
        Values(
            numbers.new_zeros(tokens, slots),
            numbers.new_zeros(tokens),
            numbers.new_zeros(tokens),
            numbers.new_full([tokens], -1, dtype=torch.int64),
        ),
        Finished(
            numbers.new_zeros(tokens, COLUMNS),
            numbers.new_zeros(tokens, slots, dtype=loss_dtype(request.student)),
            numbers.new_zeros(tokens, len(WholeRow._fields)),
            hidden.new_zeros(rows_shape),
            hidden.new_zeros(entropy_shape),
        ),
    )


def forward(request: Request) -> tuple[Values, Finished]:
    """The values of a request whose teacher is [ids ``[N, K]``], and what its backward needs."""
    slots = request.teacher[0].shape[1]
    request, exchange = with_all_tokens(request)
    made, finished = _forward(request, exchange)
    if exchange is None or exchange.own_tokens is None:
        return made, finished
    mine = exchange.own_tokens.rows
    made, finished = Values(*(t[mine] for t in made)), finished.at(mine)
    made = made._replace(log_probs=made.log_probs[:, :slots])  # the slots that padded() added come last
    finished = finished._replace(stored=finished.stored[:, :slots])
    return Values(*(t.clone() for t in made)), Finished(*(t.clone() for t in finished))


def _forward(request: Request, exchange: Exchange | None) -> tuple[Values, Finished]:
    ids, slot = distinct_ids(request.teacher[0])
    tiles, live = _tiles(request, exchange, ids, request.weights)
    spec = student_spec(request.spec)
    backend = tiles.serving(spec)
    _cut(tiles, backend)
    products = _Products(tiles, backend, spec) if request.only_hidden_learns else None
    state = request.weights.new_empty(tiles.student.tokens, COLUMNS)
    stored = state.new_full([len(state), ids.shape[1]], -torch.inf, dtype=loss_dtype(request.student))
    for chunk in tiles.chunks():
        folded = _WithoutIds(chunk, backend, spec, state[chunk.rows], stored[chunk.rows])
        fold_losses(chunk, [folded])
        if products is not None:
            products.add(chunk, folded)
    whole = _whole_row(spec, state, stored, tiles.rows.temperature)
    saved = [request.student[0].new_zeros(0) for _ in range(2)] if products is None else products.rows()
    given = request.teacher[0] if live is None else request.teacher[0][live]
    slot = slot if live is None else slot[live]
    read_off = _read_off(tiles, given, slot, state, stored, whole)
    finished = Finished(state, stored, torch.stack(whole, 1), *saved)
    if tiles.rows.labels is not None:  # of no ids and no rest there is no softmax
        finished.whole.masked_fill_((tiles.rows.labels < 0)[:, None], 0.0)
    if live is None:
        return read_off, finished

    nothing = empty_results(request)

    def spread(few: Tensor, all_of_them: Tensor) -> Tensor:
        return all_of_them.index_copy_(0, live, few) if all_of_them.numel() else all_of_them

    return Values(*map(spread, read_off, nothing[0])), Finished(*map(spread, finished, nothing[1]))


def backward(
    request: Request, arriving: Tensor, finished: Finished, grad: Tensor | None = None
) -> list[Tensor]:
    """The gradients that are needed. ``arriving`` ``[N, K]`` is for the log-probabilities; the entropy's is a column of the
    request's weights. ``grad``: a buffer ``[..., V]`` for the gradient of given logits."""
    request, exchange = with_all_tokens(request)
    if exchange is not None and exchange.own_tokens is not None:
        arriving, finished = _gathered(arriving, finished, exchange.own_tokens)
    ids, slot = distinct_ids(request.teacher[0])
    weights = _weights(request, arriving, slot)
    if request.only_hidden_learns:  # nothing is projected, so nobody waits to know which tokens are live
        return [_hidden_gradient(request, ids, weights, finished)]
    tiles, live = _tiles(request, exchange, ids, weights.rows, grad)
    if live is not None:
        weights, finished = weights.at(live), finished.at(live)
    spec = student_spec(request.spec)._replace(stats=0)
    backend = tiles.serving(spec)
    _cut(tiles, backend)
    for chunk in tiles.chunks():
        write = _writer(chunk, backend, spec, weights.at(chunk.rows), finished)
        for columns in chunk.columns():
            chunk.write(columns, [write])
    tiles.release()
    return tiles.student.gradients()


def _gathered(arriving: Tensor, finished: Finished, own: OwnTokens) -> tuple[Tensor, Finished]:
    """What belongs to the tokens of all ranks. It travels together: fp64 holds the stored logits' bits."""
    stored, arriving = own.padded(finished.stored, -torch.inf), own.padded(arriving, 0.0)
    sent = arriving, finished.state, finished.whole, stored.double()
    gathered = own.gather(torch.cat(sent, 1)).split([part.shape[1] for part in sent], 1)
    arriving, state, whole, wide_stored = (part.contiguous() for part in gathered)
    finished = finished._replace(state=state, whole=whole, stored=wide_stored.to(stored.dtype))
    return arriving / own.averaged_over, finished  # as the request's weights are


def _tiles(
    request: Request, exchange: Exchange | None, ids: Tensor, weights: Tensor, grad: Tensor | None = None
) -> tuple[Tiles, Tensor | None]:
    """(the student's tiles, the tokens that an lm_head projects; None: all, or there is no lm_head)."""
    tolerance = request.gradient_tolerance
    student = rows_of(request.student, request.columns_here, request.needs_grad, grad, exchange, tolerance)
    rows, live = PerRow(request.labels, request.temperature, weights, ids), None
    if student.is_head:
        rows, live = projected([student], rows)
    return Tiles(request, student, None, rows, exchange), live


def _cut(tiles: Tiles, backend: Backend) -> None:
    request, beside = tiles.request, backend.bytes_per_logit(tiles.dtypes)
    if request.only_hidden_learns and request.spec.asked & Asked.ENTROPY:
        beside += request.student[0].itemsize  # two gradients of a tile
    tiles.cut(beside=beside, per_row=request.teacher[0].shape[1] * SLOT_BYTES)


class _WithoutIds:
    """A chunk's rows without their ids, whose logits are ``stored``. Both are written where they are given."""

    def __init__(self, chunk: Chunk, backend: Backend, spec: Spec, state: Tensor, stored: Tensor) -> None:
        self.chunk, self.backend, self.spec, self.state, self.stored = chunk, backend, spec, state, stored
        self.passes = [first_pass(spec, chunk.given.temperature)]

    @property
    def ids(self) -> Tensor:
        assert self.chunk.given.ids is not None
        return self.chunk.given.ids

    def begin(self) -> None:
        begin(self.state)

    def fold(self, number: int, tile: Tile) -> None:
        fold_without(self.backend, tile, self.spec, self.state, self.ids, self.stored)

    def finish(self) -> None:
        exchange, stored = self.chunk.exchange, self.stored
        if exchange is not None:
            stored.copy_(exchange.logits_at(lambda: stored, self.ids, stored.dtype, self.chunk.rows))


def _whole_row(spec: Spec, state: Tensor, stored: Tensor, temperature: Tensor) -> WholeRow:
    return whole_row(student_side(state), stored, temperature, mean=bool(spec.asked & Asked.ENTROPY))


def _read_off(
    tiles: Tiles, given: Tensor, slot: Tensor, state: Tensor, stored: Tensor, whole: WholeRow
) -> Values:
    """``given``: the caller's ids; ``slot``: the distinct id that each of them is."""
    spec, rows = tiles.request.spec, tiles.rows
    side, ids = student_side(state), rows.ids
    assert ids is not None
    made = Values(
        log_probs=whole.log_q(stored, rows.temperature).gather(1, slot).masked_fill_(given < 0, 0.0),
        entropy=whole.entropy if spec.asked & Asked.ENTROPY else torch.zeros_like(side.reference),
        logsumexp=whole.reference / rows.temperature + whole.log_sum_exp,
        top1=top_token(ids, stored, side, spec.student_map) if spec.stats else torch.full_like(ids[:, 0], -1),
    )
    if rows.labels is not None:  # a masked token has no ids
        masked = rows.labels < 0
        for t, nothing in zip(made[1:], (0.0, 0.0, -1)):
            t.masked_fill_(masked, nothing)
    return made


class _Weights(NamedTuple):
    each: Tensor  # fp64 [n, K], of the distinct ids
    total: Tensor  # fp64 [n]
    rows: Tensor  # fp64 [n, OUTPUTS], as backends take them: SOFT says whether any of `each` is not 0

    def at(self, rows: slice | Tensor) -> _Weights:
        return _Weights(*(t[rows] for t in self))


def _weights(request: Request, arriving: Tensor, slot: Tensor) -> _Weights:
    arriving = arriving.masked_fill(request.teacher[0] < 0, 0.0)
    each = torch.zeros_like(arriving).scatter_add_(1, slot, arriving)
    rows = request.weights.clone()
    rows[:, Output.SOFT] = (each != 0).any(-1)
    return _Weights(each, each.sum(-1), rows)


def _writer(chunk: Chunk, backend: Backend, spec: Spec, weights: _Weights, finished: Finished) -> Writer:
    """Writes the gradient of a chunk's tiles."""
    state, stored = finished.state[chunk.rows], finished.stored[chunk.rows]
    ids, temperature = chunk.given.ids, chunk.given.temperature
    assert ids is not None
    whole = WholeRow(*finished.whole[chunk.rows].unbind(1))
    rest = weights.total * whole.q_rest / -temperature
    at_ids = _at_ids(ids, temperature, weights, whole.log_q(stored, temperature))
    sparse = _sparse(ids, rest, at_ids.to(stored.dtype), whole)

    def write(tile: Tile, gradients: Gradients) -> None:
        backend.gradient(tile, weights.rows, spec, state, gradients, sparse)

    return write


def _at_ids(ids: Tensor, temperature: Tensor, weights: _Weights, log_q: Tensor) -> Tensor:
    """The gradient of the weighted log-probabilities for the logits at the distinct ids, w_k - (sum w) q_k, so that
    1 - q_k keeps its digits."""
    others = weights.total[:, None] - weights.each
    lost = (others * log_q.exp()).addcmul_(weights.each, log_q.expm1())
    return lost.div_(-temperature[:, None]).masked_fill_(ids < 0, 0.0)


def _hidden_gradient(request: Request, ids: Tensor, weights: _Weights, finished: Finished) -> Tensor:
    """dH without another projection."""
    hidden, weight = request.student[:2]
    made = torch.empty_like(flat(hidden), memory_format=torch.contiguous_format)
    gathered_bytes = hidden.shape[-1] * (wide(hidden.dtype).itemsize + hidden.itemsize)
    step = max(request.chunk_bytes // (ids.shape[1] * (SLOT_BYTES + gathered_bytes)), 1)
    given = PerRow(request.labels, request.temperature, request.weights, ids)
    for start in range(0, len(made), step):
        rows = slice(start, start + step)
        made[rows] = _hidden_rows(request, weight, given.at(rows), weights.at(rows), finished.at(rows))
    return made


def _hidden_rows(
    request: Request, weight: Tensor, given: PerRow, weights: _Weights, finished: Finished
) -> Tensor:
    ids, stored, logit_map = given.ids, finished.stored, request.spec.student_map
    assert ids is not None
    log_q = WholeRow(*finished.whole.unbind(1)).log_q(stored, given.temperature)
    each = logit_map.backward(_at_ids(ids, given.temperature, weights, log_q), stored.double())
    dtype = wide(weight.dtype)
    each = each.to(dtype).masked_fill(ids < 0, 0.0)
    lm_head_rows = F.embedding(ids.clamp(min=0), weight).to(dtype)
    # A product over one id is a multiplication, at which cuBLAS is slow.
    one = ids.shape[1] == 1
    grad = each * lm_head_rows[:, 0] if one else torch.bmm(each[:, None], lm_head_rows)[:, 0]
    grad -= weights.total[:, None].to(dtype) * finished.others_rows
    if request.spec.asked & Asked.ENTROPY:
        by = weights.rows[:, Output.ENTROPY, None].to(dtype)
        grad += (by * finished.entropy_rows).masked_fill_(by == 0, 0.0)
    nothing = (weights.rows == 0).all(-1, keepdim=True)
    if given.labels is not None:
        nothing |= given.labels[:, None] < 0
    return grad.masked_fill(nothing, 0.0)


def _sparse(ids: Tensor, rest: Tensor, stored: Tensor, whole: WholeRow) -> SparseGradient:
    softmax = torch.stack([whole.reference, whole.log_sum_exp, whole.mean_shift], 1)
    return SparseGradient(ids, rest, stored, rest.new_zeros(len(rest), 2), softmax)


class _Products:
    """What dH is made of where hidden states alone need a gradient: see :class:`Finished`."""

    def __init__(self, tiles: Tiles, backend: Backend, spec: Spec) -> None:
        request, student = tiles.request, tiles.student
        assert isinstance(student, HeadRows)
        self.backend, self.spec = backend, spec
        self.outputs = [Output.SOFT] + [Output.ENTROPY] * bool(spec.asked & Asked.ENTROPY)
        tensors = [student.hidden, *request.student[1:]]
        self.heads = [HeadRows(tensors, request.vocab, request.needs_grad) for _ in self.outputs]

    def add(self, chunk: Chunk, folded: _WithoutIds) -> None:
        """Adds the products of a chunk that is folded."""
        state, stored, temperature = folded.state, folded.stored, chunk.given.temperature
        whole = _whole_row(self.spec, state, stored, temperature)
        sparse = _sparse(folded.ids, whole.q_rest / temperature, torch.zeros_like(stored), whole)
        for columns in chunk.columns():
            tile = chunk.tile(columns)
            for output, head in zip(self.outputs, self.heads):
                weights = state.new_zeros(len(state), OUTPUTS)
                weights[:, output] = 1
                if output == self.outputs[-1]:  # it may overwrite the tile
                    grad = head.gradient_tile(tile.student, chunk.rows, columns)
                else:
                    grad = torch.empty_like(tile.student, dtype=head.dtype)
                assert grad is not None
                self.backend.gradient(tile, weights, self.spec, state, Gradients(grad, None), sparse)
                head.backward(grad, chunk.rows, columns)

    def rows(self) -> list[Tensor]:
        """The products of all tokens, as :class:`Finished` has them."""
        made = [head.gradients()[0] for head in self.heads]
        return made if len(made) > 1 else [*made, made[0].new_zeros(0)]
