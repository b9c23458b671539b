"""The walk over a student's tiles with a sparse target: tokens, or tokens and vocabulary, in chunks.

"conditional" without a hard term looks at the kept ids alone: K columns of given logits, K gathered rows
of an lm_head, nothing as wide as the vocabulary.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..backends import row_state as rs
from ..backends import serving
from ..backends.outcomes import Outcomes, outcomes, student_spec
from ..backends.sparse_rows import gather_kept, solve
from ..backends.spec import Spec
from .rows import HeadRows, LogitRows
from .schedule import Plan, plan

#: Temporaries per slot: distinct ids, log-masses in fp64, and the outcome problem.
_SLOT_BYTES = 256


class SparseRows:
    """The rows of a checked target: ids ``[N, K]`` and log-probabilities or weights."""

    def __init__(self, tensors: list[Tensor], spec: Spec) -> None:
        self.ids, self.values = tensors
        self.spec = spec

    @property
    def slots(self) -> int:
        return self.ids.shape[1]

    def keep(self, index: Tensor, others: Tensor) -> None:
        self.ids, self.values = self.ids.index_select(0, index), self.values.index_select(0, index)

    def tile(self, rows: slice, vocab: int, dtype: torch.dtype) -> Outcomes:
        return outcomes(self.ids[rows], self.values[rows], self.spec, vocab=vocab, dtype=dtype)

    def gradients(self) -> list[Tensor]:
        return []


def walk(
    student: LogitRows | HeadRows,
    target: SparseRows,
    labels: Optional[Tensor],
    weights: Tensor,
    spec: Spec,
    chunk_bytes: int,
    preferred: str,
) -> Tensor:
    """All tiles of the schedule: per-row results, gradients to the student."""
    dtypes = student.dtypes
    backend = serving(preferred, weights.device, dtypes, "fused_sparse", spec.divergence)
    kept_only = spec.tail == "conditional" and not spec.hard_weight
    each, per_row = student.bytes_per_logit + backend.bytes_per_logit(dtypes), target.slots * _SLOT_BYTES
    if kept_only:
        each, per_row = 0, per_row + student.bytes_per_kept * target.slots
    tiles = plan(
        tokens=student.tokens,
        vocab=student.vocab,
        bytes_per_logit=each,
        bytes_per_row=per_row,
        chunk_bytes=chunk_bytes,
    )
    results = weights.new_zeros(student.tokens, rs.RESULTS, dtype=torch.float64)
    for rows in tiles.row_chunks():
        chunk = _Chunk(student, target, labels, weights, spec, rows, tiles)
        if kept_only:
            run = chunk.kept_only
        else:
            run = chunk.fused if tiles.one_tile_per_row else chunk.by_vocabulary
        results[rows] = run(backend)
    return results


class _Chunk:
    """One chunk of tokens."""

    def __init__(
        self,
        student: LogitRows | HeadRows,
        target: SparseRows,
        labels: Optional[Tensor],
        weights: Tensor,
        spec: Spec,
        rows: slice,
        tiles: Plan,
    ) -> None:
        self.student, self.spec, self.rows, self.tiles = student, spec, rows, tiles
        self.labels = None if labels is None else labels[rows]
        self.weights = weights[rows]
        dtype = torch.float64 if torch.float64 in student.dtypes else torch.float32
        self.target = target.tile(rows, tiles.vocab, dtype)
        self.kept = torch.full_like(self.target.teacher[:, :-1], -torch.inf)

    def fused(self, backend) -> Tensor:
        columns = slice(0, self.tiles.vocab)
        tile = self.student.tile(self.rows, columns)
        grad = self.student.gradient_tile(tile, self.rows, columns)
        results = backend.fused_sparse(
            tile, self.target, self.labels, self.weights, spec=self.spec, grad=grad
        )
        if grad is not None:
            self.student.backward(grad, self.rows, columns)
        return results

    def by_vocabulary(self, backend) -> Tensor:
        spec, inner, target = self.spec, student_spec(self.spec), self.target
        state = rs.new_state(self.weights.shape[0], self.weights.device)
        for columns in self.tiles.column_chunks():
            tile = self.student.tile(self.rows, columns)
            backend.accumulate(
                tile, None, self.labels, offset=columns.start, spec=inner, state=state, skipped=target.ids
            )
            gather_kept(self.kept, tile, target.ids, columns.start, spec.student_map)
        results, emission = self._solve(backend, state)
        if not self.student.wants_gradient:
            return results
        for columns in self.tiles.column_chunks():
            tile = self.student.tile(self.rows, columns)
            grad = self.student.gradient_tile(tile, self.rows, columns)
            backend.gradient(
                tile,
                None,
                self.labels,
                self.weights,
                offset=columns.start,
                vocab=self.tiles.vocab,
                spec=inner,
                state=state,
                grad=grad,
                teacher_grad=None,
                emission=emission,
            )
            if grad is not None:
                self.student.backward(grad, self.rows, columns)
        return results

    def kept_only(self, backend) -> Tensor:
        ids, logit_map = self.target.ids, self.spec.student_map
        raw = self.student.kept_tile(self.rows, ids)
        self.kept = torch.where(ids >= 0, logit_map.logits(raw, self.kept.dtype), -torch.inf)
        state = rs.new_state(self.weights.shape[0], self.weights.device)
        results, emission = self._solve(backend, state)
        if self.student.wants_gradient:
            live = self.weights if self.labels is None else torch.where(self.labels >= 0, self.weights, 0.0)
            grad = logit_map.backward(emission.kept, self.kept) * live[:, None]
            grad = torch.where((ids >= 0) & (live != 0)[:, None], grad, 0.0)
            self.student.backward_kept(grad, self.rows, ids)
        return results

    def _solve(self, backend, state: Tensor):
        return solve(
            self.target,
            self.kept,
            state,
            self.labels,
            vocab=self.tiles.vocab,
            spec=self.spec,
            fused=backend.fused,
            want_gradient=self.student.wants_gradient,
        )
