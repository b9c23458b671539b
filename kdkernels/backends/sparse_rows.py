"""Between the two passes over a row with a sparse target: its outcomes, solved as a dense problem.

A backend's pass over the student's logits skips the kept ids (:class:`kdkernels.backends.outcomes.Outcomes`),
so that the state holds the normaliser of the rest alone: subtracting the kept mass afterwards would
leave nothing of a small rest. This module is plain torch on ``[rows, K + 1]``.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

from . import row_state as rs
from .outcomes import Outcomes, outcome_spec, student_spec
from .spec import LogitMap, Spec


class Emission(NamedTuple):
    """The gradient of finished rows, for the student's logits before weights and logit map: ``rest`` times
    the softmax of the rest (from the state) where j is not in ``ids``, ``kept`` where it is, plus
    the hard term with its normaliser ``lse1``, a maximum and what is above it."""

    ids: Tensor  # [rows, K]
    rest: Tensor  # [rows] fp64
    kept: Tensor  # [rows, K]
    m1: Tensor  # [rows] fp64
    log_z1: Tensor  # [rows] fp64

    @property
    def lse1(self) -> Tensor:
        return self.m1 + self.log_z1


def gather_kept(kept: Tensor, tile: Tensor, ids: Tensor, offset: int, logit_map: LogitMap) -> None:
    """The logits of the ids that lie in the chunk ``tile``, into ``kept`` ``[rows, K]``."""
    local = ids - offset
    inside = (ids >= 0) & (local >= 0) & (local < tile.shape[1])
    found = logit_map.logits(tile.gather(1, local.clamp(0, tile.shape[1] - 1)), kept.dtype)
    torch.where(inside, found, kept, out=kept)


def solve(
    target: Outcomes,
    kept: Tensor,
    state: Tensor,
    labels: Optional[Tensor],
    *,
    vocab: int,
    spec: Spec,
    fused: Callable[..., Tensor],
    want_gradient: bool,
) -> tuple[Tensor, Emission]:
    """Per-row results and what the second pass emits.

    ``kept``: the student's logits (mapped, untempered) at ``target.ids``, -inf where there is none.
    ``state``: the student's, folded with the kept ids left out. ``fused``: the backend's own.
    """
    inner = student_spec(spec)
    # The largest logit is subtracted before the temperature divides, as in the state.
    m1 = torch.cat([kept.double(), state[:, rs.M_S, None]], 1).amax(-1)
    teacher = target.teacher
    if spec.tail == "conditional":
        rest = teacher[:, -1].double()
    else:
        rest = (state[:, rs.M_S] - m1) / inner.temperature + state[:, rs.Z_S].log()
    student = torch.cat([(kept.double() - m1[:, None]) / inner.temperature, rest[:, None]], 1)
    # Only differences count: what is near 0 keeps its digits in fp32.
    student = student - student.amax(-1, keepdim=True).clamp(min=rs.NOTHING)
    student = student.to(teacher.dtype)
    grad = torch.empty_like(student) if want_gradient else None
    solved = fused(
        student, teacher, labels, target.scale, spec=outcome_spec(spec), grad=grad, teacher_grad=None
    )
    results = solved.clone()
    results[:, rs.SOFT] = target.scale * solved[:, rs.SOFT] + target.constant
    results[:, rs.AGREEMENT] = _agreement(target, kept, state, spec)
    log_z1 = torch.zeros_like(m1)
    if spec.hard_weight:
        z1 = state[:, rs.Z1_S] * (state[:, rs.M_S] - m1).exp()
        log_z1 = (z1 + (kept.double() - m1[:, None]).exp().sum(-1)).log()
        results[:, rs.HARD] = rs.hard_term(
            state, m1 + log_z1, (m1 - state[:, rs.LABEL_S]) + log_z1, spec, vocab
        )
    if labels is not None:
        results = torch.where((labels >= 0)[:, None], results, 0.0)
    if grad is None:
        grad = student  # nobody emits it
    return results, Emission(target.ids, grad[:, -1].double(), grad[:, :-1], m1, log_z1)


def _agreement(target: Outcomes, kept: Tensor, state: Tensor, spec: Spec) -> Tensor:
    """Whether the student's top-1 token (of the kept ones under "conditional") is the teacher's."""
    best, mine = kept.max(-1)
    theirs = target.teacher[:, :-1].argmax(-1)
    agree = (mine == theirs) & (target.ids[:, 0] >= 0)
    if spec.tail != "conditional":
        best, top = best.double(), state[:, rs.M_S]
        first = target.ids.gather(1, mine[:, None])[:, 0] < state[:, rs.ARG_S]
        # Equal logits are equal here too, however the backend rounded its softcap.
        tie = (best - top).abs() <= 4 * torch.finfo(kept.dtype).eps * top.abs()
        agree &= torch.where(tie, first, best > top)
    return agree.double()


def in_two_passes(
    student: Tensor,
    target: Outcomes,
    labels: Optional[Tensor],
    weights: Tensor,
    *,
    spec: Spec,
    grad: Optional[Tensor],
    accumulate: Callable[..., None],
    fused: Callable[..., Tensor],
    gradient: Callable[..., None],
) -> Tensor:
    """Whole rows by a backend's entry points: results, and the gradient where a buffer is given."""
    inner, vocab = student_spec(spec), student.shape[1]
    state = rs.new_state(student.shape[0], student.device)
    accumulate(student, None, labels, offset=0, spec=inner, state=state, skipped=target.ids)
    kept = torch.full_like(target.teacher[:, :-1], -torch.inf)
    gather_kept(kept, student, target.ids, 0, spec.student_map)
    results, emission = solve(
        target, kept, state, labels, vocab=vocab, spec=spec, fused=fused, want_gradient=grad is not None
    )
    if grad is not None:
        gradient(
            student,
            None,
            labels,
            weights,
            offset=0,
            vocab=vocab,
            spec=inner,
            state=state,
            grad=grad,
            teacher_grad=None,
            emission=emission,
        )
    return results
