"""A request's tiles of logits: how tokens and vocabulary are cut, where tiles come from and where gradients go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import serving
from ..backends.protocol import Backend, Gradients, Tile
from ..backends.row_state import Pass
from ..backends.spec import Spec
from ..dtypes import widest
from .exchange import Exchange
from .layout import flat
from .request import Request
from .rows import HeadRows, LogitRows
from .schedule import Plan, plan

Rows = LogitRows | HeadRows
#: Writes the gradient of one tile into buffers for it.
Writer = Callable[[Tile, Gradients], None]
#: Temporaries per slot of a sparse target: distinct ids, log-masses in fp64, and the outcome problem.
SLOT_BYTES = 256


class PerRow(NamedTuple):
    """What a request says of each of its rows, or of some of them."""

    labels: Tensor | None
    temperature: Tensor
    weights: Tensor
    ids: Tensor | None = None  # of a sparse target
    values: Tensor | None = None

    def at(self, rows: slice | Tensor) -> PerRow:
        one_for_all = self.temperature.shape[0] == 1
        return PerRow(
            None if self.labels is None else self.labels[rows],
            self.temperature if one_for_all else self.temperature[rows],
            self.weights[rows],
            None if self.ids is None else self.ids[rows],
            None if self.values is None else self.values[rows],
        )


def sources(request: Request, grads: Gradients, exchange: Exchange | None) -> tuple[Rows, Rows | None]:
    """Where both models' tiles come from; None for a teacher that is none, or a sparse target."""
    needs = request.needs_grad
    count = len(request.student)
    columns, tolerance = request.columns_here, request.gradient_tolerance
    student = rows_of(request.student, columns, needs[:count], grads.student, exchange, tolerance)
    if not request.teacher or request.spec.tail:
        return student, None
    return student, rows_of(request.teacher, columns, needs[count:], grads.teacher, exchange, tolerance)


def rows_of(
    tensors: list[Tensor],
    vocab: int,
    wanted: list[bool],
    grad: Tensor | None,
    exchange: Exchange | None = None,
    tolerance: float = 0.0,
) -> Rows:
    """The rows of one model: given logits, whose gradient goes into the buffer ``grad``, or hidden states, an lm_head and its
    bias."""
    if len(tensors) > 1:
        return HeadRows([flat(tensors[0]), *tensors[1:]], vocab, wanted, exchange, tolerance)
    return LogitRows(tensors[0], vocab, grad)


def live_tokens(labels: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """(the tokens that take part, the others), or None where all do: an lm_head projects no others."""
    if labels is None:
        return None
    dead = labels < 0
    count = labels.numel() - int(dead.sum())
    if count == labels.numel():
        return None
    live, others = dead.to(torch.uint8).argsort(stable=True).tensor_split([count])
    return live, others


def projected(sides: list[Rows], rows: PerRow) -> tuple[PerRow, Tensor | None]:
    """Only the tokens that take part are projected: (what is said of them, which they are; None: all)."""
    split = live_tokens(rows.labels)
    for side in sides:
        if split is None:
            side.gather()
        else:
            side.keep_live(*split)
    live = None if split is None else split[0]
    rows = rows if live is None else rows.at(live)
    weightless = (rows.weights == 0).all(-1)
    for side in sides:
        if isinstance(side, HeadRows):
            side.leave_out(weightless)
    return rows, live


def _already_read() -> None:
    """A further loss's part of a pass: its tiles were read with the first's."""


class Tiles:
    """Both models' tiles of the tokens that ``rows`` speaks of. Nothing is cut before ``cut`` is called."""

    plan: Plan

    def __init__(
        self,
        request: Request,
        student: Rows,
        teacher: Rows | None,
        rows: PerRow,
        exchange: Exchange | None,
    ) -> None:
        self.request, self.student, self.teacher, self.rows = request, student, teacher, rows
        self.exchange = exchange
        self.sides = [student] if teacher is None else [student, teacher]
        self.dtypes = [dtype for side in self.sides for dtype in side.dtypes]
        self.wide = widest(self.dtypes)

    @property
    def needs_grad(self) -> bool:
        return any(side.needs_grad for side in self.sides)

    def serving(self, spec: Spec) -> Backend:
        return serving(self.request.backend, self.rows.weights.device, self.dtypes, spec)

    def cut(self, *, beside: int, per_row: int = 0) -> None:
        """So that tiles fit the budget with ``beside`` bytes more for each logit and ``per_row`` for each token."""
        per_logit = sum(side.bytes_per_logit for side in self.sides) + beside
        self._cut(per_logit, per_row, min(side.segment for side in self.sides), self.request.chunk_bytes)

    def cut_tokens(self, *, per_row: int) -> None:
        """For a walk that looks at no tile, but at rows of an lm_head that are gathered for a chunk of tokens: these
        take no more than the logits of all tokens would."""
        student, most = self.student, self.request.chunk_bytes
        if student.is_head:
            most = min(most, max(student.tokens * self._columns * student.bytes_per_logit, per_row))
        self._cut(0, per_row, student.tokens, most)

    @property
    def _columns(self) -> int:
        """Columns of the widest shard, so that all ranks cut the same chunks of tokens."""
        place = self.request.place
        return self.request.vocab if place is None else place.widest

    def _cut(self, per_logit: int, per_row: int, segment: int, chunk_bytes: int) -> None:
        made = plan(
            tokens=self.student.tokens,
            vocab=self._columns,
            bytes_per_logit=per_logit,
            bytes_per_row=per_row,
            chunk_bytes=chunk_bytes,
            segment=segment,
        )
        self.plan = replace(made, vocab=self.request.columns_here)

    def release(self) -> None:
        """Once all are done: completing the gradients takes memory too."""
        for side in self.sides:
            if isinstance(side, HeadRows):
                side.memory = None

    def chunks(self) -> Iterator[Chunk]:
        return (Chunk(self, rows) for rows in self.plan.row_chunks())


class Chunk:
    """Some tokens, and their tiles. Where a whole row is one tile, that tile is made once."""

    def __init__(self, tiles: Tiles, rows: slice) -> None:
        self.tiles, self.rows = tiles, rows
        self.given = tiles.rows if rows == slice(0, tiles.plan.tokens) else tiles.rows.at(rows)
        self.exchange = tiles.exchange
        self._only: Tile | None = None

    @property
    def one_tile(self) -> bool:
        return self.tiles.plan.one_tile_per_row

    def columns(self) -> list[slice]:
        """On an empty shard one tile without columns: it has a part in the sum of dH."""
        return list(self.tiles.plan.column_chunks()) or [slice(0, 0)]

    def tile(self, columns: slice) -> Tile:
        if self._only is not None:
            return self._only
        student, teacher, request = self.tiles.student, self.tiles.teacher, self.tiles.request
        tile = Tile(
            student.tile(self.rows, columns),
            None if teacher is None else teacher.tile(self.rows, columns),
            self.given.labels,
            self.given.temperature,
            request.parameters[0],
            columns.start + (0 if self.exchange is None else self.exchange.place.start),
            request.vocab,
        )
        if self.one_tile:
            self._only = tile
        return tile

    def read(self, visit: Callable[[Tile], None]) -> None:
        """Every tile that has any columns."""
        for columns in self.columns():
            tile = self.tile(columns)
            if tile.student.shape[1]:
                visit(tile)

    def fold(self, visit: Callable[[Tile], None], passes: list[tuple[Pass, Tensor]]) -> None:
        """Read this rank's tiles into states, and merge them with what the other ranks have read into theirs."""
        if self.exchange is None:
            self.read(visit)
            return
        (merger, state), *others = passes
        self.exchange.merge(partial(self.read, visit), merger, state)
        for merger, state in others:
            self.exchange.merge(_already_read, merger, state)

    def write(self, columns: slice, writers: list[Writer]) -> None:
        """Let all write their gradient of a tile, and take the sum to where it belongs. The last may write over the
        logits; those before it get a buffer in the arithmetic's dtype, and none for the teacher."""
        tile, (*before, last) = self.tile(columns), writers
        student, teacher = self.tiles.student, self.tiles.teacher
        theirs = None
        if teacher is not None and tile.teacher is not None:
            theirs = teacher.gradient_tile(tile.teacher, self.rows, columns)
        grads = Gradients(student.gradient_tile(tile.student, self.rows, columns), theirs)
        if tile.student.shape[1]:
            others = self._summed(tile, before, needed=grads.student is not None)
            assert not before or grads.teacher is None, "several losses of a teacher that learns"
            last(tile, grads)
            if others is not None and grads.student is not None:
                grads.student.add_(others)
        for side, grad in zip((student, teacher), grads):
            if side is not None and grad is not None:
                side.backward(grad, self.rows, columns)

    def _summed(self, tile: Tile, writers: list[Writer], *, needed: bool) -> Tensor | None:
        total: Tensor | None = None
        for write in writers:
            grad = tile.student.new_empty(tile.student.shape, dtype=self.tiles.wide) if needed else None
            write(tile, Gradients(grad, None))
            total = grad if total is None or grad is None else total.add_(grad)
        return total
