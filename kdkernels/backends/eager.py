"""The plain PyTorch backend: any device, any floating dtype, analytic gradients.

Rows in half precision are computed in fp32, fp64 rows in fp64. Memory: about TEMPORARIES tiles of
the arithmetic's dtype beside the tiles themselves, which the schedule takes into account.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergences import SkewKL, pointwise, unwritten
from ..dtypes import widest
from .outcomes import Outcomes
from .protocol import Gradients, SparseGradient, Tile
from .row_state import NO_REFERENCE, Normaliser, PairState, RowState, SideState, finish, new_state
from .sparse_rows import in_two_passes
from .spec import Asked, Output, Spec

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


def why_not() -> str | None:
    return None


def cannot(device: torch.device, dtypes: list[torch.dtype], spec: Spec) -> str | None:
    return None


def bytes_per_logit(dtypes: list[torch.dtype]) -> int:
    return TEMPORARIES * widest(dtypes).itemsize


def _dtype(*tiles: Tensor | None) -> torch.dtype:
    return widest(t.dtype for t in tiles if t is not None)


def _column(per_row: Tensor, like: Tensor) -> Tensor:
    return per_row[:, None].to(like.dtype)


def _times(weight: Tensor, v: Tensor) -> Tensor:
    """weight * v with a column of weights, where 0 times anything is 0."""
    return torch.where(weight == 0, 0.0, weight * v)


def _in_chunk(labels: Tensor, offset: int, width: int) -> tuple[Tensor, Tensor]:
    """Which rows have their label in this chunk, and a column to read for every row."""
    local = labels - offset
    inside = (local >= 0) & (local < width) & (labels >= 0)
    return inside, local.clamp(0, width - 1)


def _written(logits: Tensor, ids: Tensor, offset: int, values: Tensor) -> Tensor:
    """``logits`` with ``values`` in the columns ``ids`` that lie in the chunk; a spare column takes the others."""
    local = ids - offset
    inside = (ids >= 0) & (local >= 0) & (local < logits.shape[1])
    column = torch.where(inside, local, logits.shape[1])
    return F.pad(logits, (0, 1)).scatter_(1, column, values.to(logits.dtype))[:, :-1]


class _Folded(NamedTuple):
    """What folding one side's chunk leaves for the pair: see PairState."""

    shift: Tensor  # (z - m) / T  [n, w]
    exp: Tensor  # e
    sum_exp: Tensor  # before this chunk
    risen: Tensor  # how far m / T rose
    decay: Tensor  # what sums relative to the old m are multiplied by


def _summed(exp: Tensor, tile: Tile, *, apart: bool) -> Tensor:
    """Each row's sum. With ``apart`` the label's entry is added in fp64: beside a label that has nearly all the mass
    the others are all that its loss is made of, and next to its 1 they would lose their digits."""
    if not apart or tile.labels is None:
        return exp.sum(-1).double()
    inside, column = _in_chunk(tile.labels, tile.offset, exp.shape[1])
    own = exp.gather(1, column[:, None])
    exp.scatter_(1, column[:, None], torch.where(inside[:, None], 0.0, own))
    others = exp.sum(-1).double()
    exp.scatter_(1, column[:, None], own)
    return others + torch.where(inside, own[:, 0], 0.0).double()


def _fold_side(side: SideState, z: Tensor, tile: Tile, spec: Spec, hard: bool) -> _Folded:
    """Fold the logits ``z`` into one model's state."""
    old, old_sum = side.reference.clone(), side.sum_exp.clone()
    side.reference.copy_(torch.maximum(old, z.amax(-1).double().clamp(min=NO_REFERENCE)))
    risen = (side.reference - old) / tile.temperature
    below = z - _column(side.reference, z)  # before a temperature divides: that keeps the digits
    shift = below / _column(tile.temperature, z)
    exp, decay = shift.exp(), (-risen).exp()
    # On both sides, so that models that agree have the same sums.
    apart = bool(spec.asked & (Asked.LABEL | Asked.TEACHER_LABEL))
    side.sum_exp.mul_(decay).add_(_summed(exp, tile, apart=apart and not spec.tempered))
    if hard and spec.tempered:
        side.sum_exp_t1.mul_((old - side.reference).exp()).add_(_summed(below.exp(), tile, apart=apart))
    elif hard:
        side.sum_exp_t1.copy_(side.sum_exp)
    folded = _Folded(shift, exp, old_sum, risen, decay)
    if spec.sums_shifts:
        _fold_moment(side.sum_exp_shift, folded, moved=-risen, values=shift)
    if spec.stats:
        _fold_top(side, z, tile.offset)
    return folded


def _fold_moment(total: Tensor, side: _Folded, *, moved: Tensor, values: Tensor) -> None:
    """Add sum e * ``values`` to ``total``, whose own values moved. What decays to 0 is 0, an infinity too."""
    shifted = total + torch.where(side.sum_exp > 0, side.sum_exp * moved, 0.0)
    fresh = torch.where(side.exp > 0, side.exp * values, 0.0).sum(-1)
    total.copy_(torch.where(side.decay > 0, shifted * side.decay, 0.0) + fresh.double())


def _fold_top(side: SideState, z: Tensor, offset: int) -> None:
    value, index = z.max(-1)
    better = value > side.top_logit
    side.top_logit.copy_(torch.where(better, value.double(), side.top_logit))
    side.top_index.copy_(torch.where(better, (index + offset).double(), side.top_index))


def _fold_pair(pair: PairState, s: _Folded, t: _Folded) -> None:
    x, moved = t.shift - s.shift, s.risen - t.risen
    _fold_moment(pair.cross_s, s, moved=moved, values=x)
    _fold_moment(pair.cross_t, t, moved=moved, values=x)


def _fold_label(side: SideState, z: Tensor, labels: Tensor, offset: int) -> None:
    inside, column = _in_chunk(labels, offset, z.shape[1])
    value = z.gather(1, column[:, None])[:, 0].double()
    side.label_logit.copy_(torch.where(inside, value, side.label_logit))


def _fold_sum(side: SideState, z: Tensor, labels: Tensor, offset: int) -> None:
    """The sum of the logits, relative to one of them, so that it keeps its digits where all are far from
    0: the label's, to which the loss compares them, or another of this chunk."""
    _, column = _in_chunk(labels, offset, z.shape[1])
    base = z.gather(1, column[:, None])
    base = torch.where(base.isfinite(), base, 0.0)
    side.sum_logits.add_((z - base).sum(-1).double() + base[:, 0].double() * z.shape[1])


def accumulate(tile: Tile, spec: Spec, state: Tensor, skipped: Tensor | None = None) -> None:
    row, dtype = RowState.of(state), _dtype(tile.student, tile.teacher)
    z = given = spec.student_map.logits(tile.student, dtype)
    if skipped is not None:
        z = _written(z, skipped, tile.offset, z.new_full((), -torch.inf).expand(skipped.shape))
    folded = _fold_side(row.student, z, tile, spec, hard=bool(spec.asked & Asked.HARD))
    if tile.labels is not None and spec.asked & Asked.LABEL:
        _fold_label(row.student, given, tile.labels, tile.offset)
    if tile.labels is not None and spec.asked & Asked.SMOOTH:
        _fold_sum(row.student, given, tile.labels, tile.offset)
    if tile.teacher is None:
        return
    z = spec.teacher_map.logits(tile.teacher, dtype)
    labelled = bool(spec.asked & Asked.TEACHER_LABEL)
    _fold_pair(row.pair, folded, _fold_side(row.teacher, z, tile, spec, hard=labelled))
    if labelled and tile.labels is not None:
        _fold_label(row.teacher, z, tile.labels, tile.offset)


class _Distributions(NamedTuple):
    """p and q of a chunk, from finished normalisers."""

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor


def _distributions(tile: Tile, spec: Spec, row: RowState) -> _Distributions:
    assert tile.teacher is not None
    dtype = _dtype(tile.student, tile.teacher)
    log_q = _log_softmax(spec.student_map.logits(tile.student, dtype), row.student, tile.temperature)
    log_p = _log_softmax(spec.teacher_map.logits(tile.teacher, dtype), row.teacher, tile.temperature)
    return _Distributions(log_p.exp(), log_q.exp(), log_p, log_q)


def _log_softmax(z: Tensor, side: SideState, temperature: Tensor) -> Tensor:
    below = z - _column(side.reference, z)
    return below / _column(temperature, z) - _column(side.log_sum_exp, z)


def _q_psi(tile: Tile, spec: Spec, row: RowState, at: _Distributions) -> Tensor:
    divergence = spec.divergence(tile.parameters)
    q_psi = unwritten(divergence.q_psi, *at)
    if type(divergence) is not SkewKL:
        return q_psi
    return torch.where(row.disagree()[:, None], divergence.q_psi_apart(at.p, at.q), q_psi)


def accumulate_value(tile: Tile, spec: Spec, state: Tensor) -> None:
    row = RowState.of(state)
    at = _distributions(tile, spec, row)
    row.pair.value.add_(pointwise(spec.divergence(tile.parameters), *at).sum(-1).double())
    total = _q_psi(tile, spec, row, at).sum(-1).double()
    # NaN logits stay visible in the gradient, whatever the formula does with them.
    row.pair.sum_q_psi.add_(torch.where(row.pair.value.isnan(), torch.nan, total))


def _soft_gradient(tile: Tile, spec: Spec, row: RowState) -> Tensor:
    """d(divergence)/d(logits)."""
    at = _distributions(tile, spec, row)
    q_psi = _q_psi(tile, spec, row, at)
    if spec.closed_form != "forward":
        mean = row.divergence(spec) if spec.closed_form == "reverse" else row.pair.sum_q_psi
        q_psi = q_psi - at.q * _column(mean, at.q)
    return q_psi / _column(tile.temperature, q_psi)


def _sparse_gradient(z: Tensor, sparse: SparseGradient, tile: Tile, side: SideState) -> Tensor:
    nothing = side.sum_exp == 0
    log_sum_exp = torch.where(nothing, torch.inf, side.log_sum_exp)
    shift = (z - _column(side.reference, z)) / _column(tile.temperature, z)
    rest = (shift - _column(log_sum_exp, z)).exp() * _column(sparse.rest, z)
    return _written(rest, sparse.ids, tile.offset, sparse.stored)


class _Hard(NamedTuple):
    """The weights of what is taken at temperature 1, and the normaliser there."""

    label: Tensor
    smooth: Tensor
    lse_squared: Tensor
    at_1: Normaliser


def _hard_gradient(z: Tensor, tile: Tile, hard: _Hard) -> Tensor:
    assert tile.labels is not None
    softmax = (z - _column(hard.at_1.reference, z) - _column(hard.at_1.log_sum_exp, z)).exp()
    from_lse = torch.where(hard.lse_squared == 0, 0.0, 2 * hard.at_1.lse * hard.lse_squared)
    pull, spread = hard.label + hard.smooth + from_lse, hard.smooth / tile.vocab
    grad = softmax * _column(pull, z) - _column(spread, z)
    inside, column = _in_chunk(tile.labels, tile.offset, z.shape[1])
    # At the label in fp64: what is left of weight (1 - q) where q is nearly 1 keeps its digits.
    at_label = z.gather(1, column[:, None])[:, 0].double()
    own = (at_label - hard.at_1.reference - hard.at_1.log_sum_exp).exp()
    own = (pull * own - spread - hard.label)[:, None].to(z.dtype)
    return grad.scatter(
        1, column[:, None], torch.where(inside[:, None], own, grad.gather(1, column[:, None]))
    )


def _entropy_gradient(z: Tensor, tile: Tile, side: SideState, sparse: SparseGradient | None) -> Tensor:
    """q (mean shift - shift) / T: that is -q (log q + H) / T without the normaliser, which cancels."""
    whole = (
        (side.reference, side.log_sum_exp, side.mean_shift) if sparse is None else sparse.softmax.unbind(1)
    )
    reference, log_sum_exp, mean = (_column(number, z) for number in whole)
    shift = (z - reference) / _column(tile.temperature, z)
    q = (shift - log_sum_exp).exp()
    return torch.where(q == 0, 0.0, q * (mean - shift)) / _column(tile.temperature, z)


def _live_weights(tile: Tile, weights: Tensor) -> Tensor:
    return weights if tile.labels is None else torch.where((tile.labels >= 0)[:, None], weights, 0.0)


def _student_gradient(
    tile: Tile, weights: Tensor, spec: Spec, row: RowState, sparse: SparseGradient | None
) -> Tensor:
    dtype = _dtype(tile.student, tile.teacher)
    z = spec.student_map.logits(tile.student, dtype)
    total = torch.zeros((), dtype=dtype, device=z.device)
    soft = _column(weights[:, Output.SOFT], z)
    if sparse is not None:
        total = _times(soft, _sparse_gradient(z, sparse, tile, row.student))
    elif spec.asked & Asked.SOFT:
        total = _times(soft, _soft_gradient(tile, spec, row))
    if spec.asked & Asked.HARD:
        hard = _Hard(
            weights[:, Output.LABEL],
            weights[:, Output.SMOOTH],
            weights[:, Output.LSE_SQUARED],
            row.student.at_1 if sparse is None else Normaliser(*sparse.at_1.unbind(1)),
        )
        weighted = (hard.label != 0) | (hard.smooth != 0) | (hard.lse_squared != 0)
        total = total + _times(_column(weighted, z), _hard_gradient(z, tile, hard))
    if spec.asked & Asked.ENTROPY:
        entropy = _entropy_gradient(z, tile, row.student, sparse)
        total = total + _times(_column(weights[:, Output.ENTROPY], z), entropy)
    return spec.student_map.backward(total, z)


def _teacher_gradient(tile: Tile, weights: Tensor, spec: Spec, row: RowState) -> Tensor:
    assert tile.teacher is not None
    z = spec.teacher_map.logits(tile.teacher, _dtype(tile.student, tile.teacher))
    label, nothing = weights[:, Output.TEACHER_LABEL], torch.zeros_like(weights[:, 0])
    hard = _Hard(label, nothing, nothing, row.teacher.at_1)
    return spec.teacher_map.backward(_times(_column(label != 0, z), _hard_gradient(z, tile, hard)), z)


def gradient(
    tile: Tile,
    weights: Tensor,
    spec: Spec,
    state: Tensor,
    gradients: Gradients,
    sparse: SparseGradient | None = None,
) -> None:
    row, weights = RowState.of(state), _live_weights(tile, weights)
    dead = (weights == 0).all(-1, keepdim=True)
    made = []
    if gradients.student is not None:
        made.append((gradients.student, _student_gradient(tile, weights, spec, row, sparse)))
    if gradients.teacher is not None:
        made.append((gradients.teacher, _teacher_gradient(tile, weights, spec, row)))
    for buffer, grad in made:  # written last: a buffer may be the logits that the other is made of
        buffer.copy_(grad.masked_fill(dead, 0.0))


def fused(tile: Tile, weights: Tensor, spec: Spec, gradients: Gradients) -> Tensor:
    state = new_state(tile.student.shape[0], tile.student.device)
    accumulate(tile, spec, state)
    if spec.asked & Asked.SOFT and spec.closed_form is None:
        accumulate_value(tile, spec, state)
    if gradients.asked:
        gradient(tile, weights, spec, state, gradients)
    return finish(state, spec, tile.labels, tile.vocab)


def fused_sparse(tile: Tile, target: Outcomes, weights: Tensor, spec: Spec, gradients: Gradients) -> Tensor:
    return in_two_passes(sys.modules[__name__], tile, target, weights, spec, gradients)
