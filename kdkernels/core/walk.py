"""The one tile loop: dense and sparse targets, whole rows and vocabulary chunks.

A :class:`Request` is walked in chunks of tokens. Where a whole row fits the budget, a chunk is one tile and one
call of the backend. Else the vocabulary is cut: every chunk is folded into the rows' states, and then made again
for its gradient. "conditional" without a hard term looks at the stored ids alone: K columns of given logits, K
gathered rows of an lm_head, nothing as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import serving
from ..backends.outcomes import Outcomes, outcomes, student_spec
from ..backends.protocol import Backend, Gradients, SparseGradient, Tile
from ..backends.row_state import COLUMNS, SECOND_PASS, Pass, finish, first_pass, new_state
from ..backends.sparse_rows import Solved, Temperatures, gather_stored, no_logits, solve, student_tile
from ..backends.spec import RESULTS, Asked, Output, Spec, Tail
from .exchange import Exchange, Kept, OwnTokens
from .layout import flat
from .request import Request, loss_dtype
from .rows import HeadRows, LogitRows, Stored
from .schedule import Plan, plan

Rows = LogitRows | HeadRows
#: Temporaries per slot of a sparse target: distinct ids, log-masses in fp64, and the outcome problem.
SLOT_BYTES = 256


class PerRow(NamedTuple):
    """What a request says of each of its rows, or of some of them."""

    labels: Tensor | None
    temperature: Tensor
    weights: Tensor
    ids: Tensor | None  # of a sparse target
    values: Tensor | None

    def at(self, rows: slice | Tensor) -> PerRow:
        one_for_all = self.temperature.shape[0] == 1
        return PerRow(
            None if self.labels is None else self.labels[rows],
            self.temperature if one_for_all else self.temperature[rows],
            self.weights[rows],
            None if self.ids is None else self.ids[rows],
            None if self.values is None else self.values[rows],
        )


def kept_for(request: Request) -> Kept:
    """Room for what the walk of a shard leaves to its backward; none where nothing is exchanged, or tokens are."""
    place, tokens = request.place, request.weights.shape[0]  # len() would fix it under torch.export
    keeps = tokens if place is not None and not place.own_tokens else 0
    slots = request.teacher[0].shape[-1] if request.spec.tail else 0
    return Kept(
        request.weights.new_empty(keeps, COLUMNS),
        request.weights.new_empty(keeps, slots, dtype=loss_dtype(request.student)),
    )


def walk(request: Request, grads: Gradients, kept: Kept | None = None) -> list[Tensor]:
    """[results, *gradients that are needed], in the order of the request's tensors.

    ``grads``: buffers ``[..., V]`` for the gradients of given logits; an lm_head's are made here.
    """
    place = request.place
    exchange = None if place is None else Exchange(place)
    own = None if exchange is None else exchange.gather_tokens(len(request.weights), request.weights.device)
    if own is not None:
        request = _gathered(request, own)
    elif exchange is not None:
        exchange.kept = kept
    student, teacher = sources(request, grads, exchange)
    sides = [side for side in (student, teacher) if side is not None]
    rows, live = _per_row(request), None
    if any(side.is_head for side in sides):
        rows, live = projected(sides, rows)
    results = _Walk(request, student, teacher, rows, exchange).run()
    if live is not None:
        results = results.new_zeros(request.weights.shape[0], RESULTS).index_copy_(0, live, results)
    if own is not None:
        results = own.own(results).clone()
    return [results, *(g for side in sides for g in side.gradients())]


def _gathered(request: Request, own: OwnTokens) -> Request:
    """The same with the tokens of all ranks. What is said of a token travels together: its label (exact in fp64),
    temperature and weights."""
    weights = request.weights
    label = torch.zeros_like(weights[:, 0]) if request.labels is None else request.labels.double()
    temperature = request.temperature.expand(len(weights))
    said = own.gather(torch.cat([torch.stack([label, temperature], 1), weights], 1))
    sparse = bool(request.spec.tail)
    return replace(
        request,
        student=[own.gather(flat(request.student[0])), *request.student[1:]],
        teacher=[own.gather(flat(t)) if sparse or not i else t for i, t in enumerate(request.teacher)],
        labels=None if request.labels is None else said[:, 0].long(),
        temperature=said[:, 1].contiguous(),
        weights=said[:, 2:] / own.averaged_over,  # dH is multiplied by it again, in a wide dtype
    )


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
    if len(tensors) > 1:
        return HeadRows([flat(tensors[0]), *tensors[1:]], vocab, wanted, exchange, tolerance)
    return LogitRows(tensors[0], vocab, grad)


def _per_row(request: Request) -> PerRow:
    ids, values = request.teacher if request.spec.tail else (None, None)
    return PerRow(request.labels, request.temperature, request.weights, ids, values)


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


class _Walk:
    """A request's chunks of tokens, one after the other."""

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
        self.spec, self.sparse = request.spec, bool(request.spec.tail)
        sides = [student] if teacher is None else [student, teacher]
        self.dtypes = [dtype for side in sides for dtype in side.dtypes]
        self.wide = torch.float64 if torch.float64 in self.dtypes else torch.float32
        self.backend: Backend = serving(request.backend, rows.weights.device, self.dtypes, self.spec)
        self.tiles = self._plan(sides)

    @property
    def stored_only(self) -> bool:
        return self.spec.tail == Tail.CONDITIONAL and not self.spec.asked & Asked.HARD

    def _plan(self, sides: list[Rows]) -> Plan:
        each = sum(side.bytes_per_logit for side in sides) + self.backend.bytes_per_logit(self.dtypes)
        per_row = 0
        if self.sparse and self.spec.asked & Asked.ENTROPY and self.student.needs_grad:
            each += self.wide.itemsize  # its gradient is a tile of its own
        if self.rows.ids is not None:
            slots = self.rows.ids.shape[1]
            per_row = slots * SLOT_BYTES
            if self.stored_only:
                each, per_row = 0, per_row + slots * self.student.bytes_per_stored
        place, here = self.request.place, self.request.columns_here
        tiles = plan(
            tokens=self.student.tokens,
            vocab=here if place is None else place.widest,
            bytes_per_logit=each,
            bytes_per_row=per_row,
            chunk_bytes=self.request.chunk_bytes,
            segment=self.student.tokens if self.stored_only else min(side.segment for side in sides),
        )
        return replace(tiles, vocab=here)  # all ranks have the same chunks of tokens

    def run(self) -> Tensor:
        results = self.rows.weights.new_zeros(self.student.tokens, RESULTS)
        for rows in self.tiles.row_chunks():
            chunk = _Chunk(self, rows, self.rows.at(rows))
            if self.stored_only:
                results[rows] = chunk.stored_ids()
            elif self.tiles.one_tile_per_row and self.exchange is None:
                results[rows] = chunk.whole_rows()
            else:
                results[rows] = chunk.by_vocabulary()
        return results


@dataclass
class _Chunk:
    """One chunk of tokens."""

    walk: _Walk
    rows: slice
    given: PerRow

    def __post_init__(self) -> None:
        self.spec, self.backend, self.vocab = self.walk.spec, self.walk.backend, self.walk.request.vocab
        self.exchange = self.walk.exchange
        self.held: Tile | None = None
        self.target: Outcomes | None = None
        self.entropy: _EntropyApart | None = None
        if self.given.ids is not None and self.spec.asked & Asked.ENTROPY:
            self.entropy = _EntropyApart(self)
            self.spec = self.spec._replace(asked=self.spec.asked & ~Asked.ENTROPY)
        if self.given.ids is not None and self.given.values is not None:
            self.target = outcomes(
                self.given.ids,
                self.given.values,
                self.given.temperature,
                self.spec,
                vocab=self.vocab,
                dtype=self.walk.wide,
            )

    def tile(self, columns: slice) -> Tile:
        """Of shards, the only tile of these rows is held between the passes."""
        if self.held is not None:
            return self.held
        teacher = self.walk.teacher
        tile = Tile(
            self.walk.student.tile(self.rows, columns),
            None if teacher is None else teacher.tile(self.rows, columns),
            self.given.labels,
            self.given.temperature,
            self.walk.request.parameters,
            columns.start + (0 if self.exchange is None else self.exchange.place.start),
            self.vocab,
        )
        if self.exchange is not None and self.walk.tiles.one_tile_per_row:
            self.held = tile
        return tile

    def column_chunks(self) -> list[slice]:
        """On an empty shard one chunk without columns: it has a part in the sum of dH."""
        return list(self.walk.tiles.column_chunks()) or [slice(0, 0)]

    def buffers(self, tile: Tile, columns: slice) -> Gradients:
        teacher = self.walk.teacher
        theirs = None
        if teacher is not None and tile.teacher is not None and self.spec.asked & Asked.TEACHER_LABEL:
            theirs = teacher.gradient_tile(tile.teacher, self.rows, columns)
        return Gradients(self.walk.student.gradient_tile(tile.student, self.rows, columns), theirs)

    def backward(self, gradients: Gradients, columns: slice) -> None:
        for side, grad in zip((self.walk.student, self.walk.teacher), gradients):
            if side is not None and grad is not None:
                side.backward(grad, self.rows, columns)

    def whole_rows(self) -> Tensor:
        columns = slice(0, self.vocab)
        tile = self.tile(columns)
        gradients = self.buffers(tile, columns)
        if self.target is None:
            results = self.backend.fused(tile, self.given.weights, self.spec, gradients)
        else:
            apart = None if self.entropy is None else self.entropy.fused(tile)
            results = self.backend.fused_sparse(tile, self.target, self.given.weights, self.spec, gradients)
            if self.entropy is not None:
                results += self.entropy.results
                self.entropy.add(apart, gradients)
        self.backward(gradients, columns)
        return results

    def by_vocabulary(self) -> Tensor:
        state = new_state(self.given.weights.shape[0], self.given.weights.device)
        if self.target is None:
            results, spec, sparse = self._fold(state), self.spec, None
        else:
            solved = self._fold_sparse(state, self.target)
            if self.entropy is not None:
                solved = solved._replace(results=solved.results + self.entropy.results)
            results, spec, sparse = solved.results, student_spec(self.spec), solved.gradient
        if self.needs_grad:
            for columns in self.column_chunks():
                self._gradient(columns, spec, state, sparse)
        return results

    @property
    def needs_grad(self) -> bool:
        teacher = self.walk.teacher
        return self.walk.student.needs_grad or (teacher is not None and teacher.needs_grad)

    def _fold(self, state: Tensor) -> Tensor:
        def first() -> None:
            for tile in self._tiles():
                self.backend.accumulate(tile, self.spec, state)

        def second() -> None:
            for tile in self._tiles():
                self.backend.accumulate_value(tile, self.spec, state)

        self._everywhere(first, first_pass(self.spec, self.given.temperature), state)
        if self.spec.asked & Asked.SOFT and self.spec.closed_form is None:
            self._everywhere(second, SECOND_PASS, state)
        return finish(state, self.spec, self.given.labels, self.vocab)

    def _everywhere(self, here: Callable[[], None], merger: Pass, state: Tensor) -> None:
        """Let ``here`` fold this rank's tiles into the state, and merge what the other ranks have folded."""
        if self.exchange is None:
            here()
        else:
            self.exchange.merge(here, merger, state, self.rows)

    def _tiles(self) -> Iterator[Tile]:
        """Those with any columns."""
        for columns in self.column_chunks():
            tile = self.tile(columns)
            if tile.student.shape[1]:
                yield tile

    def _fold_sparse(self, state: Tensor, target: Outcomes) -> Solved:
        inner, stored = student_spec(self.spec), no_logits(target)

        def first() -> None:
            for tile in self._tiles():
                self.backend.accumulate(student_tile(tile, self.spec), inner, state, skipped=target.ids)
                gather_stored(stored, tile.student, target.ids, tile.offset, self.spec.student_map)
                if self.entropy is not None:
                    self.entropy.accumulate(tile)

        own = Temperatures.of(self.spec, self.given.temperature).student
        self._everywhere(first, first_pass(inner, own), state)
        if self.entropy is not None:
            self.entropy.finish()
        if self.exchange is None:
            return self._solve(target, stored, state)
        whole = self.exchange.stored(lambda: stored, target.ids, stored.dtype, self.rows)
        return self._solve(target, whole, state)

    def _solve(self, target: Outcomes, stored: Tensor, state: Tensor) -> Solved:
        given, parameters = self.given, self.walk.request.parameters
        tile = Tile(stored, None, given.labels, given.temperature, parameters, 0, self.vocab)
        return solve(self.backend, tile, target, stored, self.spec, state, self.needs_grad)

    def _gradient(self, columns: slice, spec: Spec, state: Tensor, sparse: SparseGradient | None) -> None:
        tile = self.tile(columns)
        gradients = self.buffers(tile, columns)
        apart = None if self.entropy is None else self.entropy.gradient(tile)
        if sparse is not None:
            tile = student_tile(tile, self.spec)
        if tile.student.shape[1]:
            self.backend.gradient(tile, self.given.weights, spec, state, gradients, sparse)
        if self.entropy is not None:
            self.entropy.add(apart, gradients)
        self.backward(gradients, columns)

    def stored_ids(self) -> Tensor:
        """The row's soft term from its stored ids alone."""
        assert self.target is not None
        student, ids, logit_map = self.walk.student, self.target.ids, self.spec.student_map
        here = ids if self.exchange is None else self.exchange.local(ids)
        found, wide = Stored(ids, None), self.target.teacher.dtype

        def look() -> Tensor:
            nonlocal found
            found = student.stored(self.rows, here)
            return logit_map.logits(found.logits, wide)

        if self.exchange is None:
            logits = torch.where(ids >= 0, look(), -torch.inf)
        else:
            logits = self.exchange.stored(look, ids, wide, self.rows)
        solved = self._solve(self.target, logits, new_state(ids.shape[0], ids.device))
        if student.needs_grad:
            weight = self.given.weights[:, Output.SOFT, None]
            if self.given.labels is not None:
                weight = torch.where(self.given.labels[:, None] >= 0, weight, 0.0)
            grad = logit_map.backward(solved.gradient.stored, logits) * weight.to(logits.dtype)
            grad = torch.where((here >= 0) & (weight != 0), grad, 0.0)
            student.backward_stored(grad, self.rows, here, found)
        return solved.results


class _EntropyApart:
    """The student's entropy beside a sparse target, which sees the student through other outcomes, and some at
    another temperature: a dense output of the same tiles, whose gradient is added to the target's."""

    def __init__(self, chunk: _Chunk) -> None:
        spec = chunk.spec
        self.chunk, self.backend, self.given = chunk, chunk.backend, chunk.given
        self.spec = Spec(
            asked=Asked.ENTROPY,
            tempered=spec.tempered,
            student_scale=spec.student_scale,
            student_softcap=spec.student_softcap,
        )
        self.state = new_state(self.given.weights.shape[0], self.given.weights.device)
        self.results = torch.zeros(())

    def _buffer(self, tile: Tile) -> Tensor | None:
        needed = self.chunk.walk.student.needs_grad
        return tile.student.new_empty(tile.student.shape, dtype=self.chunk.walk.wide) if needed else None

    def fused(self, tile: Tile) -> Tensor | None:
        """The gradient of whole rows. It is made first: the target's may overwrite them."""
        grad = self._buffer(tile)
        self.results = self.backend.fused(tile, self.given.weights, self.spec, Gradients(grad, None))
        return grad

    def accumulate(self, tile: Tile) -> None:
        self.backend.accumulate(tile, self.spec, self.state)

    def finish(self) -> None:
        self.results = finish(self.state, self.spec, self.given.labels, self.chunk.vocab)

    def gradient(self, tile: Tile) -> Tensor | None:
        grad = self._buffer(tile)
        if grad is not None and tile.student.shape[1]:
            self.backend.gradient(tile, self.given.weights, self.spec, self.state, Gradients(grad, None))
        return grad

    @staticmethod
    def add(grad: Tensor | None, gradients: Gradients) -> None:
        if grad is not None and gradients.student is not None:
            gradients.student.add_(grad)
