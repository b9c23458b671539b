"""The online state of a row in Triton: folded over lanes, merged across lanes, parts and chunks.

``RowState`` has the fields of ``kdkernels/backends/row_state.py`` in the same order and takes two
forms:

* lanes: fp32 vectors, one entry a lane. Every lane keeps a maximum and sums of its own, so the loop
  over the vocabulary needs no exchange between threads. x and e are in the exponents' unit, base 2:
  log2(e) / T is folded in. sum_s is relative to a base (see :func:`rows.fold_row`).
* rows: fp64, one entry a row, in nats: what the state tensor holds. fp32 is enough inside a row,
  where a lane adds a few hundred terms and lanes are summed as a tree; what is done once per row is
  fp64, which keeps the digits of log z and of the merge, and costs next to nothing.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: The maximum of nothing: finite, so that the difference of two is 0 and not NaN.
LOWEST = tl.constexpr(-1e30)
#: 2 to this is 0, and 0 times this is 0, which 0 times -inf is not.
LEAST = tl.constexpr(-300.0)
COLUMNS = tl.constexpr(19)
VALUE = tl.constexpr(17)


class RowState(NamedTuple):
    m_s: tl.tensor
    z_s: tl.tensor
    m_t: tl.tensor
    z_t: tl.tensor
    x_s: tl.tensor
    x_t: tl.tensor
    e_s: tl.tensor
    e_t: tl.tensor
    z1_s: tl.tensor
    z1_t: tl.tensor
    sum_s: tl.tensor
    label_s: tl.tensor
    label_t: tl.tensor
    top_s: tl.tensor
    arg_s: tl.tensor
    top_t: tl.tensor
    arg_t: tl.tensor
    value: tl.tensor
    slope: tl.tensor


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
def empty_lanes(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    lowest = tl.full([LANES], LOWEST, tl.float32)
    first = tl.zeros([LANES], tl.int32)
    return RowState(
        lowest,
        zero,
        lowest,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        first,
        zero,
        first,
        zero,
        zero,
    )


@triton.jit
def faded(total, decay):
    """What decays to nothing is 0, an infinity too: there p (or q) is 0."""
    return tl.where(decay == 0.0, 0.0, total * decay)


@triton.jit
def raised(r, m_s, m_t, up_s, up_t, decay_s, decay_t, decay1_s, decay1_t):
    """The sums relative to the higher maxima m_s and m_t: ``up`` higher, in the unit of x and e."""
    return RowState(
        m_s,
        r.z_s * decay_s,
        m_t,
        r.z_t * decay_t,
        faded(r.x_s + r.z_s * (up_s - up_t), decay_s),
        faded(r.x_t + r.z_t * (up_s - up_t), decay_t),
        faded(r.e_s - r.z_s * up_s, decay_s),
        faded(r.e_t - r.z_t * up_t, decay_t),
        r.z1_s * decay1_s,
        r.z1_t * decay1_t,
        r.sum_s,
        r.label_s,
        r.label_t,
        r.top_s,
        r.arg_s,
        r.top_t,
        r.arg_t,
        r.value,
        r.slope,
    )


@triton.jit
def _lifted(F: tl.constexpr, r, m_s, m_t, factor):
    """Lanes raised to the maxima m_s and m_t."""
    down_s, down_t = exponent(r.m_s, m_s, factor), exponent(r.m_t, m_t, factor)
    decay_s, decay_t = tl.exp2(down_s), tl.exp2(down_t)
    decay1_s, decay1_t = decay_s, decay_t
    if F.tempered:
        decay1_s, decay1_t = tl.exp2(exponent(r.m_s, m_s, LOG2E)), tl.exp2(exponent(r.m_t, m_t, LOG2E))
    return raised(r, m_s, m_t, -down_s, -down_t, decay_s, decay_t, decay1_s, decay1_t)


@triton.jit
def fold(F: tl.constexpr, r, s, t, given, base, group, inside, factor):
    """Lanes ``r`` with one more tile of logits ``[LANES, K]``, whose first columns are ``group``;
    ``given`` is s before a sparse target's ids were taken out, ``base`` what sum_s is relative to.

    Two exponentials a column, and two a lane to raise its sums: an eighth more with K = 8. A lane's arg
    is the first column of the group that raised its maximum last.
    """
    m_s, m_t, arg_t = tl.maximum(r.m_s, tl.max(s, 1)), r.m_t, r.arg_t
    arg_s = tl.where(m_s > r.m_s, group, r.arg_s)
    if F.kind:
        m_t = tl.maximum(r.m_t, tl.max(t, 1))
        arg_t = tl.where(m_t > r.m_t, group, r.arg_t)
    a = _lifted(F, r, m_s, m_t, factor)
    x_s, x_t, z_t, e_t, z1_s, z1_t, sum_s = a.x_s, a.x_t, a.z_t, a.e_t, a.z1_s, a.z1_t, a.sum_s
    u_s = exponent(s, m_s[:, None], factor)
    exp_s = tl.exp2(u_s)
    if F.kind:
        u_t = exponent(t, m_t[:, None], factor)
        exp_t = tl.exp2(u_t)
        z_t += tl.sum(exp_t, 1)
        e_t += tl.sum(exp_t * tl.maximum(u_t, LEAST), 1)
        if F.kind == 1 or F.kind == 4:  # its value; whether p and q disagree
            x_t += tl.sum(times(exp_t, u_t - u_s), 1)
        if F.kind == 2:
            x_s += tl.sum(times(exp_s, u_t - u_s), 1)
    if F.tempered:
        if F.hard:
            z1_s += tl.sum(tl.exp2(exponent(s, m_s[:, None], LOG2E)), 1)
        if F.teacher_hard:
            z1_t += tl.sum(tl.exp2(exponent(t, m_t[:, None], LOG2E)), 1)
    if F.smooth:
        sum_s += tl.sum(tl.where(inside, given - base, 0.0), 1)
    return RowState(
        m_s=m_s,
        z_s=a.z_s + tl.sum(exp_s, 1),
        m_t=m_t,
        z_t=z_t,
        x_s=x_s,
        x_t=x_t,
        e_s=a.e_s + tl.sum(exp_s * tl.maximum(u_s, LEAST), 1),
        e_t=e_t,
        z1_s=z1_s,
        z1_t=z1_t,
        sum_s=sum_s,
        label_s=a.label_s,
        label_t=a.label_t,
        top_s=a.top_s,
        arg_s=arg_s,
        top_t=a.top_t,
        arg_t=arg_t,
        value=a.value,
        slope=a.slope,
    )


@triton.jit
def _total(lanes):
    return tl.sum(lanes, 0).to(tl.float64)


@triton.jit
def across_lanes(F: tl.constexpr, r, factor):
    """Lanes -> row, but for the labels' logits; arg_s and arg_t are the first columns of groups still."""
    m_s, m_t = tl.max(r.m_s, 0), tl.max(r.m_t, 0)
    arg_s = tl.min(tl.where(r.m_s == m_s, r.arg_s, 2147483647), 0)
    arg_t = tl.min(tl.where(r.m_t == m_t, r.arg_t, 2147483647), 0)
    a = _lifted(F, r, m_s, m_t, factor)
    z_s, z_t = _total(a.z_s), _total(a.z_t)
    z1_s, z1_t = z_s, z_t
    if F.tempered:
        z1_s, z1_t = _total(a.z1_s), _total(a.z1_t)
    top_s, top_t = m_s.to(tl.float64), m_t.to(tl.float64)
    zero = top_s * 0.0
    return RowState(
        m_s=top_s,
        z_s=z_s,
        m_t=top_t,
        z_t=z_t,
        x_s=_total(a.x_s) * LN2,
        x_t=_total(a.x_t) * LN2,
        e_s=_total(a.e_s) * LN2,
        e_t=_total(a.e_t) * LN2,
        z1_s=z1_s,
        z1_t=z1_t,
        sum_s=_total(a.sum_s),
        label_s=zero,
        label_t=zero,
        top_s=top_s,
        arg_s=arg_s,
        top_t=top_t,
        arg_t=arg_t,
        value=zero,
        slope=zero,
    )


@triton.jit
def merged(a, b, temperature):
    """Rows ``a`` and ``b`` of different columns as one; of equal maxima the first in ``a`` counts."""
    m_s, m_t = tl.maximum(a.m_s, b.m_s), tl.maximum(a.m_t, b.m_t)
    a, b = _risen(a, m_s, m_t, temperature), _risen(b, m_s, m_t, temperature)
    better_s, better_t = b.top_s > a.top_s, b.top_t > a.top_t
    return RowState(
        m_s=m_s,
        z_s=a.z_s + b.z_s,
        m_t=m_t,
        z_t=a.z_t + b.z_t,
        x_s=a.x_s + b.x_s,
        x_t=a.x_t + b.x_t,
        e_s=a.e_s + b.e_s,
        e_t=a.e_t + b.e_t,
        z1_s=a.z1_s + b.z1_s,
        z1_t=a.z1_t + b.z1_t,
        sum_s=a.sum_s + b.sum_s,
        label_s=a.label_s + b.label_s,  # 0 in all chunks but the label's
        label_t=a.label_t + b.label_t,
        top_s=tl.where(better_s, b.top_s, a.top_s),
        arg_s=tl.where(better_s, b.arg_s, a.arg_s),
        top_t=tl.where(better_t, b.top_t, a.top_t),
        arg_t=tl.where(better_t, b.arg_t, a.arg_t),
        value=a.value + b.value,
        slope=a.slope + b.slope,
    )


@triton.jit
def _risen(r, m_s, m_t, temperature):
    down1_s, down1_t = r.m_s - m_s, r.m_t - m_t
    down_s, down_t = down1_s / temperature, down1_t / temperature
    return raised(
        r, m_s, m_t, -down_s, -down_t, tl.exp(down_s), tl.exp(down_t), tl.exp(down1_s), tl.exp(down1_t)
    )


@triton.jit
def load_state(pointer, mask):
    """The state at ``pointer``, one address or a vector of them."""
    return RowState(
        tl.load(pointer, mask),
        tl.load(pointer + 1, mask),
        tl.load(pointer + 2, mask),
        tl.load(pointer + 3, mask),
        tl.load(pointer + 4, mask),
        tl.load(pointer + 5, mask),
        tl.load(pointer + 6, mask),
        tl.load(pointer + 7, mask),
        tl.load(pointer + 8, mask),
        tl.load(pointer + 9, mask),
        tl.load(pointer + 10, mask),
        tl.load(pointer + 11, mask),
        tl.load(pointer + 12, mask),
        tl.load(pointer + 13, mask),
        tl.load(pointer + 14, mask),
        tl.load(pointer + 15, mask),
        tl.load(pointer + 16, mask),
        tl.load(pointer + 17, mask),
        tl.load(pointer + 18, mask),
    )


@triton.jit
def store_state(pointer, r, mask):
    for i in tl.static_range(COLUMNS):
        tl.store(pointer + i, r[i], mask)
