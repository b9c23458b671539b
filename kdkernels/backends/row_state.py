"""The online state of a row of logits, and what is read off it when it is finished (docs/design.md).

``[rows, COLUMNS]`` fp64: one struct for each model, and one for the pair. With m a model's reference (the
running maximum), e = exp((z - m) / T) and x = ((t - m_t) - (s - m_s)) / T, every entry is a sum, a maximum or the
label's logit. So states of different vocabulary chunks merge. ``csrc/row_state.h`` has the same layout.

The reference is subtracted before anything is divided by the temperature: logits of 1e4 divided by 3 are
rounded to 2e-4, and no reference taken away afterwards brings these digits back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .spec import RESULTS, Asked, Output, Result, Spec

#: The reference of no logits: finite, so that m - m is 0 and not NaN for a chunk of padding.
NO_REFERENCE = -3.4028234663852886e38


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
    def lse_t1(self) -> Tensor:
        """The normaliser at temperature 1."""
        return self.reference + self.sum_exp_t1.log()

    @property
    def label_loss(self) -> Tensor:
        """The normaliser at 1 less the label's logit. The reference's distance to the label comes first: both may be
        far from 0, where a sum has no digits left."""
        return (self.reference - self.label_logit) + self.sum_exp_t1.log()

    @property
    def entropy(self) -> Tensor:
        return self.log_sum_exp - self.sum_exp_shift / self.sum_exp


class PairState(NamedTuple):
    """What both models are needed for."""

    cross_s: Tensor  # sum e_s x
    cross_t: Tensor  # sum e_t x
    value: Tensor  # second pass: sum phi
    sum_q_psi: Tensor  # second pass


_SIDE, _PAIR = len(SideState._fields), len(PairState._fields)
COLUMNS = 2 * _SIDE + _PAIR


class RowState(NamedTuple):
    """A state tensor's columns by name."""

    student: SideState
    teacher: SideState
    pair: PairState

    @staticmethod
    def of(state: Tensor) -> RowState:
        columns = state.unbind(1)
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


def new_state(rows: int, device: torch.device) -> Tensor:
    state = torch.zeros(rows, COLUMNS, dtype=torch.float64, device=device)
    of = RowState.of(state)
    for side in (of.student, of.teacher):
        side.reference.fill_(NO_REFERENCE)
        side.top_logit.fill_(NO_REFERENCE)
    return state


def hard_results(
    results: Tensor, side: SideState, lse: Tensor, label_loss: Tensor, asked: int, vocab: int
) -> None:
    """The student's outputs at temperature 1 into ``results``; ``lse`` is its normaliser there."""
    if asked & Asked.LABEL:
        results[:, Output.LABEL] = label_loss
    if asked & Asked.SMOOTH:
        results[:, Output.SMOOTH] = lse - side.sum_logits / vocab
    if asked & Asked.LSE_SQUARED:
        results[:, Output.LSE_SQUARED] = lse * lse


def finish(state: Tensor, spec: Spec, labels: Tensor | None, vocab: int) -> Tensor:
    """``[rows, RESULTS]`` of finished states; zero in rows whose label is -1."""
    row, results = RowState.of(state), state.new_zeros(state.shape[0], RESULTS)
    if spec.asked & Asked.SOFT:
        results[:, Output.SOFT] = row.divergence(spec)
    if spec.stats:
        results[:, Result.STUDENT_ENTROPY] = row.student.entropy
        if spec.kind:
            results[:, Result.TEACHER_ENTROPY] = row.teacher.entropy
            results[:, Result.AGREEMENT] = (row.student.top_index == row.teacher.top_index).double()
    hard_results(results, row.student, row.student.lse_t1, row.student.label_loss, spec.asked, vocab)
    if spec.asked & Asked.TEACHER_LABEL:
        results[:, Output.TEACHER_LABEL] = row.teacher.label_loss
    if labels is not None:
        results = torch.where((labels >= 0)[:, None], results, 0.0)
    return results
