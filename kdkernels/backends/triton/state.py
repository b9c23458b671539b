"""The online state of a row in Triton: folded over lanes, merged across lanes, parts and chunks.

``RowState`` has the fields of ``kdkernels/backends/row_state.py`` in the same order and takes two
forms:

* lanes: fp32 vectors, one entry a lane. Every lane keeps maxima and sums of its own, so the loop over
  the vocabulary needs no exchange between threads. Exponents are in base 2: m is the reference of the
  exponentials, log2(e) / T times the lane's maximum ``top``, and x and e are in the same unit.
* rows: fp64, one entry a row, in nats: what the state tensor holds. fp32 is enough inside a row,
  where a lane adds a few hundred terms and lanes are summed as a tree; what is done once per row is
  fp64, which keeps the digits of log z and of the merge, and costs next to nothing.

A reference need not be the exact maximum; it only has to be the same number wherever it is used.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: The reference of nothing: finite, so that the difference of two is 0 and not NaN.
LOWEST = tl.constexpr(-1e37)
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
def exponent(z, factor, reference):
    """factor * z - reference in one rounding: the argument of exp2."""
    return tl.fma(z, factor, -reference)


@triton.jit
def empty_lanes(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    lowest = tl.full([LANES], LOWEST, tl.float32)
    nothing = tl.full([LANES], -float("inf"), tl.float32)
    first = tl.zeros([LANES], tl.int32)
    return RowState(lowest, zero, lowest, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero,
                    nothing, first, nothing, first, zero, zero)  # fmt: skip


@triton.jit
def faded(total, decay):
    """What decays to nothing is 0, an infinity too: there p (or q) is 0."""
    return tl.where(decay == 0.0, 0.0, total * decay)


@triton.jit
def raised(r, m_s, m_t, decay_s, decay_t, decay1_s, decay1_t):
    """The sums relative to the higher references m_s and m_t; a decay is exp(old - new)."""
    up_s, up_t = m_s - r.m_s, m_t - r.m_t
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
        r.sum_s, r.label_s, r.label_t, r.top_s, r.arg_s, r.top_t, r.arg_t, r.value, r.slope,
    )  # fmt: skip


@triton.jit
def _lifted(F: tl.constexpr, r, top_s, top_t, m_s, m_t):
    """Lanes raised to the references of the maxima top_s and top_t."""
    decay_s, decay_t = tl.exp2(r.m_s - m_s), tl.exp2(r.m_t - m_t)
    decay1_s, decay1_t = decay_s, decay_t
    if F.tempered:
        decay1_s = tl.exp2(reference(r.top_s, LOG2E) - reference(top_s, LOG2E))
        decay1_t = tl.exp2(reference(r.top_t, LOG2E) - reference(top_t, LOG2E))
    return raised(r, m_s, m_t, decay_s, decay_t, decay1_s, decay1_t)


@triton.jit
def reference(top, factor):
    return tl.maximum(top * factor, LOWEST)


@triton.jit
def fold(F: tl.constexpr, r, s, t, group, inside, factor):
    """Lanes ``r`` with one more tile of logits ``[LANES, K]``, whose first columns are ``group``.

    Two exponentials a column, and two a lane to raise its sums: an eighth more with K = 8.
    """
    top_s = tl.maximum(r.top_s, tl.max(s, 1))
    arg_s = tl.where(top_s > r.top_s, group, r.arg_s)
    m_s = reference(top_s, factor)
    u_s = exponent(s, factor, m_s[:, None])
    e_s = tl.exp2(u_s)
    top_t, arg_t, m_t = r.top_t, r.arg_t, r.m_t
    if F.kind:
        top_t = tl.maximum(r.top_t, tl.max(t, 1))
        arg_t = tl.where(top_t > r.top_t, group, r.arg_t)
        m_t = reference(top_t, factor)
    a = _lifted(F, r, top_s, top_t, m_s, m_t)
    x_s, x_t, z_t, e_of_t, z1_s, z1_t, sum_s = a.x_s, a.x_t, a.z_t, a.e_t, a.z1_s, a.z1_t, a.sum_s
    if F.kind:
        u_t = exponent(t, factor, m_t[:, None])
        e_t = tl.exp2(u_t)
        z_t += tl.sum(e_t, 1)
        e_of_t += tl.sum(e_t * tl.maximum(u_t, LEAST), 1)
        if F.kind == 1:
            x_t += tl.sum(times(e_t, u_t - u_s), 1)
        if F.kind == 2:
            x_s += tl.sum(times(e_s, u_t - u_s), 1)
    if F.tempered:
        if F.hard:
            z1_s += tl.sum(tl.exp2(exponent(s, LOG2E, reference(top_s, LOG2E)[:, None])), 1)
        if F.teacher_hard:
            z1_t += tl.sum(tl.exp2(exponent(t, LOG2E, reference(top_t, LOG2E)[:, None])), 1)
    if F.smooth:
        sum_s += tl.sum(tl.where(inside, s, 0.0), 1)
    return RowState(
        m_s, a.z_s + tl.sum(e_s, 1), m_t, z_t, x_s, x_t,
        a.e_s + tl.sum(e_s * tl.maximum(u_s, LEAST), 1), e_of_t, z1_s, z1_t, sum_s, a.label_s, a.label_t,
        top_s, arg_s, top_t, arg_t, a.value, a.slope,
    )  # fmt: skip


@triton.jit
def _first(top, best, group):
    return tl.min(tl.where(top == best, group, 2147483647), 0)


@triton.jit
def across_lanes(F: tl.constexpr, r, factor, temperature):
    """Lanes -> row, except the labels' logits; arg_s and arg_t are the first columns of the lanes' groups."""
    top_s, top_t = tl.max(r.top_s, 0), tl.max(r.top_t, 0)
    arg_s, arg_t = _first(r.top_s, top_s, r.arg_s), _first(r.top_t, top_t, r.arg_t)
    m_s, m_t = reference(top_s, factor), reference(top_t, factor)
    a = _lifted(F, r, top_s, top_t, m_s, m_t)
    z_s, z_t = tl.sum(a.z_s, 0), tl.sum(a.z_t, 0)
    z1_s, z1_t = z_s, z_t
    wide_s, wide_t = m_s.to(tl.float64), m_t.to(tl.float64)
    if F.tempered:
        # The state's reference at temperature 1 is m * T, which the tiles' only nearly is.
        z1_s = tl.sum(a.z1_s, 0) * tl.exp2((reference(top_s, LOG2E) - wide_s * temperature).to(tl.float32))
        z1_t = tl.sum(a.z1_t, 0) * tl.exp2((reference(top_t, LOG2E) - wide_t * temperature).to(tl.float32))
    zero = tl.zeros_like(wide_s)
    return RowState(
        wide_s * LN2, z_s.to(tl.float64), wide_t * LN2, z_t.to(tl.float64),
        tl.sum(a.x_s, 0) * LN2 + zero, tl.sum(a.x_t, 0) * LN2 + zero,
        tl.sum(a.e_s, 0) * LN2 + zero, tl.sum(a.e_t, 0) * LN2 + zero,
        z1_s.to(tl.float64), z1_t.to(tl.float64), tl.sum(a.sum_s, 0).to(tl.float64), zero, zero,
        top_s.to(tl.float64), arg_s, top_t.to(tl.float64), arg_t, zero, zero,
    )  # fmt: skip


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
    down_s, down_t = r.m_s - m_s, r.m_t - m_t
    return raised(r, m_s, m_t, tl.exp(down_s), tl.exp(down_t), tl.exp(down_s * temperature),
                  tl.exp(down_t * temperature))  # fmt: skip


@triton.jit
def load_state(pointer, mask):
    """The state at ``pointer``, one address or a vector of them."""
    return RowState(
        tl.load(pointer, mask), tl.load(pointer + 1, mask), tl.load(pointer + 2, mask),
        tl.load(pointer + 3, mask), tl.load(pointer + 4, mask), tl.load(pointer + 5, mask),
        tl.load(pointer + 6, mask), tl.load(pointer + 7, mask), tl.load(pointer + 8, mask),
        tl.load(pointer + 9, mask), tl.load(pointer + 10, mask), tl.load(pointer + 11, mask),
        tl.load(pointer + 12, mask), tl.load(pointer + 13, mask), tl.load(pointer + 14, mask),
        tl.load(pointer + 15, mask), tl.load(pointer + 16, mask), tl.load(pointer + 17, mask),
        tl.load(pointer + 18, mask),
    )  # fmt: skip


@triton.jit
def store_state(pointer, r, mask):
    for i in tl.static_range(COLUMNS):
        tl.store(pointer + i, r[i], mask)
