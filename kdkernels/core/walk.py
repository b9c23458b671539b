"""The one tile loop: dense and sparse targets, whole rows and vocabulary chunks, one loss or several.

A :class:`Request` is walked in chunks of tokens. Where a whole row fits the budget, a chunk is one tile and one
call of the backend for each loss. Else the vocabulary is cut: every tile is folded into the rows' states, and then
made again for its gradient. "conditional" without a hard term looks at the stored ids alone: K columns of given
logits, K gathered rows of an lm_head, nothing as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..backends.protocol import Backend, Gradients, Tile
from ..backends.row_state import COLUMNS
from ..backends.spec import OUTPUTS, RESULTS, Asked, Tail
from .exchange import Exchange, Merged, OwnTokens
from .layout import flat
from .request import Request, loss_dtype
from .row_losses import DenseLoss, Folded, RowLoss, SparseLoss, entropy_beside
from .stored_ids import stored_ids
from .tiles import SLOT_BYTES, Chunk, PerRow, Tiles, projected, sources


def merged_for(request: Request) -> Merged:
    """Room for what the walk of a shard leaves to its backward; none where nothing is exchanged, or tokens are."""
    place, tokens = request.place, request.weights.shape[0]  # len() would fix it under torch.export
    keeps = tokens if place is not None and not place.own_tokens else 0
    slots = request.teacher[0].shape[-1] if request.spec.tail else 0
    return Merged(
        request.weights.new_empty(keeps, _how_many(request), COLUMNS),
        request.weights.new_empty(keeps, slots, dtype=loss_dtype(request.student)),
    )


def _how_many(request: Request) -> int:
    """Losses: beside a sparse target the entropy is one of its own."""
    return len(request.specs) + bool(request.spec.tail and request.spec.asked & Asked.ENTROPY)


def walk(request: Request, grads: Gradients, merged: Merged | None = None) -> list[Tensor]:
    """[results ``[N, D * RESULTS]``, *gradients that are needed], in the order of the request's tensors.

    ``grads``: buffers ``[..., V]`` for the gradients of given logits; an lm_head's are made here.
    """
    request, exchange = with_all_tokens(request)
    own = None if exchange is None else exchange.own_tokens
    if exchange is not None and own is None:
        exchange.merged = merged
    student, teacher = sources(request, grads, exchange)
    sides = [student] if teacher is None else [student, teacher]
    rows, live = _per_row(request), None
    if any(side.is_head for side in sides):
        rows, live = projected(sides, rows)
    tiles = Tiles(request, student, teacher, rows, exchange)
    results = _results(tiles)
    tiles.release()
    if live is not None:
        everywhere = results.new_zeros(request.weights.shape[0], results.shape[1])
        results = everywhere.index_copy_(0, live, results)
    if own is not None:
        results = results[own.rows].clone()
    return [results, *(g for side in sides for g in side.gradients())]


def _per_row(request: Request) -> PerRow:
    ids, values = request.teacher if request.spec.tail else (None, None)
    return PerRow(request.labels, request.temperature, request.weights, ids, values)


def with_all_tokens(request: Request) -> tuple[Request, Exchange | None]:
    """(the request, the exchanges of its walk; None: the whole vocabulary is here). Where each rank has tokens of its
    own, the request's are those of all ranks."""
    if request.place is None:
        return request, None
    exchange = Exchange(request.place)
    slots = request.teacher[0].shape[-1] if request.spec.tail else 0
    own = exchange.gather_tokens(len(request.weights), slots, request.weights.device)
    return (request if own is None else _gathered(request, own)), exchange


def _gathered(request: Request, own: OwnTokens) -> Request:
    """The same with the tokens of all ranks. What is said of a token travels together: its label (exact in fp64),
    temperature and weights."""
    weights = request.weights
    # A rank that masks nothing has no labels; others may, and all ranks must leave out the same tokens.
    label = torch.zeros_like(weights[:, 0]) if request.labels is None else request.labels.double()
    temperature = request.temperature.expand(len(weights))
    gathered = own.gather(torch.cat([torch.stack([label, temperature], 1), weights], 1))
    return replace(
        request,
        student=[own.gather(flat(request.student[0])), *request.student[1:]],
        teacher=_gathered_teacher(request, own),
        labels=gathered[:, 0].long(),
        temperature=gathered[:, 1].contiguous(),
        weights=gathered[:, 2:] / own.averaged_over,  # dH is multiplied by it again, in a wide dtype
    )


def _gathered_teacher(request: Request, own: OwnTokens) -> list[Tensor]:
    """Hidden states of all tokens beside this rank's lm_head; or ids and values, of which ranks may have more or fewer
    a token."""
    if not request.spec.tail:
        return [t if at else own.gather(flat(t)) for at, t in enumerate(request.teacher)]
    empty = -1, 0.0 if request.spec.linear else -torch.inf
    return [own.gather(own.padded(t, nothing)) for t, nothing in zip(request.teacher, empty)]


def _results(tiles: Tiles) -> Tensor:
    spec, made = tiles.request.spec, []
    stored_only = spec.tail == Tail.CONDITIONAL and not spec.asked & Asked.HARD
    backends = [tiles.serving(each) for each in tiles.request.specs]
    _cut(tiles, backends, stored_only=stored_only)
    for chunk in tiles.chunks():
        if stored_only:
            made.append(stored_ids(chunk, backends[0]))
        elif chunk.one_tile and tiles.exchange is None:
            made.append(_whole_rows(chunk, _losses(chunk, backends)))
        else:
            made.append(_by_vocabulary(chunk, _losses(chunk, backends)))
    if len(made) == 1:
        return made[0]
    return torch.cat(made) if made else tiles.rows.weights.new_zeros(0, RESULTS * len(backends))


def _cut(tiles: Tiles, backends: list[Backend], *, stored_only: bool) -> None:
    slots = 0 if tiles.rows.ids is None else tiles.rows.ids.shape[1]
    per_row = slots * SLOT_BYTES
    if stored_only:
        tiles.cut_tokens(per_row=per_row + slots * tiles.student.bytes_per_stored)
        return
    beside = max(backend.bytes_per_logit(tiles.dtypes) for backend in backends)
    if tiles.student.needs_grad:  # the sum of the gradients before the last, and the next of them
        beside += min(_how_many(tiles.request) - 1, 2) * tiles.wide.itemsize
    tiles.cut(beside=beside, per_row=per_row)


def _losses(chunk: Chunk, backends: list[Backend]) -> list[RowLoss]:
    """The chunk's losses, in the order in which they write gradients."""
    request = chunk.tiles.request
    if not request.spec.tail:
        weights = chunk.given.weights.split(OUTPUTS, 1)
        given = zip(backends, request.specs, request.parameters.unbind(), weights)
        return [DenseLoss(chunk, *each) for each in given]
    if not request.spec.asked & Asked.ENTROPY:
        return [SparseLoss(chunk, backends[0], request.spec)]
    without = request.spec._replace(asked=request.spec.asked & ~Asked.ENTROPY)
    return [entropy_beside(chunk), SparseLoss(chunk, backends[0], without)]


def _whole_rows(chunk: Chunk, losses: list[RowLoss]) -> Tensor:
    chunk.write(chunk.columns()[0], [loss.fused for loss in losses])
    return _joined(chunk, losses)


def _by_vocabulary(chunk: Chunk, losses: list[RowLoss]) -> Tensor:
    fold_losses(chunk, losses)
    if chunk.tiles.needs_grad:
        for columns in chunk.columns():
            chunk.write(columns, [loss.gradient for loss in losses])
    return _joined(chunk, losses)


def _joined(chunk: Chunk, losses: list[RowLoss]) -> Tensor:
    """Several losses' results stand side by side. Those of a sparse target and the entropy beside it are one loss's."""
    results = [loss.results for loss in losses]
    if len(results) == 1:
        return results[0]
    return torch.stack(results).sum(0) if chunk.tiles.request.spec.tail else torch.cat(results, 1)


def fold_losses(chunk: Chunk, losses: Sequence[Folded]) -> None:
    """All passes of all losses over a chunk's tiles, and what they finish with. For shards, a backward takes
    the states that its forward merged."""
    merged = None if chunk.exchange is None else chunk.exchange.merged
    for loss in losses:
        loss.begin()
    if merged is not None and merged.ready:
        for at, loss in enumerate(losses):
            loss.state.copy_(merged.state[chunk.rows, at])
    else:
        for number in range(max(len(loss.passes) for loss in losses)):
            _pass(chunk, [loss for loss in losses if number < len(loss.passes)], number)
        for at, loss in enumerate(losses):
            if merged is not None:
                merged.state[chunk.rows, at] = loss.state
    for loss in losses:
        loss.finish()


def _pass(chunk: Chunk, losses: list[Folded], number: int) -> None:
    def read(tile: Tile) -> None:
        for loss in losses:
            loss.fold(number, tile)

    chunk.fold(read, [(loss.passes[number], loss.state) for loss in losses])
