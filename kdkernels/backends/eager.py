"""The plain PyTorch backend: any device, any floating dtype, analytic gradients.

Rows in half precision are computed in fp32, fp64 rows in fp64. Memory: about TEMPORARIES tiles of
the arithmetic's dtype beside the tiles themselves, which the schedule takes into account.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergences import SkewKL
from . import row_state as rs
from .outcomes import Outcomes
from .sparse_rows import Emission, in_two_passes
from .spec import Spec

name = "eager"
#: Tiles alive at once in the widest formula (alpha-beta).
TEMPORARIES = 14


def _resolve_mkl_kernels() -> None:
    """Call what torch hands to MKL once, on one thread.

    MKL before 2025.0 chooses a function's kernel at its first call, and where several threads make
    that call together one of them can get a kernel of low accuracy (pytorch issue 188792): an fp64
    loss was then off by 5e-12 instead of 1e-16, once in a new process.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype, device="cpu")
        for function in (torch.exp, torch.expm1, torch.log, torch.log1p, torch.tanh):
            function(one)


_resolve_mkl_kernels()


def why_not() -> Optional[str]:
    return None


def cannot(device: torch.device, dtypes: list[torch.dtype]) -> Optional[str]:
    return None


def bytes_per_logit(dtypes: list[torch.dtype]) -> int:
    return TEMPORARIES * (8 if torch.float64 in dtypes else 4)


def _dtype(*tiles: Optional[Tensor]) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tiles)
    return torch.float64 if wide else torch.float32


def _in_chunk(labels: Tensor, offset: int, width: int) -> tuple[Tensor, Tensor]:
    """Which rows have their label in this chunk, and a column to read for every row."""
    local = labels - offset
    inside = (local >= 0) & (local < width) & (labels >= 0)
    return inside, local.clamp(0, width - 1)


def _below_maximum(raw: Tensor, m: Tensor) -> Tensor:
    """raw - m: before a temperature divides it and log Z is subtracted, which keeps the digits of both."""
    return raw - m[:, None].to(raw.dtype)


def _fold_normalizer(state: Tensor, raw: Tensor, spec: Spec, m_at: int, z_at: int) -> tuple[Tensor, ...]:
    """Fold the logits into (m, sum e); returns (raw - m) / T, e, and how far m / T rose."""
    old = state[:, m_at].clone()
    new = torch.maximum(old, raw.amax(-1).double().clamp(min=rs.NOTHING))
    risen = (new - old) / spec.temperature
    z = _below_maximum(raw, new) / spec.temperature
    e = z.exp()
    state[:, m_at] = new
    state[:, z_at] = state[:, z_at] * (-risen).exp() + e.sum(-1).double()
    return z, e, risen


def _fold_moment(
    state: Tensor, at: int, *, old_mass: Tensor, decay: Tensor, shift: Tensor, fresh: Tensor
) -> None:
    """A sum e * v whose v moves by ``shift`` when the maxima rise; what decays to 0 is 0, inf too."""
    moved = state[:, at] + torch.where(old_mass > 0, old_mass * shift, 0.0)
    state[:, at] = torch.where(decay > 0, moved * decay, 0.0) + fresh.double()


def _masked(e: Tensor, v: Tensor) -> Tensor:
    return torch.where(e > 0, e * v, 0.0).sum(-1)


def _fold_top(state: Tensor, z: Tensor, offset: int, top_at: int, arg_at: int) -> None:
    value, index = z.max(-1)
    better = value > state[:, top_at]
    state[:, top_at] = torch.where(better, value.double(), state[:, top_at])
    state[:, arg_at] = torch.where(better, (index + offset).double(), state[:, arg_at])


def _fold_label(state: Tensor, z: Tensor, labels: Tensor, offset: int, at: int) -> None:
    inside, column = _in_chunk(labels, offset, z.shape[1])
    value = z.gather(1, column[:, None])[:, 0].double()
    state[:, at] = torch.where(inside, value, state[:, at])


def _written(tile: Tensor, ids: Tensor, offset: int, values: Tensor) -> Tensor:
    """``tile`` with ``values`` in the columns ``ids`` that lie in it; a spare column takes the others."""
    local = ids - offset
    inside = (ids >= 0) & (local >= 0) & (local < tile.shape[1])
    column = torch.where(inside, local, tile.shape[1])
    return F.pad(tile, (0, 1)).scatter_(1, column, values.to(tile.dtype))[:, :-1]


def accumulate(
    student: Tensor,
    teacher: Optional[Tensor],
    labels: Optional[Tensor],
    *,
    offset: int,
    spec: Spec,
    state: Tensor,
    skipped: Optional[Tensor] = None,
) -> None:
    """Fold the vocabulary chunk that begins at ``offset`` into ``state``, which leaves the ids
    ``skipped`` ``[rows, K]`` (-1: none) out of the student's maxima and normalisers."""
    dtype = _dtype(student, teacher)
    given = raw = spec.student_map.logits(student, dtype)
    if skipped is not None:
        raw = _written(raw, skipped, offset, raw.new_full((), -torch.inf).expand(skipped.shape))
    old_s, old_t = state[:, rs.Z_S].clone(), state[:, rs.Z_T].clone()
    old_m = state[:, rs.M_S].clone()
    s, e_s, up_s = _fold_normalizer(state, raw, spec, rs.M_S, rs.Z_S)
    _fold_top(state, raw, offset, rs.TOP_S, rs.ARG_S)
    _fold_moment(state, rs.E_S, old_mass=old_s, decay=(-up_s).exp(), shift=-up_s, fresh=_masked(e_s, s))
    if labels is not None and spec.hard_weight:
        _fold_z1(state, raw, rs.M_S, rs.Z1_S, old_m)
        _fold_label(state, given, labels, offset, rs.LABEL_S)
        if spec.label_smoothing:
            _fold_sum(state, given, labels, offset)
    if teacher is None:
        return
    raw = spec.teacher_map.logits(teacher, dtype)
    old_m = state[:, rs.M_T].clone()
    t, e_t, up_t = _fold_normalizer(state, raw, spec, rs.M_T, rs.Z_T)
    _fold_top(state, raw, offset, rs.TOP_T, rs.ARG_T)
    _fold_moment(state, rs.E_T, old_mass=old_t, decay=(-up_t).exp(), shift=-up_t, fresh=_masked(e_t, t))
    x = t - s
    _fold_moment(state, rs.X_S, old_mass=old_s, decay=(-up_s).exp(), shift=up_s - up_t, fresh=_masked(e_s, x))
    _fold_moment(state, rs.X_T, old_mass=old_t, decay=(-up_t).exp(), shift=up_s - up_t, fresh=_masked(e_t, x))
    if labels is not None and spec.teacher_hard_weight:
        _fold_z1(state, raw, rs.M_T, rs.Z1_T, old_m)
        _fold_label(state, raw, labels, offset, rs.LABEL_T)


def _fold_z1(state: Tensor, raw: Tensor, m_at: int, z1_at: int, old_m: Tensor) -> None:
    fresh = _below_maximum(raw, state[:, m_at]).exp().sum(-1).double()
    state[:, z1_at] = state[:, z1_at] * (old_m - state[:, m_at]).exp() + fresh


def _fold_sum(state: Tensor, raw: Tensor, labels: Tensor, offset: int) -> None:
    """The sum of the logits, relative to one of them, so that it keeps its digits where all are far from
    0: the label's, to which the loss compares them, or another of this chunk."""
    _, column = _in_chunk(labels, offset, raw.shape[1])
    base = raw.gather(1, column[:, None])
    base = torch.where(base.isfinite(), base, 0.0)
    state[:, rs.SUM_S] += (raw - base).sum(-1).double() + base[:, 0].double() * raw.shape[1]


def _distributions(student: Tensor, teacher: Tensor, spec: Spec, state: Tensor) -> tuple[Tensor, ...]:
    """p, q, log p, log q of a chunk, from finished normalisers."""
    dtype = _dtype(student, teacher)
    s = _below_maximum(spec.student_map.logits(student, dtype), state[:, rs.M_S])
    t = _below_maximum(spec.teacher_map.logits(teacher, dtype), state[:, rs.M_T])
    log_q = s / spec.temperature - state[:, rs.Z_S, None].log().to(dtype)
    log_p = t / spec.temperature - state[:, rs.Z_T, None].log().to(dtype)
    return log_p.exp(), log_q.exp(), log_p, log_q


def _q_psi(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, spec: Spec, state: Tensor) -> Tensor:
    q_psi, divergence = spec.divergence.q_psi(p, q, log_p, log_q), spec.divergence
    if type(divergence) is not SkewKL:
        return q_psi
    return torch.where(rs.disagree(state)[:, None], divergence.q_psi_apart(p, q), q_psi)


def accumulate_value(student: Tensor, teacher: Tensor, *, spec: Spec, state: Tensor) -> None:
    """The second pass of divergences without a closed form: value and slope."""
    p, q, log_p, log_q = _distributions(student, teacher, spec, state)
    state[:, rs.VALUE] += spec.divergence.phi(p, q, log_p, log_q).sum(-1).double()
    slope = _q_psi(p, q, log_p, log_q, spec, state).sum(-1).double()
    # NaN logits stay visible in the gradient, whatever the formula does with them.
    state[:, rs.SLOPE] += torch.where(state[:, rs.VALUE].isnan(), torch.nan, slope)


def _soft_gradient(student: Tensor, teacher: Tensor, spec: Spec, state: Tensor) -> Tensor:
    p, q, log_p, log_q = _distributions(student, teacher, spec, state)
    q_psi = _q_psi(p, q, log_p, log_q, spec, state)
    form = spec.divergence.closed_form
    if form == "forward":
        return q_psi
    slope = rs.divergence_value(state, spec) if form == "reverse" else state[:, rs.SLOPE]
    return q_psi - q * slope[:, None].to(q.dtype)


def _emitted(raw: Tensor, emission: Emission, offset: int, spec: Spec, state: Tensor) -> Tensor:
    nothing = state[:, rs.Z_S] == 0
    log_z = torch.where(nothing, torch.inf, state[:, rs.Z_S].log())
    rest = (_below_maximum(raw, state[:, rs.M_S]) / spec.temperature - log_z[:, None].to(raw.dtype)).exp()
    return _written(rest * emission.rest[:, None].to(raw.dtype), emission.ids, offset, emission.kept)


def _hard_gradient(
    raw: Tensor,
    m: Tensor,
    log_z: Tensor,
    labels: Tensor,
    offset: int,
    vocab: int,
    *,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    grad = (_below_maximum(raw, m) - log_z[:, None].to(raw.dtype)).exp()
    if z_loss:
        grad = grad * (1 + 2 * z_loss * (m + log_z)[:, None].to(raw.dtype))
    if smoothing:
        grad = grad - smoothing / vocab
    inside, column = _in_chunk(labels, offset, raw.shape[1])
    onehot = inside.to(raw.dtype) * (1.0 - smoothing)
    return grad.scatter_add(1, column[:, None], -onehot[:, None])


def gradient(
    student: Tensor,
    teacher: Optional[Tensor],
    labels: Optional[Tensor],
    weights: Tensor,
    *,
    offset: int,
    vocab: int,
    spec: Spec,
    state: Tensor,
    grad: Optional[Tensor],
    teacher_grad: Optional[Tensor],
    emission: Optional[Emission] = None,
) -> None:
    """weights * d(loss)/d(raw logits) of one chunk into ``grad`` (may be ``student`` itself).

    With a sparse target the soft term is ``emission``'s, and the state that of the rest.
    """
    dtype = _dtype(student, teacher)
    live = weights if labels is None else torch.where(labels >= 0, weights, 0.0)
    skip = live == 0
    if grad is not None:
        total = torch.zeros((), dtype=dtype, device=student.device)
        raw = spec.student_map.logits(student, dtype)
        if teacher is not None and spec.soft_weight:
            soft = _soft_gradient(student, teacher, spec, state)
            total = soft * (spec.soft_weight / spec.temperature)
        if emission is not None:
            total = _emitted(raw, emission, offset, spec, state)
        if labels is not None and spec.hard_weight:
            m, log_z = state[:, rs.M_S], state[:, rs.Z1_S].log()
            if emission is not None:
                m, log_z = emission.m1, emission.log_z1
            hard = _hard_gradient(
                raw, m, log_z, labels, offset, vocab, smoothing=spec.label_smoothing, z_loss=spec.z_loss
            )
            total = total + hard * spec.hard_weight
        total = spec.student_map.backward(total, raw) * live[:, None]
        total = total.masked_fill(skip[:, None], 0.0)
    if teacher_grad is not None:
        assert teacher is not None and labels is not None
        raw = spec.teacher_map.logits(teacher, dtype)
        hard = _hard_gradient(
            raw, state[:, rs.M_T], state[:, rs.Z1_T].log(), labels, offset, vocab, smoothing=0.0, z_loss=0.0
        )
        hard = spec.teacher_map.backward(hard * spec.teacher_hard_weight, raw)
        teacher_grad.copy_((hard * live[:, None]).masked_fill(skip[:, None], 0.0))
    if grad is not None:
        grad.copy_(total)


def fused(
    student: Tensor,
    teacher: Optional[Tensor],
    labels: Optional[Tensor],
    weights: Tensor,
    *,
    spec: Spec,
    grad: Optional[Tensor],
    teacher_grad: Optional[Tensor],
) -> Tensor:
    """Whole rows: results, and the gradients where buffers are given (aliasing allowed)."""
    vocab = student.shape[1]
    state = rs.new_state(student.shape[0], student.device)
    accumulate(student, teacher, labels, offset=0, spec=spec, state=state)
    if teacher is not None and spec.divergence.closed_form is None:
        accumulate_value(student, teacher, spec=spec, state=state)
    if grad is not None or teacher_grad is not None:
        gradient(
            student,
            teacher,
            labels,
            weights,
            offset=0,
            vocab=vocab,
            spec=spec,
            state=state,
            grad=grad,
            teacher_grad=teacher_grad,
        )
    return rs.finish(state, spec, labels, vocab, teacher is not None)


def fused_sparse(
    student: Tensor,
    target: Outcomes,
    labels: Optional[Tensor],
    weights: Tensor,
    *,
    spec: Spec,
    grad: Optional[Tensor],
) -> Tensor:
    """Whole rows with a sparse target: results, and the gradient where a buffer is given (aliasing
    allowed)."""
    return in_two_passes(
        student,
        target,
        labels,
        weights,
        spec=spec,
        grad=grad,
        accumulate=accumulate,
        fused=fused,
        gradient=gradient,
    )
