"""The online state of a row of logits, and what is read off it when it is finished.

``[rows, COLUMNS]`` fp64, one row a token. s and t are the student's and teacher's logits, m the running
maximum, e = exp((. - m) / T), x = ((t - m_t) - (s - m_s)) / T. Every entry is a sum, a maximum or a
label's logit, so states of different vocabulary chunks merge, which is what vocabulary chunks and
vocabulary-parallel heads need. ``csrc/row_state.h`` has the same layout.

The maximum is subtracted before anything is divided by the temperature: logits of 1e4 divided by 3 are
rounded to 2e-4, and no maximum taken away afterwards brings these digits back.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .spec import Spec

# fmt: off
M_S, Z_S, M_T, Z_T = 0, 1, 2, 3     # maxima and sum e, student and teacher
X_S, X_T = 4, 5                     # sum e_s x, sum e_t x
E_S, E_T = 6, 7                     # sum e (s - m) / T, for the entropies
Z1_S, Z1_T = 8, 9                   # sum exp(s - m)
SUM_S, LABEL_S, LABEL_T = 10, 11, 12  # sum of the logits (label smoothing), the label's logit
TOP_S, ARG_S, TOP_T, ARG_T = 13, 14, 15, 16
VALUE, SLOPE = 17, 18               # second pass: the divergence, and sum q_psi
COLUMNS = 19
# fmt: on

#: What a finished row reports, ``[rows, 6]`` fp64.
SOFT, HARD, STUDENT_ENTROPY, TEACHER_ENTROPY, AGREEMENT, TEACHER_HARD = range(6)
RESULTS = 6

#: The maximum of nothing: finite, so that m - m is 0 and not NaN for a chunk of padding.
NOTHING = -3.4028234663852886e38


def new_state(rows: int, device: torch.device) -> Tensor:
    state = torch.zeros(rows, COLUMNS, dtype=torch.float64, device=device)
    for maxima in (state[:, M_S : M_T + 1 : 2], state[:, TOP_S : TOP_T + 1 : 2]):
        maxima.fill_(NOTHING)  # slices: a list of columns would be copied to the device, and waited for
    return state


def student_lse(state: Tensor, spec: Spec) -> Tensor:
    return state[:, M_S] / spec.temperature + state[:, Z_S].log()


def student_lse1(state: Tensor) -> Tensor:
    """The student's normaliser at temperature 1, where the hard term lives."""
    return state[:, M_S] + state[:, Z1_S].log()


def divergence_value(state: Tensor, spec: Spec) -> Tensor:
    form = spec.divergence.closed_form
    gap = state[:, Z_T].log() - state[:, Z_S].log()
    if form == "forward":
        return state[:, X_T] / state[:, Z_T] - gap
    if form == "reverse":
        return gap - state[:, X_S] / state[:, Z_S]
    return state[:, VALUE]


def disagree(state: Tensor) -> Tensor:
    """Rows whose KL(p || q) is above 1/2. Below, p and q have at least half their mass in common."""
    return ~(state[:, X_T] / state[:, Z_T] - (state[:, Z_T].log() - state[:, Z_S].log()) <= 0.5)


def hard_term(state: Tensor, lse: Tensor, gap: Tensor, spec: Spec, vocab: int) -> Tensor:
    """The student's cross entropy, ``lse`` being its normaliser at temperature 1 and ``gap`` its distance
    to the label's logit."""
    hard = gap
    if spec.label_smoothing:
        smooth = spec.label_smoothing
        hard = (1 - smooth) * gap if smooth < 1 else 0 * lse
        hard = hard + smooth * (lse - state[:, SUM_S] / vocab)
    return hard + spec.z_loss * lse * lse


def finish(state: Tensor, spec: Spec, labels: Optional[Tensor], vocab: int, soft: bool) -> Tensor:
    """Per-row results ``[rows, RESULTS]``; zero in rows whose label is -1."""
    results = state.new_zeros(state.shape[0], RESULTS)
    results[:, STUDENT_ENTROPY] = state[:, Z_S].log() - state[:, E_S] / state[:, Z_S]
    if soft:
        results[:, SOFT] = divergence_value(state, spec)
        results[:, TEACHER_ENTROPY] = state[:, Z_T].log() - state[:, E_T] / state[:, Z_T]
        results[:, AGREEMENT] = (state[:, ARG_S] == state[:, ARG_T]).to(state.dtype)
    # The maximum's distance to the label first: both may be far from 0, where a sum has no digits left.
    if spec.hard_weight:
        gap = (state[:, M_S] - state[:, LABEL_S]) + state[:, Z1_S].log()
        results[:, HARD] = hard_term(state, student_lse1(state), gap, spec, vocab)
    if spec.teacher_hard_weight:
        results[:, TEACHER_HARD] = (state[:, M_T] - state[:, LABEL_T]) + state[:, Z1_T].log()
    if labels is not None:
        results = torch.where((labels >= 0)[:, None], results, 0.0)
    return results
