"""The passes over one row's columns ``[begin, end)``: fold, value, gradient.

A tile is ``[LANES, K]``: a lane's K columns are adjacent, K of them 16 bytes of the narrowest tensor,
so a thread reads whole lanes with vector loads and reduces over K in registers.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergences import FORWARD_KL, REVERSE_KL, terms
from .state import LN2, LOG2E, RowState, across_lanes, empty_lanes, exponent, fold, times

#: Logit maps: as given; times the gain; cap * tanh(gain * z), with the scale over the cap as gain.
IDENTITY, SCALE, SOFTCAP = (tl.constexpr(i) for i in range(3))


class Flags(NamedTuple):
    """What changes the code; every combination that is met is compiled once."""

    kind: int  # the divergence's code, 0 without a teacher
    variant: int  # of its formula
    labels: bool  # rows with the label -1 are skipped
    hard: bool  # the student's cross entropy
    smooth: bool  # with label smoothing
    teacher_hard: bool  # the teacher's own cross entropy
    tempered: bool  # a hard term needs normalisers of its own, at temperature 1
    student_map: int
    teacher_map: int
    grad: bool
    teacher_grad: bool
    sparse: bool  # ids of the row are left out of the state, and have gradients of their own
    aligned: bool  # rows begin at 16 bytes and end on whole lanes

    @property
    def closed(self) -> bool:
        return self.kind <= 2


class Numbers(NamedTuple):
    """The rest of a Spec, and what follows from it; fp32 in the kernel, where a relative rounding is
    harmless. The temperature is passed beside it in fp64, for the states of parts that are merged."""

    factor: float  # log2(e) / T
    first: float
    second: float
    sum: float  # of both, as exactly as they are
    soft: float  # soft_weight / T
    hard: float
    smoothing: float
    z_loss: float
    teacher_hard: float
    student_gain: float
    student_cap: float
    teacher_gain: float
    teacher_cap: float


@triton.jit
def row_pointer(F: tl.constexpr, pointer, stride, row):
    pointer += stride.to(tl.int64) * row
    if F.aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _tanh(x):
    """An odd polynomial near zero, where 1 - 2 / (e^2x + 1) would lose its digits."""
    y = x * x
    near = -5.70498872745e-3
    near = near * y + 2.06390887954e-2
    near = near * y - 5.37397155531e-2
    near = near * y + 1.33314422036e-1
    near = near * y - 3.33332819422e-1
    near = near * y * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def mapped(z, gain, cap, MAP: tl.constexpr):
    if MAP == SCALE:
        z = z * gain
    if MAP == SOFTCAP:
        z = cap * _tanh(z * gain)
    return z


@triton.jit
def _through_map(grad, z, gain, cap, MAP: tl.constexpr):
    """d raw from d mapped, with the mapped logits z."""
    if MAP == SCALE:
        grad = grad * gain
    if MAP == SOFTCAP:
        y = z / cap
        grad = grad * (1.0 - y * y) * (gain * cap)
    return grad


@triton.jit
def _columns(F: tl.constexpr, start, end, LANES: tl.constexpr, K: tl.constexpr):
    """First column of each lane, all columns, and which of them there are."""
    group = start + tl.arange(0, LANES) * K
    columns = group[:, None] + tl.arange(0, K)[None, :]
    if F.aligned:  # a whole lane is inside or not, which lets its load stay one vector
        inside = tl.broadcast_to((group < end)[:, None], LANES, K)
    else:
        inside = columns < end
    return group, columns, inside


@triton.jit
def _logits(pointer, columns, inside, gain, cap, MAP: tl.constexpr, POLICY: tl.constexpr):
    raw = tl.load(pointer + columns, mask=inside, other=-float("inf"), eviction_policy=POLICY)
    z = mapped(raw.to(tl.float32), gain, cap, MAP)
    if MAP != IDENTITY:
        z = tl.where(inside, z, -float("inf"))
    return z


@triton.jit
def _without(z, columns, ids, slot, slots, end):
    """``z`` with -inf at the columns in ``ids`` (ascending, -1 for none), and the first slot at or
    beyond ``end``."""
    at = tl.load(ids + slot, mask=slot < slots, other=end)
    while at < end:
        z = tl.where(columns == at, -float("inf"), z)
        slot += 1
        at = tl.load(ids + slot, mask=slot < slots, other=end)
    return z, slot


@triton.jit
def _with_kept(g, columns, ids, kept, slot, begin, weight):
    """``g`` with ``weight * kept`` at the columns in ``ids``, and the last slot before ``begin``."""
    at = tl.load(ids + slot, mask=slot >= 0, other=-2)
    while (at >= begin) | (at == -1):
        g = tl.where(columns == at, tl.load(kept + slot).to(tl.float32) * weight, g)
        slot -= 1
        at = tl.load(ids + slot, mask=slot >= 0, other=-2)
    return g, slot


@triton.jit
def _top_column(
    F: tl.constexpr,
    pointer,
    group,
    top,
    end,
    gain,
    cap,
    ids,
    slots,
    offset,
    MAP: tl.constexpr,
    K: tl.constexpr,
):
    """The first column of the group whose logit is ``top``, read again."""
    columns = group + tl.arange(0, K)
    raw = tl.load(pointer + columns, mask=columns < end, other=-float("inf"))
    z = mapped(raw.to(tl.float32), gain, cap, MAP)
    if F.sparse:
        z = _without(z, offset + columns, ids, slots * 0, slots, offset + group + K)[0]
    return tl.min(tl.where((z.to(tl.float64) == top) & (columns < end), columns, 2147483647), 0)


@triton.jit
def _label_logit(pointer, label, begin, end, gain, cap, MAP: tl.constexpr):
    """The label's logit where it is in [begin, end), else 0."""
    inside = (label >= begin) & (label < end)
    raw = tl.load(pointer + label, mask=inside, other=0.0)
    return tl.where(inside, mapped(raw.to(tl.float32), gain, cap, MAP), 0.0).to(tl.float64)


@triton.jit
def _sum_base(pointer, label, begin, end, gain, cap, MAP: tl.constexpr):
    """What label smoothing's sum of the logits is relative to, so that it keeps its digits where all of
    them are far from 0: the label's logit, to which the loss compares them, or one of these columns."""
    base = mapped(
        tl.load(pointer + tl.minimum(tl.maximum(label, begin), end - 1)).to(tl.float32), gain, cap, MAP
    )
    return tl.where(base - base == 0.0, base, 0.0)


@triton.jit
def fold_row(
    F: tl.constexpr,
    s_row,
    t_row,
    ids,
    slots,
    label,
    begin,
    end,
    offset,
    numbers,
    LANES: tl.constexpr,
    K: tl.constexpr,
):
    """First pass: the row's state from its columns [begin, end); each logit is read once.

    ``label`` counts from the tensor's first column, ``ids``, arg_s and arg_t from the vocabulary's
    (``offset``). Ids are ascending, so each costs one look at one tile.
    """
    lanes = empty_lanes(LANES)
    base = 0.0
    if F.smooth:
        base = _sum_base(s_row, label, begin, end, numbers.student_gain, numbers.student_cap, F.student_map)
    slot = slots * 0  # not a constant: the loop carries it
    for start in range(begin, end, LANES * K):
        group, columns, inside = _columns(F, start, end, LANES, K)
        s = _logits(s_row, columns, inside, numbers.student_gain, numbers.student_cap, F.student_map, "")
        t, given = s, s
        if F.kind:
            t = _logits(t_row, columns, inside, numbers.teacher_gain, numbers.teacher_cap, F.teacher_map, "")
        if F.sparse:
            s, slot = _without(s, offset + columns, ids, slot, slots, offset + start + LANES * K)
        lanes = fold(F, lanes, s, t, given, base, group, inside, numbers.factor)
    r = across_lanes(F, lanes, numbers.factor)
    arg_s = _top_column(
        F,
        s_row,
        r.arg_s,
        r.top_s,
        end,
        numbers.student_gain,
        numbers.student_cap,
        ids,
        slots,
        offset,
        F.student_map,
        K,
    )
    arg_t = arg_s
    if F.kind:
        arg_t = _top_column(
            F,
            t_row,
            r.arg_t,
            r.top_t,
            end,
            numbers.teacher_gain,
            numbers.teacher_cap,
            ids,
            slots,
            offset,
            F.teacher_map,
            K,
        )
    sum_s, label_s, label_t = r.sum_s, r.label_s, r.label_t
    if F.smooth:
        sum_s += tl.cast(base, tl.float64) * (end - begin)
    if F.hard:
        label_s = _label_logit(
            s_row, label, begin, end, numbers.student_gain, numbers.student_cap, F.student_map
        )
    if F.teacher_hard:
        label_t = _label_logit(
            t_row, label, begin, end, numbers.teacher_gain, numbers.teacher_cap, F.teacher_map
        )
    return RowState(
        r.m_s,
        r.z_s,
        r.m_t,
        r.z_t,
        r.x_s,
        r.x_t,
        r.e_s,
        r.e_t,
        r.z1_s,
        r.z1_t,
        sum_s,
        label_s,
        label_t,
        r.top_s,
        (offset + arg_s).to(tl.float64),
        r.top_t,
        (offset + arg_t).to(tl.float64),
        r.value,
        r.slope,
    )


class Normalizers(NamedTuple):
    """What turns logits into p, q and log(p / q), fp32. log z apart from the maximum, so that no digits
    of it are lost to the logits' common shift."""

    m_s: tl.tensor
    m_t: tl.tensor
    per_z_s: tl.tensor
    per_z_t: tl.tensor
    log_z_s: tl.tensor
    log_z_t: tl.tensor
    gap: tl.tensor  # log z_s - log z_t
    disagree: (
        tl.tensor
    )  # whether KL(p || q) is above 1/2: below, they have at least half their mass in common


@triton.jit
def normalizers(r):
    gap, log_z_s = tl.log(r.z_s / r.z_t), tl.log(r.z_s)
    return Normalizers(
        m_s=r.m_s.to(tl.float32),
        m_t=r.m_t.to(tl.float32),
        per_z_s=(1.0 / r.z_s).to(tl.float32),
        per_z_t=(1.0 / r.z_t).to(tl.float32),
        log_z_s=log_z_s.to(tl.float32),
        log_z_t=(log_z_s - gap).to(tl.float32),
        gap=gap.to(tl.float32),
        disagree=(r.x_t / r.z_t + gap) > 0.5,
    )


@triton.jit
def _distributions(s, t, n, factor):
    """p, q, log(p / q), log p, log q of a tile. Equal logits give equal bits: nothing here is fused
    (the kernels are compiled without contraction)."""
    u_s, u_t = exponent(s, n.m_s, factor), exponent(t, n.m_t, factor)
    q, p = tl.exp2(u_s) * n.per_z_s, tl.exp2(u_t) * n.per_z_t
    return p, q, (u_t - u_s) * LN2 + n.gap, u_t * LN2 - n.log_z_t, u_s * LN2 - n.log_z_s


@triton.jit
def value_row(F: tl.constexpr, r, s_row, t_row, begin, end, numbers, LANES: tl.constexpr, K: tl.constexpr):
    """Second pass, for divergences without a closed form: (value, slope) of the columns [begin, end).

    It runs backwards: what the first pass read last is what L2 still holds.
    """
    n = normalizers(r)
    value = tl.zeros([LANES, K], tl.float32)
    slope = tl.zeros([LANES, K], tl.float32)
    tiles = tl.cdiv(end - begin, LANES * K)
    for i in range(0, tiles):
        start = begin + (tiles - 1 - i) * (LANES * K)
        group, columns, inside = _columns(F, start, end, LANES, K)
        s = _logits(s_row, columns, inside, numbers.student_gain, numbers.student_cap, F.student_map, "")
        t = _logits(t_row, columns, inside, numbers.teacher_gain, numbers.teacher_cap, F.teacher_map, "")
        p, q, x, log_p, log_q = _distributions(s, t, n, numbers.factor)
        phi, q_psi = terms(F, p, q, x, log_p, log_q, numbers, n.disagree)
        value += phi
        slope += q_psi
    # NaN logits stay visible, whatever the formula does with them.
    visible = 0.0 * (r.z_s + r.z_t)
    value, slope = tl.sum(tl.sum(value, 1), 0), tl.sum(tl.sum(slope, 1), 0)
    return value.to(tl.float64) + visible, slope.to(tl.float64) + visible


@triton.jit
def divergence(F: tl.constexpr, r):
    gap = tl.log(r.z_t) - tl.log(r.z_s)
    if F.kind == FORWARD_KL:
        return r.x_t / r.z_t - gap
    elif F.kind == REVERSE_KL:
        return gap - r.x_s / r.z_s
    else:
        return r.value


class Emission(NamedTuple):
    """A row of ``kdkernels.backends.sparse_rows.Emission``; of no meaning where F is not sparse."""

    ids: tl.tensor
    slots: tl.tensor
    kept: tl.tensor
    rest: tl.tensor
    lse1: tl.tensor


@triton.jit
def gradient_row(
    F: tl.constexpr,
    r,
    s_row,
    t_row,
    grad_row,
    teacher_grad_row,
    emission,
    label,
    weight,
    begin,
    end,
    offset,
    vocab,
    numbers,
    LANES: tl.constexpr,
    K: tl.constexpr,
):
    """Last pass: weight * d(loss)/d(raw logits) of the columns [begin, end), from the finished state.

    It runs against the pass before it: backwards after the first, forwards after the second.
    """
    n = normalizers(r)
    slope = 0.0
    if F.kind == REVERSE_KL:
        slope = divergence(F, r).to(tl.float32)
    elif F.kind > REVERSE_KL:
        slope = r.slope.to(tl.float32)
    soft = (weight * numbers.soft).to(tl.float32)
    hard, teacher = weight * numbers.hard, weight * numbers.teacher_hard
    lse = r.m_s + tl.log(r.z1_s)
    m1_s, per_z1_s = n.m_s, 1.0 / r.z1_s  # exp(z - lse) = exp(z - m1) per_z1
    if F.sparse:  # whose state is the rest's: the ids may be far above its maximum
        lse = emission.lse1
        m1_s = lse.to(tl.float32)
        per_z1_s = tl.exp(m1_s.to(tl.float64) - lse)
        rest = tl.where(r.z_s == 0.0, 0.0, weight * emission.rest / r.z_s).to(tl.float32)
        slot = emission.slots - 1
    pull = hard * (1.0 + 2.0 * numbers.z_loss * lse) * per_z1_s
    spread = (hard * numbers.smoothing / vocab).to(tl.float32)
    onehot = (hard * (1.0 - numbers.smoothing)).to(tl.float32)
    teacher_pull, teacher_onehot = (teacher / r.z1_t).to(tl.float32), teacher.to(tl.float32)
    factor1 = numbers.factor  # without a temperature of its own the hard term shares its exponentials
    if F.tempered:
        factor1 = LOG2E
    tiles = tl.cdiv(end - begin, LANES * K)
    for i in range(0, tiles):
        start = begin + i * (LANES * K)
        if F.kind <= REVERSE_KL:
            start = begin + (tiles - 1 - i) * (LANES * K)
        group, columns, inside = _columns(F, start, end, LANES, K)
        s = _logits(
            s_row, columns, inside, numbers.student_gain, numbers.student_cap, F.student_map, "evict_first"
        )
        t = s
        if F.kind:
            t = _logits(
                t_row,
                columns,
                inside,
                numbers.teacher_gain,
                numbers.teacher_cap,
                F.teacher_map,
                "evict_first",
            )
        p, q, x, log_p, log_q = _distributions(s, t, n, numbers.factor)
        here = (label >= start) & (label < start + LANES * K)
        if F.grad:
            g = tl.zeros_like(s)
            if F.kind:
                phi, q_psi = terms(F, p, q, x, log_p, log_q, numbers, n.disagree)
                if F.kind != FORWARD_KL:
                    q_psi = q_psi - q * slope
                g = times(soft, q_psi)
            if F.sparse:
                g = tl.exp2(exponent(s, n.m_s, numbers.factor)) * rest
                g, slot = _with_kept(
                    g,
                    offset + columns,
                    emission.ids,
                    emission.kept,
                    slot,
                    offset + start,
                    weight.to(tl.float32),
                )
            if F.hard:
                g += tl.exp2(exponent(s, m1_s, factor1)) * pull.to(tl.float32)
                if F.smooth:
                    g -= spread
                if here:
                    g -= tl.where(columns == label, onehot, 0.0)
            g = _through_map(g, s, numbers.student_gain, numbers.student_cap, F.student_map)
            tl.store(grad_row + columns, g.to(grad_row.dtype.element_ty), mask=inside)
        if F.teacher_grad:
            h = tl.exp2(exponent(t, n.m_t, factor1)) * teacher_pull
            if here:
                h -= tl.where(columns == label, teacher_onehot, 0.0)
            h = _through_map(h, t, numbers.teacher_gain, numbers.teacher_cap, F.teacher_map)
            tl.store(teacher_grad_row + columns, h.to(teacher_grad_row.dtype.element_ty), mask=inside)


@triton.jit
def zero_row(F: tl.constexpr, grad_row, teacher_grad_row, begin, end, LANES: tl.constexpr, K: tl.constexpr):
    for start in range(begin, end, LANES * K):
        group, columns, inside = _columns(F, start, end, LANES, K)
        if F.grad:
            tl.store(grad_row + columns, tl.zeros([LANES, K], grad_row.dtype.element_ty), mask=inside)
        if F.teacher_grad:
            tl.store(
                teacher_grad_row + columns,
                tl.zeros([LANES, K], teacher_grad_row.dtype.element_ty),
                mask=inside,
            )
