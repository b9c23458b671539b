"""A loss of a chunk's rows, as the walk over their tiles sees it: how they are folded, finished, and differentiated."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..backends.outcomes import Outcomes, outcomes, student_spec
from ..backends.protocol import Backend, Gradients, SparseGradient, Tile
from ..backends.row_state import SECOND_PASS, Pass, finish, first_pass, new_state
from ..backends.sparse_rows import Solved, Temperatures, fold_without, no_logits, solve, student_tile
from ..backends.spec import Asked, Spec
from .tiles import Chunk


class Folded(Protocol):
    """Rows that ``passes`` over their tiles fold into ``state``."""

    passes: list[Pass]
    state: Tensor

    def begin(self) -> None:
        """A new state."""

    def fold(self, number: int, tile: Tile) -> None:
        """The pass of this number over one tile."""

    def finish(self) -> None:
        """What follows from the states of whole rows."""


class RowLoss(Folded, Protocol):
    """A loss of rows, made of whole rows at once by ``fused``, or of finished states by ``gradient``."""

    results: Tensor

    def fused(self, tile: Tile, gradients: Gradients) -> None:
        """The results, and the gradient where there are buffers."""

    def gradient(self, tile: Tile, gradients: Gradients) -> None:
        """The gradient of one tile, from finished states."""


class DenseLoss:
    """A loss against a dense teacher, or without one. ``weights`` are its rows' for each output."""

    state: Tensor
    results: Tensor

    def __init__(
        self, chunk: Chunk, backend: Backend, spec: Spec, parameters: Tensor, weights: Tensor
    ) -> None:
        self.given, self.vocab = chunk.given, chunk.tiles.request.vocab
        self.backend, self.spec, self.parameters = backend, spec, parameters
        self.weights = weights.contiguous()
        self.passes = [first_pass(spec, self.given.temperature)]
        if spec.asked & Asked.SOFT and spec.closed_form is None:
            self.passes.append(SECOND_PASS)

    def _own(self, tile: Tile) -> Tile:
        return tile._replace(parameters=self.parameters)

    def fused(self, tile: Tile, gradients: Gradients) -> None:
        self.results = self.backend.fused(self._own(tile), self.weights, self.spec, gradients)

    def begin(self) -> None:
        self.state = new_state(self.weights.shape[0], self.weights.device)

    def fold(self, number: int, tile: Tile) -> None:
        run = self.backend.accumulate_value if number else self.backend.accumulate
        run(self._own(tile), self.spec, self.state)

    def finish(self) -> None:
        self.results = finish(self.state, self.spec, self.given.labels, self.vocab)

    def gradient(self, tile: Tile, gradients: Gradients) -> None:
        self.backend.gradient(self._own(tile), self.weights, self.spec, self.state, gradients)


def entropy_beside(chunk: Chunk) -> DenseLoss:
    """The student's entropy beside a sparse target, which sees the student through other outcomes, and some at
    another temperature."""
    request = chunk.tiles.request
    spec = Spec(
        asked=Asked.ENTROPY,
        tempered=request.spec.tempered,
        student_scale=request.spec.student_scale,
        student_softcap=request.spec.student_softcap,
    )
    backend = chunk.tiles.serving(spec)
    return DenseLoss(chunk, backend, spec, request.parameters[0], chunk.given.weights)


class SparseLoss:
    """A loss against a sparse target, through which the student's row is seen as a few outcomes."""

    state: Tensor
    stored: Tensor
    results: Tensor

    def __init__(self, chunk: Chunk, backend: Backend, spec: Spec) -> None:
        self.chunk, self.given, self.backend = chunk, chunk.given, backend
        self.spec, self.inner = spec, student_spec(spec)
        self.target = chunk_outcomes(chunk, spec)
        own = Temperatures.of(spec, self.given.temperature).student
        self.passes = [first_pass(self.inner, own)]
        self.slope: SparseGradient | None = None

    def fused(self, tile: Tile, gradients: Gradients) -> None:
        self.results = self.backend.fused_sparse(tile, self.target, self.given.weights, self.spec, gradients)

    def begin(self) -> None:
        self.state = new_state(self.given.weights.shape[0], self.given.weights.device)
        self.stored = no_logits(self.target)

    def fold(self, number: int, tile: Tile) -> None:
        tile = student_tile(tile, self.spec)
        fold_without(self.backend, tile, self.inner, self.state, self.target.ids, self.stored)

    def finish(self) -> None:
        stored, exchange = self.stored, self.chunk.exchange
        if exchange is not None:
            stored = exchange.logits_at(lambda: stored, self.target.ids, stored.dtype, self.chunk.rows)
        solved = solve_chunk(self.chunk, self.backend, self.spec, self.target, stored, self.state)
        self.results, self.slope = solved

    def gradient(self, tile: Tile, gradients: Gradients) -> None:
        tile = student_tile(tile, self.spec)
        self.backend.gradient(tile, self.given.weights, self.inner, self.state, gradients, self.slope)


def chunk_outcomes(chunk: Chunk, spec: Spec) -> Outcomes:
    given = chunk.given
    assert given.ids is not None and given.values is not None
    return outcomes(given.ids, given.values, given.temperature, spec, dtype=chunk.tiles.wide)


def solve_chunk(
    chunk: Chunk, backend: Backend, spec: Spec, target: Outcomes, stored: Tensor, state: Tensor
) -> Solved:
    given, request = chunk.given, chunk.tiles.request
    tile = Tile(stored, None, given.labels, given.temperature, request.parameters[0], 0, request.vocab)
    return solve(backend, tile, target, stored, spec, state, chunk.tiles.needs_grad)
