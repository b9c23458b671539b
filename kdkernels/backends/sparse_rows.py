"""Between the two passes over a row with a sparse target: its outcomes, solved as a dense problem.

A backend's pass over the student's logits skips the stored ids (:class:`.outcomes.Outcomes`), so that the state
holds the normaliser of the rest alone: subtracting the stored mass afterwards would leave nothing of a small
rest. This module is plain torch on ``[rows, K + 1]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .outcomes import Outcomes, outcome_spec, student_spec
from .protocol import Backend, Gradients, SparseGradient, Tile
from .row_state import NO_REFERENCE, Normaliser, SideState, hard_results, new_state, student_side
from .spec import OUTPUTS, Asked, LogitMap, Output, Result, Spec, Tail


class Temperatures(NamedTuple):
    """Where a row with a sparse target is tempered: the student's logits, and then the outcomes."""

    student: Tensor
    outcomes: Tensor

    @staticmethod
    def of(spec: Spec, temperature: Tensor) -> Temperatures:
        one = torch.ones_like(temperature)
        return (
            Temperatures(temperature, one)
            if Tail(spec.tail).tempers_student
            else Temperatures(one, temperature)
        )


def student_tile(tile: Tile, spec: Spec) -> Tile:
    """The same tile as the pass over the student's logits sees it."""
    return tile._replace(teacher=None, temperature=Temperatures.of(spec, tile.temperature).student)


def gather_stored(stored: Tensor, logits: Tensor, ids: Tensor, offset: int, logit_map: LogitMap) -> None:
    """The mapped logits at the ids that lie in the chunk ``logits``, into ``stored`` ``[rows, K]``."""
    local = ids - offset
    inside = local.clamp(0, logits.shape[1] - 1)
    found = logit_map.logits(logits.gather(1, inside), stored.dtype)
    torch.where(inside == local, found, stored, out=stored)


def fold_without(
    backend: Backend, tile: Tile, spec: Spec, state: Tensor, ids: Tensor, stored: Tensor
) -> None:
    """A tile of student logits folded into ``state`` without those at ``ids``, which are gathered into ``stored``."""
    backend.accumulate(tile, spec, state, skipped=ids)
    gather_stored(stored, tile.student, ids, tile.offset, spec.student_map)


def no_logits(target: Outcomes) -> Tensor:
    """-inf ``[rows, K]``, for :func:`gather_stored`."""
    return torch.full_like(target.teacher[:, :-1], -torch.inf)


class WholeRow(NamedTuple):
    """The student's softmax at T over a row's stored ids and the rest together. Logits are relative to
    ``reference``, which is subtracted before the temperature divides, as in the state."""

    reference: Tensor  # fp64 [rows]: near the highest logit
    log_sum_exp: Tensor  # fp64 [rows]
    mean_shift: Tensor  # fp64 [rows]: see SideState; 0 where nobody asked
    q_rest: Tensor  # fp64 [rows]

    @property
    def entropy(self) -> Tensor:
        return self.log_sum_exp - self.mean_shift

    def log_q(self, stored: Tensor, temperature: Tensor) -> Tensor:
        """fp64 ``[rows, K]``, of :func:`whole_row`'s ``stored``."""
        return _below(stored, self.reference, temperature) - self.log_sum_exp[:, None]


def _below(stored: Tensor, reference: Tensor, temperature: Tensor) -> Tensor:
    return (stored - reference[:, None]) / temperature[:, None]


def whole_row(side: SideState, stored: Tensor, temperature: Tensor, *, mean: bool) -> WholeRow:
    """Of a ``side`` that was folded at the ``temperature`` without the ids whose logits are ``stored`` ``[rows, K]``
    (mapped, untempered, -inf where there is none). ``mean``: whether ``mean_shift`` is asked for, of a state that holds
    sum_exp_shift."""
    top, at = stored.max(-1, keepdim=True)
    reference = torch.maximum(top[:, 0], side.reference)
    below, moved = _below(stored, reference, temperature), (side.reference - reference) / temperature
    exp, decay = below.exp(), moved.exp()
    rest = side.sum_exp * decay
    total = exp.sum(-1) + rest
    # Where a stored token has nearly all the mass, its 1 in the sum would leave no digits of the others. An infinite one
    # is no such token: inf - inf is NaN, as the sum is.
    others = exp.scatter(1, at, 0.0).sum(-1) + rest
    log_sum_exp = torch.where(top[:, 0] - reference == 0, others.log1p(), total.log())
    mean_shift = torch.zeros_like(total)
    if mean:
        moment = (exp * below).masked_fill_(exp == 0, 0.0).sum(-1)
        moment += (decay * (side.sum_exp_shift + side.sum_exp * moved)).masked_fill_(rest == 0, 0.0)
        mean_shift = moment / total
    return WholeRow(reference, log_sum_exp, mean_shift, rest / total)


class Solved(NamedTuple):
    results: Tensor  # [rows, RESULTS]
    gradient: SparseGradient


def solve(
    backend: Backend,
    tile: Tile,
    target: Outcomes,
    stored: Tensor,
    spec: Spec,
    state: Tensor,
    needs_grad: bool,
) -> Solved:
    """Results, and what the second pass writes.

    ``stored``: the student's logits (mapped, untempered) at ``target.ids``, -inf where there is none.
    ``state``: the student's, folded with the stored ids left out. ``tile`` gives all but the logits.
    """
    side = student_side(state)
    temperatures = Temperatures.of(spec, tile.temperature)
    # The largest logit is subtracted before the temperature divides, as in the state.
    highest = torch.maximum(stored.amax(-1), side.reference)
    below = stored - highest[:, None]
    rest = _rest(target, side, highest, temperatures, spec)
    student = torch.cat([below / temperatures.student[:, None], rest], 1)
    if spec.tail == Tail.BUCKET:
        target = _without_rounding(target, rest)
    # Only differences count: what is near 0 keeps its digits in fp32.
    student = student - student.amax(-1, keepdim=True).clamp(min=NO_REFERENCE)
    student = student.to(target.teacher.dtype)
    results, grad = _solve_outcomes(backend, tile, student, target, spec, temperatures, needs_grad)
    if spec.stats:
        results[:, Result.AGREEMENT] = _agreement(target, stored, side, spec)
    softmax = state.new_zeros(len(state), 3)  # of the entropy, which is a loss beside this one
    at_1 = state.new_zeros(len(state), 2)
    if spec.asked & Asked.HARD:
        rest = side.sum_exp_t1 * (side.reference - highest).exp()
        normaliser = Normaliser(highest, (rest + below.exp().sum(-1)).log())
        hard_results(results, side, normaliser, spec.asked, tile.vocab)
        at_1 = torch.stack(normaliser, 1)
    if tile.labels is not None:
        results.masked_fill_((tile.labels < 0)[:, None], 0.0)
    return Solved(results, SparseGradient(target.ids, grad[:, -1].double(), grad[:, :-1], at_1, softmax))


def _rest(
    target: Outcomes, side: SideState, highest: Tensor, temperatures: Temperatures, spec: Spec
) -> Tensor:
    """The student's log-mass of what is not stored, ``[rows, 1]``, relative to the highest logit."""
    if spec.tail == Tail.CONDITIONAL:
        return target.teacher[:, -1:].double()
    return ((side.reference - highest) / temperatures.student + side.log_sum_exp)[:, None]


def _without_rounding(target: Outcomes, rest: Tensor) -> Outcomes:
    """Where the student has no rest, a teacher's that may be rounding is none: "bucket" with both models masked
    to the stored ids."""
    gone = target.rounding[:, None] & (rest == -torch.inf)
    stored, tail = target.teacher[:, :-1], target.teacher[:, -1:]
    return target._replace(teacher=torch.cat([stored, torch.where(gone, -torch.inf, tail)], 1))


def _solve_outcomes(
    backend: Backend,
    tile: Tile,
    student: Tensor,
    target: Outcomes,
    spec: Spec,
    temperatures: Temperatures,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(results, d(soft term)/d(student's logits of the outcomes)) of the dense problem."""
    problem = Tile(
        student, target.teacher, tile.labels, temperatures.outcomes, tile.parameters, 0, student.shape[1]
    )
    weights = student.new_zeros(student.shape[0], OUTPUTS, dtype=torch.float64)
    weights[:, Output.SOFT] = target.scale / temperatures.student
    grad = torch.empty_like(student) if needs_grad else None
    results = backend.fused(problem, weights, outcome_spec(spec), Gradients(grad, None))
    results[:, Output.SOFT].mul_(target.scale).add_(target.constant)
    return results, student if grad is None else grad  # without one, nobody reads it


def _agreement(target: Outcomes, stored: Tensor, side: SideState, spec: Spec) -> Tensor:
    """Whether the student's top-1 token (of the stored ones under "conditional") is the teacher's."""
    best, mine = stored.max(-1)
    theirs = target.teacher[:, :-1].argmax(-1)
    agree = (mine == theirs) & (target.ids[:, 0] >= 0)
    if spec.tail != Tail.CONDITIONAL:
        top = top_token(target.ids, stored, side, spec.student_map)
        agree &= top == target.ids.gather(1, mine[:, None])[:, 0]
    return agree.double()


def top_token(ids: Tensor, stored: Tensor, side: SideState, logit_map: LogitMap) -> Tensor:
    """The student's top-1 token ``[rows]``, stored or not, the first of equal ones."""
    best, at = stored.max(-1)
    id, best, top = ids.gather(1, at[:, None])[:, 0], best.double(), side.top_logit
    tie = best == top
    if logit_map.softcap:
        # Torch and a backend round it in ways of their own, and equal logits are equal here too.
        tie |= (best - top).abs() <= 4 * torch.finfo(stored.dtype).eps * top.abs()
    mine = torch.where(tie, id < side.top_index, best > top)
    return torch.where(mine, id, side.top_index.long())


def in_two_passes(
    backend: Any, tile: Tile, target: Outcomes, weights: Tensor, spec: Spec, gradients: Gradients
) -> Tensor:
    """``fused_sparse`` by a backend's other entry points."""
    inner, own = student_spec(spec), student_tile(tile, spec)
    state = new_state(tile.student.shape[0], tile.student.device)
    stored = no_logits(target)
    fold_without(backend, own, inner, state, target.ids, stored)
    solved = solve(backend, tile, target, stored, spec, state, gradients.asked)
    if gradients.asked:
        backend.gradient(own, weights, inner, state, gradients, sparse=solved.gradient)
    return solved.results
