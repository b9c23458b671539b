"""The tail "conditional" without a hard term: a row's soft term from its stored ids alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.protocol import Backend
from ..backends.row_state import new_state
from ..backends.spec import Output
from .row_losses import chunk_outcomes, solve_chunk
from .rows import Stored
from .tiles import Chunk


def stored_ids(chunk: Chunk, backend: Backend) -> Tensor:
    """Results of a chunk's rows; their gradient goes where it belongs."""
    spec, student, exchange = chunk.tiles.request.spec, chunk.tiles.student, chunk.exchange
    target = chunk_outcomes(chunk, spec)
    ids, wide = target.ids, target.teacher.dtype
    here = ids if exchange is None else exchange.local(ids)
    found = Stored(ids, None)

    def look() -> Tensor:
        nonlocal found
        found = student.stored(chunk.rows, here)
        return spec.student_map.logits(found.logits, wide)

    if exchange is None:
        logits = look().masked_fill(ids < 0, -torch.inf)
    else:
        logits = exchange.logits_at(look, ids, wide, chunk.rows)
    state = new_state(ids.shape[0], ids.device)
    solved = solve_chunk(chunk, backend, spec, target, logits, state)
    if student.needs_grad:
        grad = _weighted(chunk, spec.student_map.backward(solved.gradient.stored, logits), here)
        student.backward_stored(grad, chunk.rows, here, found)
    return solved.results


def _weighted(chunk: Chunk, grad: Tensor, here: Tensor) -> Tensor:
    weight, labels = chunk.given.weights[:, Output.SOFT, None], chunk.given.labels
    nothing = (here < 0) | (weight == 0)
    if labels is not None:
        nothing |= labels[:, None] < 0
    return (grad * weight.to(grad.dtype)).masked_fill_(nothing, 0.0)
