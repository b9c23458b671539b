"""The online state of a row in Triton: folded over lanes, merged across lanes, parts and chunks.

``RowState`` has the fields of ``kdkernels/backends/row_state.py`` in the same order: the same struct for
each model, and one for the pair. What follows treats one model at a time; only the pair's functions see both.
The state takes two forms:

* lanes: fp32 vectors, one entry a lane. Every lane keeps a reference and sums of its own, so the loop
  over the vocabulary needs no exchange between threads. Shifts are in the exponents' unit, base 2:
  log2(e) / T is folded in. ``top_index`` is the first column of the group that raised the reference last.
* rows: fp64, one entry a row, in nats: what the state tensor holds. fp32 is enough inside a row,
  where a lane adds a few hundred terms and lanes are summed as a tree; what is done once per row is
  fp64, which keeps the digits of log z and of the merge, and costs next to nothing.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import row_state as rs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: The reference of no logits: finite, so that the difference of two is 0 and not NaN.
NO_REFERENCE = tl.constexpr(rs.NO_REFERENCE)
#: 2 to this is 0, and 0 times this is 0, which 0 times -inf is not.
LEAST = tl.constexpr(-300.0)
#: Beyond any column.
NO_COLUMN = tl.constexpr(2147483647)

SIDE = tl.constexpr(len(rs.SideState._fields))
PAIR = tl.constexpr(len(rs.PairState._fields))
COLUMNS = tl.constexpr(rs.COLUMNS)
#: Where the second pass's sums are in a row of the state.
VALUE = tl.constexpr(2 * SIDE.value + rs.PairState._fields.index("value"))
SUM_Q_PSI = tl.constexpr(2 * SIDE.value + rs.PairState._fields.index("sum_q_psi"))


class SideState(NamedTuple):
    reference: tl.tensor
    sum_exp: tl.tensor
    sum_exp_shift: tl.tensor
    sum_exp_t1: tl.tensor
    sum_logits: tl.tensor
    label_logit: tl.tensor
    top_logit: tl.tensor
    top_index: tl.tensor


class PairState(NamedTuple):
    cross_s: tl.tensor
    cross_t: tl.tensor
    value: tl.tensor
    sum_q_psi: tl.tensor


class RowState(NamedTuple):
    student: SideState
    teacher: SideState
    pair: PairState


class Rise(NamedTuple):
    """What a higher reference does to sums that were relative to the old one."""

    up: tl.tensor  # how far it rose, in the unit of the shifts
    decay: tl.tensor  # of sum_exp
    decay_t1: tl.tensor  # of sum_exp_t1


class Folded(NamedTuple):
    """One model's lanes with a tile folded in, and what the pair needs of it."""

    state: SideState
    rise: Rise
    before: tl.tensor  # sum_exp without the tile
    shift: tl.tensor  # [LANES, K]
    exp: tl.tensor  # [LANES, K]


@triton.jit
def times(weight, v):
    """weight * v with 0 * inf = 0; a NaN weight stays."""
    return tl.where(weight == 0.0, 0.0, weight * v)


@triton.jit
def exponent(z, m, factor):
    """The argument of exp2. Not one fused product: that would round m * factor, and the largest
    exponential would only nearly be 1."""
    return (z - m) * factor


@triton.jit
def faded(total, decay):
    """What decays to nothing is 0, an infinity too: there p (or q) is 0."""
    return tl.where(decay == 0.0, 0.0, total * decay)


@triton.jit
def lane_rise(F: tl.constexpr, old, new, factor):
    down = exponent(old, new, factor)
    decay = tl.exp2(down)
    decay_t1 = decay
    if F.tempered:
        decay_t1 = tl.exp2(exponent(old, new, LOG2E))
    return Rise(-down, decay, decay_t1)


@triton.jit
def row_rise(old, new, temperature):
    down_t1 = old - new
    down = down_t1 / temperature
    return Rise(-down, tl.exp(down), tl.exp(down_t1))


@triton.jit
def raise_side(F: tl.constexpr, side, reference, rise):
    sum_exp_shift, sum_exp_t1 = side.sum_exp_shift, side.sum_exp_t1
    if F.shifts:
        sum_exp_shift = faded(sum_exp_shift - times(side.sum_exp, rise.up), rise.decay)
    if F.hard or F.teacher_label:
        sum_exp_t1 = sum_exp_t1 * rise.decay_t1
    return SideState(
        reference=reference,
        sum_exp=side.sum_exp * rise.decay,
        sum_exp_shift=sum_exp_shift,
        sum_exp_t1=sum_exp_t1,
        sum_logits=side.sum_logits,
        label_logit=side.label_logit,
        top_logit=side.top_logit,
        top_index=side.top_index,
    )


@triton.jit
def raise_pair(F: tl.constexpr, pair, student_sum, teacher_sum, student_rise, teacher_rise):
    """``student_sum`` and ``teacher_sum`` are sum_exp before the rise."""
    cross_s, cross_t = pair.cross_s, pair.cross_t
    moved = student_rise.up - teacher_rise.up
    if F.needs_cross_s:
        cross_s = faded(cross_s + times(student_sum, moved), student_rise.decay)
    if F.needs_cross_t:
        cross_t = faded(cross_t + times(teacher_sum, moved), teacher_rise.decay)
    return PairState(cross_s, cross_t, pair.value, pair.sum_q_psi)


@triton.jit
def empty_side(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    nothing = tl.full([LANES], NO_REFERENCE, tl.float32)
    return SideState(nothing, zero, zero, zero, zero, zero, zero, tl.zeros([LANES], tl.int32))


@triton.jit
def empty_lanes(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    return RowState(empty_side(LANES), empty_side(LANES), PairState(zero, zero, zero, zero))


@triton.jit
def fold_side(F: tl.constexpr, side, z, group, factor, NEEDS_T1: tl.constexpr):
    """One model's lanes with one more tile of logits ``z [LANES, K]``, whose first columns are ``group``.

    One exponential a column, and one a lane to raise its sums: an eighth more with K = 8.
    """
    reference = tl.maximum(side.reference, tl.max(z, 1))
    rise = lane_rise(F, side.reference, reference, factor)
    a = raise_side(F, side, reference, rise)
    shift = exponent(z, reference[:, None], factor)
    exp = tl.exp2(shift)
    sum_exp_shift, sum_exp_t1, top_index = a.sum_exp_shift, a.sum_exp_t1, a.top_index
    if F.shifts:
        sum_exp_shift += tl.sum(exp * tl.maximum(shift, LEAST), 1)
    if F.stats:
        top_index = tl.where(reference > side.reference, group, top_index)
    if NEEDS_T1 and F.tempered:
        sum_exp_t1 += tl.sum(tl.exp2(exponent(z, reference[:, None], LOG2E)), 1)
    state = SideState(
        reference=reference,
        sum_exp=a.sum_exp + tl.sum(exp, 1),
        sum_exp_shift=sum_exp_shift,
        sum_exp_t1=sum_exp_t1,
        sum_logits=a.sum_logits,
        label_logit=a.label_logit,
        top_logit=a.top_logit,
        top_index=top_index,
    )
    return Folded(state, rise, side.sum_exp, shift, exp)


@triton.jit
def fold_pair(F: tl.constexpr, pair, s, t):
    """The pair's lanes with a tile that is folded into both sides."""
    a = raise_pair(F, pair, s.before, t.before, s.rise, t.rise)
    cross_s, cross_t = a.cross_s, a.cross_t
    if F.needs_cross_s:
        cross_s += tl.sum(times(s.exp, t.shift - s.shift), 1)
    if F.needs_cross_t:
        cross_t += tl.sum(times(t.exp, t.shift - s.shift), 1)
    return PairState(cross_s, cross_t, a.value, a.sum_q_psi)


@triton.jit
def _total(lanes):
    return tl.sum(lanes, 0).to(tl.float64)


@triton.jit
def _side_across_lanes(F: tl.constexpr, side, reference, rise):
    a = raise_side(F, side, reference, rise)
    sum_exp = _total(a.sum_exp)
    sum_exp_t1 = sum_exp
    if F.tempered:
        sum_exp_t1 = _total(a.sum_exp_t1)
    top_index = 0
    if F.stats:
        top_index = tl.min(tl.where(side.reference == reference, side.top_index, NO_COLUMN), 0)
    highest = reference.to(tl.float64)
    return SideState(
        reference=highest,
        sum_exp=sum_exp,
        sum_exp_shift=_total(a.sum_exp_shift) * LN2,
        sum_exp_t1=sum_exp_t1,
        sum_logits=_total(a.sum_logits),
        label_logit=highest * 0.0,
        top_logit=highest,
        top_index=top_index,
    )


@triton.jit
def across_lanes(F: tl.constexpr, r, factor):
    """Lanes -> row, but for the labels' logits. top_index is the first column of a group still."""
    s, t = tl.max(r.student.reference, 0), tl.max(r.teacher.reference, 0)
    s_rise = lane_rise(F, r.student.reference, s, factor)
    t_rise = lane_rise(F, r.teacher.reference, t, factor)
    pair = raise_pair(F, r.pair, r.student.sum_exp, r.teacher.sum_exp, s_rise, t_rise)
    student = _side_across_lanes(F, r.student, s, s_rise)
    zero = student.sum_exp * 0.0
    return RowState(
        student,
        _side_across_lanes(F, r.teacher, t, t_rise),
        PairState(_total(pair.cross_s) * LN2, _total(pair.cross_t) * LN2, zero, zero),
    )


@triton.jit
def _merged_side(F: tl.constexpr, a, b, reference, a_rise, b_rise):
    """Of equal top logits the first, in ``a``, counts."""
    a, b = raise_side(F, a, reference, a_rise), raise_side(F, b, reference, b_rise)
    better = b.top_logit > a.top_logit
    return SideState(
        reference=reference,
        sum_exp=a.sum_exp + b.sum_exp,
        sum_exp_shift=a.sum_exp_shift + b.sum_exp_shift,
        sum_exp_t1=a.sum_exp_t1 + b.sum_exp_t1,
        sum_logits=a.sum_logits + b.sum_logits,
        label_logit=a.label_logit + b.label_logit,  # 0 in all chunks but the label's
        top_logit=tl.where(better, b.top_logit, a.top_logit),
        top_index=tl.where(better, b.top_index, a.top_index),
    )


@triton.jit
def merged(F: tl.constexpr, a, b, temperature):
    """Rows ``a`` and ``b`` of different columns as one, ``a``'s the first."""
    s = tl.maximum(a.student.reference, b.student.reference)
    t = tl.maximum(a.teacher.reference, b.teacher.reference)
    a_s, b_s = row_rise(a.student.reference, s, temperature), row_rise(b.student.reference, s, temperature)
    a_t, b_t = row_rise(a.teacher.reference, t, temperature), row_rise(b.teacher.reference, t, temperature)
    p = raise_pair(F, a.pair, a.student.sum_exp, a.teacher.sum_exp, a_s, a_t)
    q = raise_pair(F, b.pair, b.student.sum_exp, b.teacher.sum_exp, b_s, b_t)
    return RowState(
        _merged_side(F, a.student, b.student, s, a_s, b_s),
        _merged_side(F, a.teacher, b.teacher, t, a_t, b_t),
        PairState(p.cross_s + q.cross_s, p.cross_t + q.cross_t, p.value + q.value, p.sum_q_psi + q.sum_q_psi),
    )


@triton.jit
def with_value(r, value, sum_q_psi):
    return RowState(r.student, r.teacher, PairState(r.pair.cross_s, r.pair.cross_t, value, sum_q_psi))


@triton.jit
def _load_side(pointer, mask):
    return SideState(*[tl.load(pointer + i, mask) for i in (0, 1, 2, 3, 4, 5, 6, 7)])


@triton.jit
def load_state(pointer, mask):
    """The state at ``pointer``, one address or a vector of them."""
    pair = PairState(*[tl.load(pointer + 2 * SIDE + i, mask) for i in (0, 1, 2, 3)])
    return RowState(_load_side(pointer, mask), _load_side(pointer + SIDE, mask), pair)


@triton.jit
def store_state(pointer, r, mask):
    for i in tl.static_range(SIDE):
        tl.store(pointer + i, r.student[i], mask)
        tl.store(pointer + SIDE + i, r.teacher[i], mask)
    for i in tl.static_range(PAIR):
        tl.store(pointer + 2 * SIDE + i, r.pair[i], mask)


class Normaliser(NamedTuple):
    """log sum exp(z) of a row in two parts, as in row_state.py; fp64."""

    reference: tl.tensor
    log_sum_exp: tl.tensor


@triton.jit
def normaliser(side):
    """At temperature 1."""
    return Normaliser(side.reference, tl.log(side.sum_exp_t1))


@triton.jit
def lse(at_1):
    return at_1.reference + at_1.log_sum_exp


@triton.jit
def above(at_1, z):
    """The normaliser's distance to logits."""
    return (at_1.reference - z) + at_1.log_sum_exp
