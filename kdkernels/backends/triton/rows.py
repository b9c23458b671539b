"""The passes over one row's columns: fold, value, gradient.

A tile is ``[LANES, K]``: a lane's K columns are adjacent, K of them 16 bytes of the narrowest tensor,
so a thread reads whole lanes with vector loads and reduces over K in registers.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergences import FORWARD_KL, REVERSE_KL, SKEW_KL, terms
from .state import (
    LEAST,
    LN2,
    LOG2E,
    NO_COLUMN,
    Normaliser,
    RowState,
    SideState,
    across_lanes,
    empty_lanes,
    exponent,
    fold_pair,
    fold_side,
    lse,
    normaliser,
    times,
)

#: Logit maps: as given; times the gain; cap * tanh(gain * z), with the scale over the cap as gain.
IDENTITY, SCALE, SOFTCAP = (tl.constexpr(i) for i in range(3))


class Flags(NamedTuple):
    """What changes the code; every combination that is met is compiled once."""

    kind: int  # of the divergence where it is asked for, else 0
    needs_cross_s: bool  # the first pass sums cross_s
    needs_cross_t: bool
    label: bool  # the output is asked for, as the next three are
    smooth: bool
    lse_squared: bool
    teacher_label: bool
    hard: bool  # one of the student's outputs at temperature 1
    entropy: bool  # the output is asked for
    shifts: bool  # the state holds sum_exp_shift
    stats: bool  # entropies and agreement
    teacher: bool  # there is one
    labels: bool  # rows with the label -1 take no part
    tempered: bool  # a temperature is not 1
    student_map: int
    teacher_map: int
    grad: bool
    teacher_grad: bool
    sparse: bool  # stored ids are left out of the student's state, and have gradients of their own
    aligned: bool  # rows begin at 16 bytes and end on whole lanes


class LogitMap(NamedTuple):
    gain: float
    cap: float


class LogitMaps(NamedTuple):
    """Run-time numbers in fp32, where a relative rounding is harmless."""

    student: LogitMap
    teacher: LogitMap


class Matrix(NamedTuple):
    """Rows with adjacent columns. A kernel makes it of two parameters: Triton would compile a tuple that is a
    parameter anew for other strides and addresses."""

    pointer: tl.tensor
    stride: tl.tensor


class Side(NamedTuple):
    """One model's row of raw logits, and its map."""

    row: tl.tensor
    map: LogitMap


class Row(NamedTuple):
    """What the passes read."""

    student: Side
    teacher: Side
    label: tl.tensor  # from the tensors' first column; negative or beyond the last where it is not here
    temperature: tl.tensor  # fp64
    factor: tl.tensor  # log2(e) / T
    parameters: tl.tensor  # of the divergence, see load_parameters


class Span(NamedTuple):
    """Columns [begin, end) of tensors that begin at ``offset`` in a vocabulary of ``vocab``."""

    begin: tl.tensor
    end: tl.tensor
    offset: tl.tensor
    vocab: tl.tensor


class Stored(NamedTuple):
    """A row of a sparse target and of its ``SparseGradient``; of no meaning where F is not sparse."""

    ids: tl.tensor  # ascending, -1 for none
    slots: tl.tensor
    gradient: tl.tensor  # this and what follows for the last pass only
    rest: tl.tensor
    at_1: Normaliser
    softmax: "Softmax"


class Softmax(NamedTuple):
    """A row's at T, fp64: q = exp((z - reference) / T - log_sum_exp), and the mean of (z - reference) / T under q."""

    reference: tl.tensor
    log_sum_exp: tl.tensor
    mean_shift: tl.tensor


class GradRows(NamedTuple):
    """Where the gradients of a row are written."""

    student: tl.tensor
    teacher: tl.tensor


class Weights(NamedTuple):
    """A row's weights, fp64; 0 where the output is not asked for."""

    soft: tl.tensor
    label: tl.tensor
    smooth: tl.tensor
    lse_squared: tl.tensor
    entropy: tl.tensor
    teacher_label: tl.tensor


@triton.jit
def row_pointer(F: tl.constexpr, matrix, row):
    pointer = matrix.pointer + matrix.stride.to(tl.int64) * row
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
def mapped(z, m, MAP: tl.constexpr):
    if MAP == SCALE:
        z = z * m.gain
    if MAP == SOFTCAP:
        z = m.cap * _tanh(z * m.gain)
    return z


@triton.jit
def _through_map(grad, z, m, MAP: tl.constexpr):
    """d raw from d mapped, with the mapped logits z."""
    if MAP == SCALE:
        grad = grad * m.gain
    if MAP == SOFTCAP:
        y = z / m.cap
        grad = grad * (1.0 - y * y) * (m.gain * m.cap)
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
def _logits(side, columns, inside, MAP: tl.constexpr, POLICY: tl.constexpr):
    """Mapped logits in fp32. Columns beyond the row are -inf: they must not enter a sum or a maximum."""
    raw = tl.load(side.row + columns, mask=inside, other=-float("inf"), eviction_policy=POLICY)
    z = mapped(raw.to(tl.float32), side.map, MAP)
    if MAP != IDENTITY:
        z = tl.where(inside, z, -float("inf"))
    return z


@triton.jit
def _without_stored(z, columns, at, slot, end):
    """``z`` with -inf at the columns that are stored, and the first slot at or beyond ``end``."""
    stored = tl.load(at.ids + slot, mask=slot < at.slots, other=end)
    while stored < end:
        z = tl.where(columns == stored, -float("inf"), z)
        slot += 1
        stored = tl.load(at.ids + slot, mask=slot < at.slots, other=end)
    return z, slot


@triton.jit
def _with_stored(g, columns, at, slot, begin, weight):
    """``g`` with ``weight`` times the stored gradient at the stored columns, and the last slot before ``begin``."""
    stored = tl.load(at.ids + slot, mask=slot >= 0, other=-2)
    while (stored >= begin) | (stored == -1):
        mine = times(weight, tl.load(at.gradient + slot).to(tl.float32))
        g = tl.where(columns == stored, mine, g)
        slot -= 1
        stored = tl.load(at.ids + slot, mask=slot >= 0, other=-2)
    return g, slot


@triton.jit
def _top_column(side, state, stored, span, SPARSE: tl.constexpr, MAP: tl.constexpr, K: tl.constexpr):
    """The first column of the state's group whose logit is the highest, read again."""
    columns = state.top_index + tl.arange(0, K)
    raw = tl.load(side.row + columns, mask=columns < span.end, other=-float("inf"))
    z = mapped(raw.to(tl.float32), side.map, MAP)
    if SPARSE:
        end = span.offset + state.top_index + K
        z = _without_stored(z, span.offset + columns, stored, stored.slots * 0, end)[0]
    found = (z.to(tl.float64) == state.top_logit) & (columns < span.end)
    return (span.offset + tl.min(tl.where(found, columns, NO_COLUMN), 0)).to(tl.float64)


@triton.jit
def _label_logit(side, label, span, MAP: tl.constexpr):
    """The label's logit where it is one of these columns, else 0."""
    inside = (label >= span.begin) & (label < span.end)
    raw = tl.load(side.row + label, mask=inside, other=0.0)
    return tl.where(inside, mapped(raw.to(tl.float32), side.map, MAP), 0.0).to(tl.float64)


@triton.jit
def _sum_base(side, label, span, MAP: tl.constexpr):
    """What label smoothing's sum of the logits is relative to, so that it keeps its digits where all of
    them are far from 0: the label's logit, to which the loss compares them, or one of these columns."""
    column = tl.minimum(tl.maximum(label, span.begin), span.end - 1)
    base = mapped(tl.load(side.row + column).to(tl.float32), side.map, MAP)
    return tl.where(base - base == 0.0, base, 0.0)


@triton.jit
def _completed(side, sum_logits, label_logit, top_index):
    return SideState(
        reference=side.reference,
        sum_exp=side.sum_exp,
        sum_exp_shift=side.sum_exp_shift,
        sum_exp_t1=side.sum_exp_t1,
        sum_logits=sum_logits,
        label_logit=label_logit,
        top_logit=side.top_logit,
        top_index=top_index,
    )


@triton.jit
def _completed_student(F: tl.constexpr, side, row, stored, span, sum_logits, K: tl.constexpr):
    """The student's state with what is read again: the label's logit, and which column the highest one is."""
    label_logit, top_index = side.label_logit, side.label_logit
    if F.label:
        label_logit = _label_logit(row.student, row.label, span, F.student_map)
    if F.stats:
        top_index = _top_column(row.student, side, stored, span, F.sparse, F.student_map, K)
    return _completed(side, sum_logits, label_logit, top_index)


@triton.jit
def _completed_teacher(F: tl.constexpr, side, row, stored, span, K: tl.constexpr):
    label_logit, top_index = side.label_logit, side.label_logit
    if F.teacher_label:
        label_logit = _label_logit(row.teacher, row.label, span, F.teacher_map)
    if F.stats and F.teacher:
        top_index = _top_column(row.teacher, side, stored, span, False, F.teacher_map, K)
    return _completed(side, side.sum_logits, label_logit, top_index)


@triton.jit
def _folded_tile(F: tl.constexpr, lanes, s, t, group, factor):
    student = fold_side(F, lanes.student, s, group, factor, F.hard)
    teacher, pair = lanes.teacher, lanes.pair
    if F.teacher:
        folded = fold_side(F, lanes.teacher, t, group, factor, F.teacher_label)
        teacher, pair = folded.state, fold_pair(F, pair, student, folded)
    return RowState(student.state, teacher, pair)


@triton.jit
def fold_row(F: tl.constexpr, row, stored, span, LANES: tl.constexpr, K: tl.constexpr):
    """First pass: the row's state from the span's columns; each logit is read once.

    The stored ids count from the vocabulary's first column, as top_index does. They are ascending, so
    each costs one look at one tile. They stay out of the student's sums, but not of sum_logits.
    """
    lanes = empty_lanes(LANES)
    base = 0.0
    sum_logits = lanes.student.sum_logits
    if F.smooth:
        base = _sum_base(row.student, row.label, span, F.student_map)
    slot = stored.slots * 0  # not a constant: the loop carries it
    for start in range(span.begin, span.end, LANES * K):
        group, columns, inside = _columns(F, start, span.end, LANES, K)
        s = _logits(row.student, columns, inside, F.student_map, "")
        t = s
        if F.teacher:
            t = _logits(row.teacher, columns, inside, F.teacher_map, "")
        if F.smooth:
            sum_logits += tl.sum(tl.where(inside, s - base, 0.0), 1)
        if F.sparse:
            end = span.offset + start + LANES * K
            s, slot = _without_stored(s, span.offset + columns, stored, slot, end)
        lanes = _folded_tile(F, lanes, s, t, group, row.factor)
    r = across_lanes(F, lanes, row.factor)
    total = r.student.sum_logits
    if F.smooth:
        count = span.end - span.begin
        total = tl.sum(sum_logits, 0).to(tl.float64) + tl.cast(base, tl.float64) * count
    student = _completed_student(F, r.student, row, stored, span, total, K)
    return RowState(student, _completed_teacher(F, r.teacher, row, stored, span, K), r.pair)


class Normalisers(NamedTuple):
    """What turns logits into p, q and log(p / q), fp32. log z apart from the reference, so that no digits
    of it are lost to the logits' common shift."""

    reference_s: tl.tensor
    reference_t: tl.tensor
    per_sum_s: tl.tensor
    per_sum_t: tl.tensor
    log_sum_s: tl.tensor
    log_sum_t: tl.tensor
    gap: tl.tensor  # log_sum_s - log_sum_t
    disagree: tl.tensor  # KL(p || q) is above 1/2: below, at least half their mass is in common


@triton.jit
def normalisers(F: tl.constexpr, r):
    s, t = r.student, r.teacher
    gap, log_sum_s = tl.log(s.sum_exp / t.sum_exp), tl.log(s.sum_exp)
    disagree = False
    if F.kind == SKEW_KL:
        disagree = (r.pair.cross_t / t.sum_exp + gap) > 0.5
    return Normalisers(
        reference_s=s.reference.to(tl.float32),
        reference_t=t.reference.to(tl.float32),
        per_sum_s=(1.0 / s.sum_exp).to(tl.float32),
        per_sum_t=(1.0 / t.sum_exp).to(tl.float32),
        log_sum_s=log_sum_s.to(tl.float32),
        log_sum_t=(log_sum_s - gap).to(tl.float32),
        gap=gap.to(tl.float32),
        disagree=disagree,
    )


@triton.jit
def _distributions(s, t, n, factor):
    """p, q, log(p / q), log p, log q of a tile. Equal logits give equal bits: nothing here is fused
    (the kernels are compiled without contraction)."""
    u_s, u_t = exponent(s, n.reference_s, factor), exponent(t, n.reference_t, factor)
    q, p = tl.exp2(u_s) * n.per_sum_s, tl.exp2(u_t) * n.per_sum_t
    return p, q, (u_t - u_s) * LN2 + n.gap, u_t * LN2 - n.log_sum_t, u_s * LN2 - n.log_sum_s


@triton.jit
def _terms_of_tile(F: tl.constexpr, row, n, s, t):
    p, q, x, log_p, log_q = _distributions(s, t, n, row.factor)
    phi, q_psi = terms(F, p, q, x, log_p, log_q, row.parameters, n.disagree)
    return phi, q_psi, q


@triton.jit
def value_row(F: tl.constexpr, r, row, span, LANES: tl.constexpr, K: tl.constexpr):
    """Second pass, for divergences without a closed form: (value, sum_q_psi) of the span's columns.

    It runs backwards: what the first pass read last is still near.
    """
    n = normalisers(F, r)
    value, sum_q_psi = tl.zeros([LANES, K], tl.float32), tl.zeros([LANES, K], tl.float32)
    tiles = tl.cdiv(span.end - span.begin, LANES * K)
    for i in range(0, tiles):
        start = span.begin + (tiles - 1 - i) * (LANES * K)
        group, columns, inside = _columns(F, start, span.end, LANES, K)
        s = _logits(row.student, columns, inside, F.student_map, "")
        t = _logits(row.teacher, columns, inside, F.teacher_map, "")
        phi, q_psi, q = _terms_of_tile(F, row, n, s, t)
        value += phi
        sum_q_psi += q_psi
    # 0, but NaN for rows with NaN logits (their sums are NaN), or nothing but -inf (a sum is 0).
    visible = 0.0 / (r.student.sum_exp * r.teacher.sum_exp)
    value, sum_q_psi = tl.sum(tl.sum(value, 1), 0), tl.sum(tl.sum(sum_q_psi, 1), 0)
    return value.to(tl.float64) + visible, sum_q_psi.to(tl.float64) + visible


@triton.jit
def divergence(F: tl.constexpr, r):
    gap = tl.log(r.teacher.sum_exp) - tl.log(r.student.sum_exp)
    if F.kind == FORWARD_KL:
        return r.pair.cross_t / r.teacher.sum_exp - gap
    elif F.kind == REVERSE_KL:
        return gap - r.pair.cross_s / r.student.sum_exp
    else:
        return r.pair.value


class Hard(NamedTuple):
    """What the outputs at temperature 1 give a column: pull * exp(z - reference) - spread, and -onehot at the label."""

    reference: tl.tensor
    factor: tl.tensor
    pull: tl.tensor
    spread: tl.tensor
    onehot: tl.tensor


class Soft(NamedTuple):
    """weight * (q_psi - q * slope); with a sparse target the rest's exponentials times ``rest``, and ``weight``
    times what is stored."""

    weight: tl.tensor
    slope: tl.tensor
    rest: tl.tensor


@triton.jit
def _soft(F: tl.constexpr, r, weight, temperature, rest):
    slope = 0.0
    if F.kind == REVERSE_KL:
        slope = divergence(F, r).to(tl.float32)
    elif F.kind > REVERSE_KL:
        slope = r.pair.sum_q_psi.to(tl.float32)
    if F.sparse:
        sum_exp = r.student.sum_exp
        rest = tl.where(sum_exp == 0.0, 0.0, times(weight, rest) / sum_exp).to(tl.float32)
        return Soft(weight.to(tl.float32), slope, rest)
    else:
        return Soft((weight / temperature).to(tl.float32), slope, 0.0)


@triton.jit
def _factor_t1(F: tl.constexpr, factor):
    """Where every temperature is 1, the hard term shares the soft one's exponentials."""
    if F.tempered:
        factor = LOG2E
    return factor


@triton.jit
def _student_hard(F: tl.constexpr, r, w, vocab, factor, whole_at_1):
    at_1, per_sum = normaliser(r.student), 1.0 / r.student.sum_exp_t1
    if F.sparse:  # whose state is the rest's: the stored ids may be far above its reference
        at_1, per_sum = whole_at_1, tl.exp(-whole_at_1.log_sum_exp)
    pull = w.label + w.smooth + times(w.lse_squared, 2.0 * lse(at_1))
    return Hard(
        reference=at_1.reference.to(tl.float32),
        factor=_factor_t1(F, factor),
        pull=times(pull, per_sum).to(tl.float32),
        spread=(w.smooth / vocab).to(tl.float32),
        onehot=w.label.to(tl.float32),
    )


@triton.jit
def _teacher_hard(F: tl.constexpr, r, w, factor):
    return Hard(
        reference=r.teacher.reference.to(tl.float32),
        factor=_factor_t1(F, factor),
        pull=times(w.teacher_label, 1.0 / r.teacher.sum_exp_t1).to(tl.float32),
        spread=0.0,
        onehot=w.teacher_label.to(tl.float32),
    )


@triton.jit
def _hard_gradient(h, z, columns, label, here, SMOOTH: tl.constexpr):
    g = times(h.pull, tl.exp2(exponent(z, h.reference, h.factor)))
    if SMOOTH:
        g -= h.spread
    if here:
        g -= tl.where(columns == label, h.onehot, 0.0)
    return g


class Entropy(NamedTuple):
    """What the entropy's gradient gives a column: exp(z - reference) at T times (mean - shift * slope)."""

    reference: tl.tensor
    mean: tl.tensor
    slope: tl.tensor


@triton.jit
def _entropy(F: tl.constexpr, r, weight, temperature, softmax):
    if not F.sparse:  # whose state is the rest's
        s = r.student
        softmax = Softmax(s.reference, tl.log(s.sum_exp), s.sum_exp_shift / s.sum_exp)
    weight = times(weight, tl.exp(-softmax.log_sum_exp) / temperature)
    return Entropy(
        reference=softmax.reference.to(tl.float32),
        mean=times(weight, softmax.mean_shift).to(tl.float32),
        slope=(weight * LN2).to(tl.float32),  # shifts are in base 2
    )


@triton.jit
def _entropy_gradient(e, z, factor):
    shift = exponent(z, e.reference, factor)
    return tl.exp2(shift) * (e.mean - tl.maximum(shift, LEAST) * e.slope)


@triton.jit
def write_gradient(
    F: tl.constexpr, r, row, weights, stored, span, grads, LANES: tl.constexpr, K: tl.constexpr
):
    """Last pass: weights * d(outputs)/d(raw logits) of the span's columns, from the finished state.

    It runs against the pass before it: backwards after the first, forwards after the second.
    """
    n = normalisers(F, r)
    soft = _soft(F, r, weights.soft, row.temperature, stored.rest)
    student, teacher = Hard(0.0, 0.0, 0.0, 0.0, 0.0), Hard(0.0, 0.0, 0.0, 0.0, 0.0)
    if F.hard:
        student = _student_hard(F, r, weights, span.vocab, row.factor, stored.at_1)
    if F.teacher_grad:
        teacher = _teacher_hard(F, r, weights, row.factor)
    entropy = Entropy(0.0, 0.0, 0.0)
    if F.entropy:
        entropy = _entropy(F, r, weights.entropy, row.temperature, stored.softmax)
    slot = stored.slots - 1
    tiles = tl.cdiv(span.end - span.begin, LANES * K)
    for i in range(0, tiles):
        start = span.begin + i * (LANES * K)
        if F.kind <= REVERSE_KL:
            start = span.begin + (tiles - 1 - i) * (LANES * K)
        group, columns, inside = _columns(F, start, span.end, LANES, K)
        here = (row.label >= start) & (row.label < start + LANES * K)
        s = _logits(row.student, columns, inside, F.student_map, "evict_first")
        t = s
        if F.kind or F.teacher_grad:
            t = _logits(row.teacher, columns, inside, F.teacher_map, "evict_first")
        if F.grad:
            g = tl.zeros_like(s)
            if F.kind:
                phi, q_psi, q = _terms_of_tile(F, row, n, s, t)
                if F.kind != FORWARD_KL:
                    q_psi = q_psi - q * soft.slope
                g = times(soft.weight, q_psi)
            if F.sparse:
                g = tl.exp2(exponent(s, n.reference_s, row.factor)) * soft.rest
                at, begin = span.offset + columns, span.offset + start
                g, slot = _with_stored(g, at, stored, slot, begin, soft.weight)
            if F.hard:
                g += _hard_gradient(student, s, columns, row.label, here, F.smooth)
            if F.entropy:
                g += _entropy_gradient(entropy, s, row.factor)
            g = _through_map(g, s, row.student.map, F.student_map)
            tl.store(grads.student + columns, g.to(grads.student.dtype.element_ty), mask=inside)
        if F.teacher_grad:
            h = _hard_gradient(teacher, t, columns, row.label, here, False)
            h = _through_map(h, t, row.teacher.map, F.teacher_map)
            tl.store(grads.teacher + columns, h.to(grads.teacher.dtype.element_ty), mask=inside)


@triton.jit
def _write_zeros(pointer, columns, inside, LANES: tl.constexpr, K: tl.constexpr):
    tl.store(pointer + columns, tl.zeros([LANES, K], pointer.dtype.element_ty), mask=inside)


@triton.jit
def write_zeros(F: tl.constexpr, span, grads, LANES: tl.constexpr, K: tl.constexpr):
    """For a row whose weights are all 0, or that takes no part."""
    for start in range(span.begin, span.end, LANES * K):
        group, columns, inside = _columns(F, start, span.end, LANES, K)
        if F.grad:
            _write_zeros(grads.student, columns, inside, LANES, K)
        if F.teacher_grad:
            _write_zeros(grads.teacher, columns, inside, LANES, K)
