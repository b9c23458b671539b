"""The online state of a row of logits, and what is read off it when it is finished (docs/design.md).

``[rows, COLUMNS]`` fp64: one struct for each model, and one for the pair. With m a model's reference (the
running maximum), e = exp((z - m) / T) and x = ((t - m_t) - (s - m_s)) / T, every entry is a sum, a maximum or the
label's logit. So states of different vocabulary chunks merge. ``csrc/row_state.h`` has the same layout.

The reference is subtracted before anything is divided by the temperature: logits of 1e4 divided by 3 are
rounded to 2e-4, and no reference taken away afterwards brings these digits back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import SkewKL
from .spec import RESULTS, Asked, Output, Result, Spec

#: The reference of no logits: finite, so that m - m is 0 and not NaN for a chunk of padding.
NO_REFERENCE = -3.4028234663852886e38


class Normaliser(NamedTuple):
    """log sum exp(z) of rows, in two parts: of logits far from 0 it has no digits left for the sum, and what counts is its
    distance to other logits."""

    reference: Tensor  # [rows]
    log_sum_exp: Tensor

    @property
    def lse(self) -> Tensor:
        return self.reference + self.log_sum_exp

    def above(self, logits: Tensor) -> Tensor:
        return (self.reference - logits) + self.log_sum_exp


class SideState(NamedTuple):
    """One model's part; each field a view ``[rows]`` of the state."""

    reference: Tensor  # m
    sum_exp: Tensor  # sum e
    sum_exp_shift: Tensor  # sum e (z - m) / T, for the entropy
    sum_exp_t1: Tensor  # sum exp(z - m)
    sum_logits: Tensor  # for label smoothing
    label_logit: Tensor
    top_logit: Tensor
    top_index: Tensor

    @property
    def log_sum_exp(self) -> Tensor:
        """log sum e: the normaliser at T relative to m / T."""
        return self.sum_exp.log()

    @property
    def at_1(self) -> Normaliser:
        return Normaliser(self.reference, self.sum_exp_t1.log())

    @property
    def mean_shift(self) -> Tensor:
        """The mean of (z - m) / T under the softmax at T."""
        return self.sum_exp_shift / self.sum_exp

    @property
    def entropy(self) -> Tensor:
        return self.log_sum_exp - self.mean_shift


class PairState(NamedTuple):
    """What both models are needed for."""

    cross_s: Tensor  # sum e_s x
    cross_t: Tensor  # sum e_t x
    value: Tensor  # second pass: sum phi
    sum_q_psi: Tensor  # second pass


_SIDE, _PAIR = len(SideState._fields), len(PairState._fields)
COLUMNS = 2 * _SIDE + _PAIR
#: Of a side's columns the first, its reference, and its top logit; the next step is beyond them.
_HIGHEST = slice(None, None, SideState._fields.index("top_logit"))


class RowState(NamedTuple):
    """A state tensor's columns by name."""

    student: SideState
    teacher: SideState
    pair: PairState

    @staticmethod
    def of(state: Tensor) -> RowState:
        columns = state.unbind(-1)
        return RowState(
            SideState(*columns[:_SIDE]),
            SideState(*columns[_SIDE : 2 * _SIDE]),
            PairState(*columns[2 * _SIDE :]),
        )

    @property
    def gap(self) -> Tensor:
        """log of the teacher's sum e over the student's."""
        return self.teacher.log_sum_exp - self.student.log_sum_exp

    def divergence(self, spec: Spec) -> Tensor:
        if spec.closed_form == "forward":
            return self.pair.cross_t / self.teacher.sum_exp - self.gap
        if spec.closed_form == "reverse":
            return self.gap - self.pair.cross_s / self.student.sum_exp
        return self.pair.value

    def disagree(self) -> Tensor:
        """Rows whose KL(p || q) is above 1/2. Below, p and q have at least half their mass in common."""
        return ~(self.pair.cross_t / self.teacher.sum_exp - self.gap <= 0.5)


def student_side(state: Tensor) -> SideState:
    """``RowState.of(state).student`` alone: every view that is made of a tensor takes its time."""
    return SideState(*state[:, :_SIDE].unbind(-1))


def new_state(rows: int, device: torch.device) -> Tensor:
    return begin(torch.empty(rows, COLUMNS, dtype=torch.float64, device=device))


def begin(state: Tensor) -> Tensor:
    """``state``, as that of rows of which nothing is folded yet."""
    state.zero_()[:, : 2 * _SIDE].view(len(state), 2, _SIDE)[..., _HIGHEST].fill_(NO_REFERENCE)
    return state


class Pass(NamedTuple):
    """A pass over a row, made in parts: which columns of the state it has filled, and how the parts' are merged.

    ``merge(parts [parts, rows, columns], state)`` writes them into the state of all. Parts are added up in their
    order, so that everybody who does it gets the same bits. NaN stays; equal tops go to the lowest id.
    """

    columns: list[int]
    merge: Callable[[Tensor, Tensor], None]


def first_pass(spec: Spec, temperature: Tensor) -> Pass:
    """The first pass, each part of which is folded from a new state."""

    def merge(parts: Tensor, state: Tensor) -> None:
        states = new_state(parts.shape[1], parts.device).repeat(parts.shape[0], 1, 1)
        states[..., columns] = parts
        state.copy_(_merged(states, spec, temperature))

    columns = _first_columns(spec)
    return Pass(columns, merge)


def _add_values(parts: Tensor, state: Tensor) -> None:
    state[:, SECOND_PASS.columns] = in_order(parts)


#: Each part starts from the merged state of the first.
SECOND_PASS = Pass(
    [2 * _SIDE + PairState._fields.index(name) for name in ("value", "sum_q_psi")],
    _add_values,
)


def _first_columns(spec: Spec) -> list[int]:
    """The columns that results and gradients of this spec are made of, once the first pass is over."""
    student = {"reference", "sum_exp"}
    teacher = {"reference", "sum_exp"} if spec.kind else set()
    student |= {"sum_exp_t1"} if spec.tempered and spec.asked & Asked.HARD else set()
    student |= {"label_logit"} if spec.asked & Asked.LABEL else set()
    student |= {"sum_logits"} if spec.asked & Asked.SMOOTH else set()
    student |= {"sum_exp_shift"} if spec.asked & Asked.ENTROPY else set()
    if spec.asked & Asked.TEACHER_LABEL:
        teacher |= {"label_logit"} | ({"sum_exp_t1"} if spec.tempered else set())
    if spec.stats:
        statistics = {"sum_exp_shift", "top_logit", "top_index"}
        student, teacher = student | statistics, teacher | (statistics if spec.kind else set())
    cross: set[str] = set()
    if spec.asked & Asked.SOFT and spec.closed_form == "reverse":
        cross = {"cross_s"}
    elif spec.asked & Asked.SOFT and (spec.closed_form == "forward" or spec.kind == SkewKL.code):
        cross = {"cross_t"}  # SkewKL asks by the forward KL whether p and q `disagree`
    names = [(student, SideState._fields), (teacher, SideState._fields), (cross, PairState._fields)]
    wanted = [name in some for some, fields in names for name in fields]
    return [at for at, want in enumerate(wanted) if want]


def _merged(states: Tensor, spec: Spec, temperature: Tensor) -> Tensor:
    """States ``[parts, rows, COLUMNS]`` of different columns of the same rows, as that of all columns."""
    given = RowState.of(states)
    student, risen_s = _merged_side(given.student, spec, temperature)
    teacher, risen_t = _merged_side(given.teacher, spec, temperature)
    cross_s = _decayed(given.pair.cross_s, given.student.sum_exp, risen_s - risen_t, risen_s)
    cross_t = _decayed(given.pair.cross_t, given.teacher.sum_exp, risen_s - risen_t, risen_t)
    none = torch.zeros_like(student.reference)  # the second pass is still to come
    pair = PairState(in_order(cross_s), in_order(cross_t), value=none, sum_q_psi=none)
    return torch.stack([*student, *teacher, *pair], 1)


def in_order(parts: Tensor) -> Tensor:
    """The sum over the first dimension, from the first to the last."""
    total, *others = parts.unbind(0)
    for part in others:
        total = total + part
    return total


def _merged_side(side: SideState, spec: Spec, temperature: Tensor) -> tuple[SideState, Tensor]:
    """One model's state, and how far each part's m / T rose to the common one ``[parts, rows]``."""
    reference = side.reference.amax(0)
    up = reference - side.reference
    risen = up / temperature
    sum_exp = in_order(side.sum_exp * (-risen).exp())
    top = side.top_logit.amax(0)
    first = torch.where(side.top_logit == top, side.top_index, torch.inf).amin(0)
    return SideState(
        reference,
        sum_exp,
        in_order(_decayed(side.sum_exp_shift, side.sum_exp, -risen, risen)),
        in_order(side.sum_exp_t1 * (-up).exp()) if spec.tempered else sum_exp,
        in_order(side.sum_logits),
        in_order(side.label_logit),
        top,
        first,
    ), risen


def _decayed(total: Tensor, sum_exp: Tensor, moved: Tensor, risen: Tensor) -> Tensor:
    """Sum of e times something, after that ``moved`` and m / T has ``risen``. What decays to 0 is 0, an infinity too."""
    shifted = total + torch.where(sum_exp > 0, sum_exp * moved, 0.0)
    decay = (-risen).exp()
    return torch.where(decay == 0, 0.0, shifted * decay)


def hard_results(results: Tensor, side: SideState, at_1: Normaliser, asked: int, vocab: int) -> None:
    """The student's outputs at temperature 1 into ``results``; ``at_1`` is its normaliser there."""
    if asked & Asked.LABEL:
        results[:, Output.LABEL] = at_1.above(side.label_logit)
    if asked & Asked.SMOOTH:
        results[:, Output.SMOOTH] = at_1.above(side.sum_logits / vocab)
    if asked & Asked.LSE_SQUARED:
        results[:, Output.LSE_SQUARED] = at_1.lse.square()


def finish(state: Tensor, spec: Spec, labels: Tensor | None, vocab: int) -> Tensor:
    """``[rows, RESULTS]`` of finished states; zero in rows whose label is -1."""
    row, results = RowState.of(state), state.new_zeros(state.shape[0], RESULTS)
    if spec.asked & Asked.SOFT:
        results[:, Output.SOFT] = row.divergence(spec)
    if spec.asked & Asked.ENTROPY:
        results[:, Output.ENTROPY] = row.student.entropy
    if spec.stats:
        results[:, Result.STUDENT_ENTROPY] = row.student.entropy
        if spec.kind:
            results[:, Result.TEACHER_ENTROPY] = row.teacher.entropy
            results[:, Result.AGREEMENT] = (row.student.top_index == row.teacher.top_index).double()
    hard_results(results, row.student, row.student.at_1, spec.asked, vocab)
    if spec.asked & Asked.TEACHER_LABEL:
        results[:, Output.TEACHER_LABEL] = row.teacher.at_1.above(row.teacher.label_logit)
    if labels is not None:
        results = torch.where((labels >= 0)[:, None], results, 0.0)
    return results
