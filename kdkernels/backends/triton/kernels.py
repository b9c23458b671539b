"""The kernels. All of them read a row's logits in fp32, whatever their dtype, and never use atomics,
so that the same inputs give the same bits.

============ ==================== ==========================================================
kernel       a program            does
============ ==================== ==========================================================
fused        rows, one by one     results and gradients of whole rows
fold         (row, part)          the state of one part of a row's columns
merge        a vector of rows     the parts' states into the rows' states, in order
value        (row, part)          second pass of one part: value and slope
merge_value  a vector of rows     the parts' values and slopes into the rows' states, in order
finish       a vector of rows     results from finished states
gradient     (row, part)          the gradient of one part from the finished state
scale        tiles, one by one    a finished gradient times a number that only the GPU knows
============ ==================== ==========================================================
"""

import triton
import triton.language as tl

from .divergences import REVERSE_KL
from .rows import Emission, divergence, fold_row, gradient_row, row_pointer, value_row, zero_row
from .state import COLUMNS, VALUE, RowState, load_state, merged, store_state, times

RESULTS = tl.constexpr(6)


@triton.jit
def _results(F: tl.constexpr, r, vocab, numbers):
    """soft, hard, student entropy, teacher entropy, agreement, teacher's hard term."""
    zero = r.z_s * 0.0
    soft, hard, teacher_entropy, agreement, teacher_hard = zero, zero, zero, zero, zero
    if F.kind:
        soft = divergence(F, r)
        teacher_entropy = tl.log(r.z_t) - r.e_t / r.z_t
        agreement = tl.where(r.arg_s == r.arg_t, 1.0, zero)
    if F.hard:
        # The maximum's distance to the label first: both may be far from 0, where a sum has no digits left.
        lse, hard = r.m_s + tl.log(r.z1_s), (r.m_s - r.label_s) + tl.log(r.z1_s)
        if F.smooth:
            hard = times(1.0 - numbers.smoothing, hard) + numbers.smoothing * (lse - r.sum_s / vocab)
        hard += numbers.z_loss * lse * lse
    if F.teacher_hard:
        teacher_hard = (r.m_t - r.label_t) + tl.log(r.z1_t)
    return soft, hard, tl.log(r.z_s) - r.e_s / r.z_s, teacher_entropy, agreement, teacher_hard


@triton.jit
def _label(F: tl.constexpr, labels, row, offset):
    """The label's column in the tile, and whether the row is live."""
    label, live = -1, True
    if F.labels:
        given = tl.load(labels + row)
        label, live = (given - offset).to(tl.int32), given >= 0
    return label, live


@triton.jit
def _weight(weights, row, live):
    return tl.where(live, tl.load(weights + row).to(tl.float64), 0.0)


@triton.jit
def _rows(
    F: tl.constexpr,
    student,
    student_stride,
    teacher,
    teacher_stride,
    grad,
    grad_stride,
    teacher_grad,
    teacher_grad_stride,
    row,
):
    """The row in each matrix; one that F says is not there has the student's pointer, which nobody uses."""
    s_row = row_pointer(F, student, student_stride, row)
    t_row, g_row, h_row = s_row, s_row, s_row
    if F.kind:
        t_row = row_pointer(F, teacher, teacher_stride, row)
    if F.grad:
        g_row = row_pointer(F, grad, grad_stride, row)
    if F.teacher_grad:
        h_row = row_pointer(F, teacher_grad, teacher_grad_stride, row)
    return s_row, t_row, g_row, h_row


@triton.jit
def _store_results(pointer, results, mask):
    for i in tl.static_range(RESULTS):
        tl.store(pointer + i, results[i], mask)


_SIZES = [
    "student_stride",
    "teacher_stride",
    "grad_stride",
    "teacher_grad_stride",
    "rows",
    "columns",
    "part",
    "parts",
    "offset",
    "vocab",
    "count",
    "slots",
    "kept_stride",
]
_POINTERS = [
    "student",
    "teacher",
    "labels",
    "weights",
    "grad",
    "teacher_grad",
    "state",
    "partial",
    "results",
    "values",
    "factor",
    "ids",
    "kept",
    "rest",
    "lse1",
]


def _kernel(function):
    """jit, with nothing specialised but what Flags says: no new code for another size or address."""
    return triton.jit(
        function,
        do_not_specialize=[p for p in _SIZES if p in function.__code__.co_varnames],
        do_not_specialize_on_alignment=[p for p in _POINTERS if p in function.__code__.co_varnames],
    )


@_kernel
def fused(
    student,
    student_stride,
    teacher,
    teacher_stride,
    labels,
    weights,
    grad,
    grad_stride,
    teacher_grad,
    teacher_grad_stride,
    results,
    rows,
    columns,
    numbers,
    F: tl.constexpr,
    LANES: tl.constexpr,
    K: tl.constexpr,
):
    """Whole rows: results ``[rows, 6]`` and, where F says so, weights * d(loss)/d(logits).

    Geometry: as many programs as the chip holds at a time, each going from row to row, so that the
    rows in flight are few and the later passes find them in L2.

    Traffic by design: the first pass reads s and t from memory, the later ones from L2 as far as the
    rows in flight fit there, and from its near end otherwise: each pass runs against the one before.
    The gradient is written once. KL family: two reads, one write. Others: a third read.

    Aliasing: ``grad`` may be ``student`` and ``teacher_grad`` may be ``teacher``, of the same dtype and
    strides; a gradient of another dtype is memory of its own. Another row is another program's or
    another turn's and never overlaps. Within a row all reads of the passes before the last one, the
    label's and the top logits' too, are ordered before its first write by the barrier below. In the
    last pass a tile's write depends on the reads of that tile, each column of which is held by one
    thread (LANES is a multiple of the threads), and tiles do not overlap.
    """
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        label, live = _label(F, labels, row, 0)
        weight = _weight(weights, row, live)
        s_row, t_row, g_row, h_row = _rows(
            F,
            student,
            student_stride,
            teacher,
            teacher_stride,
            grad,
            grad_stride,
            teacher_grad,
            teacher_grad_stride,
            row,
        )
        results_row = results + row * RESULTS
        if live:
            r = fold_row(F, s_row, t_row, labels, 0, label, 0, columns, 0, numbers, LANES, K)
            if F.kind > REVERSE_KL:
                value, slope = value_row(F, r, s_row, t_row, 0, columns, numbers, LANES, K)
                r = _with_value(r, value, slope)
            _store_results(results_row, _results(F, r, columns, numbers), None)
            if weight != 0.0:
                tl.debug_barrier()
                none = Emission(labels, 0, labels, 0.0, 0.0)
                gradient_row(
                    F,
                    r,
                    s_row,
                    t_row,
                    g_row,
                    h_row,
                    none,
                    label,
                    weight,
                    0,
                    columns,
                    0,
                    columns,
                    numbers,
                    LANES,
                    K,
                )
        else:
            zero = tl.zeros([1], tl.float64)
            _store_results(results_row + tl.arange(0, 1), (zero, zero, zero, zero, zero, zero), None)
        if weight == 0.0:
            zero_row(F, g_row, h_row, 0, columns, LANES, K)


@triton.jit
def _with_value(r, value, slope):
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
        r.sum_s,
        r.label_s,
        r.label_t,
        r.top_s,
        r.arg_s,
        r.top_t,
        r.arg_t,
        value,
        slope,
    )


@triton.jit
def _part(columns, part, TILE: tl.constexpr):
    """The columns [begin, end) of this program; ``part`` is a multiple of the tile, which the compiler
    is told: else it would load one column at a time."""
    begin = tl.multiple_of(tl.program_id(1) * part, TILE)
    return begin, tl.minimum(begin + part, columns)


@_kernel
def fold(
    student,
    student_stride,
    teacher,
    teacher_stride,
    labels,
    ids,
    slots,
    partial,
    rows,
    columns,
    part,
    offset,
    numbers,
    F: tl.constexpr,
    LANES: tl.constexpr,
    K: tl.constexpr,
):
    """``partial [parts, rows, 19]``: each part's state, untouched for skipped rows. One read of s and t.

    ``ids [rows, slots]``, where F says so, are left out of the student's maxima and sums.
    """
    row = tl.program_id(0)
    label, live = _label(F, labels, row, offset)
    begin, end = _part(columns, part, LANES * K)
    if live:
        s_row = row_pointer(F, student, student_stride, row)
        t_row = s_row
        if F.kind:
            t_row = row_pointer(F, teacher, teacher_stride, row)
        ids_row = ids
        if F.sparse:
            ids_row = ids + slots.to(tl.int64) * row
        r = fold_row(F, s_row, t_row, ids_row, slots, label, begin, end, offset, numbers, LANES, K)
        at = (tl.program_id(1).to(tl.int64) * rows + row) * COLUMNS
        store_state(partial + at, r, None)


@_kernel
def merge(partial, state, labels, rows, parts, temperature: tl.float64, F: tl.constexpr, ROWS: tl.constexpr):
    """The parts' states into ``state [rows, 19]``, first to last."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    if F.labels:
        live = live & (tl.load(labels + row, live, other=-1) >= 0)
    at = row.to(tl.int64) * COLUMNS
    r = load_state(state + at, live)
    for _ in range(0, parts):
        r = merged(r, load_state(partial + at, live), temperature)
        at += rows.to(tl.int64) * COLUMNS
    store_state(state + row.to(tl.int64) * COLUMNS, r, live)


@_kernel
def value(
    student,
    student_stride,
    teacher,
    teacher_stride,
    state,
    partial,
    rows,
    columns,
    part,
    numbers,
    F: tl.constexpr,
    LANES: tl.constexpr,
    K: tl.constexpr,
):
    """``partial [parts, rows, 2]``: each part's value and slope. One read of s and t."""
    row = tl.program_id(0)
    begin, end = _part(columns, part, LANES * K)
    r = load_state(state + row.to(tl.int64) * COLUMNS, None)
    s_row = row_pointer(F, student, student_stride, row)
    t_row = row_pointer(F, teacher, teacher_stride, row)
    phi, slope = value_row(F, r, s_row, t_row, begin, end, numbers, LANES, K)
    at = partial + (tl.program_id(1).to(tl.int64) * rows + row) * 2
    tl.store(at, phi)
    tl.store(at + 1, slope)


@_kernel
def merge_value(partial, state, rows, parts, ROWS: tl.constexpr):
    """The parts' values and slopes into ``state``, first to last."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    to = state + row.to(tl.int64) * COLUMNS + VALUE
    phi, slope = tl.load(to, live), tl.load(to + 1, live)
    at = partial + row.to(tl.int64) * 2
    for _ in range(0, parts):
        phi += tl.load(at, live)
        slope += tl.load(at + 1, live)
        at += rows.to(tl.int64) * 2
    tl.store(to, phi, live)
    tl.store(to + 1, slope, live)


@_kernel
def finish(state, labels, results, rows, vocab, numbers, F: tl.constexpr, ROWS: tl.constexpr):
    """``results [rows, 6]`` from finished states, 0 in skipped rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    live = inside
    if F.labels:
        live = inside & (tl.load(labels + row, inside, other=-1) >= 0)
    r = load_state(state + row.to(tl.int64) * COLUMNS, live)
    found = _results(F, r, vocab, numbers)
    to = results + row.to(tl.int64) * RESULTS
    for i in tl.static_range(RESULTS):
        tl.store(to + i, tl.where(live, found[i], 0.0), inside)


@_kernel
def gradient(
    student,
    student_stride,
    teacher,
    teacher_stride,
    labels,
    weights,
    grad,
    grad_stride,
    teacher_grad,
    teacher_grad_stride,
    ids,
    slots,
    kept,
    kept_stride,
    rest,
    lse1,
    state,
    columns,
    part,
    offset,
    vocab,
    numbers,
    F: tl.constexpr,
    LANES: tl.constexpr,
    K: tl.constexpr,
):
    """weights * d(loss)/d(logits) of a chunk from finished states; 0 in skipped rows.

    With a sparse target the soft term is ``rest`` times the softmax of the rest, and ``kept`` at ``ids``.
    One read of s and t, one write. Aliasing as in ``fused``: a program reads only what it writes.
    """
    row = tl.program_id(0)
    label, live = _label(F, labels, row, offset)
    weight = _weight(weights, row, live)
    begin, end = _part(columns, part, LANES * K)
    s_row, t_row, g_row, h_row = _rows(
        F,
        student,
        student_stride,
        teacher,
        teacher_stride,
        grad,
        grad_stride,
        teacher_grad,
        teacher_grad_stride,
        row,
    )
    if weight != 0.0:
        r = load_state(state + row.to(tl.int64) * COLUMNS, None)
        emission = Emission(ids, 0, kept, 0.0, 0.0)
        if F.sparse:
            emission = Emission(
                ids + slots.to(tl.int64) * row,
                slots,
                kept + kept_stride.to(tl.int64) * row,
                tl.load(rest + row),
                tl.load(lse1 + row),
            )
        gradient_row(
            F,
            r,
            s_row,
            t_row,
            g_row,
            h_row,
            emission,
            label,
            weight,
            begin,
            end,
            offset,
            vocab,
            numbers,
            LANES,
            K,
        )
    else:
        zero_row(F, g_row, h_row, begin, end, LANES, K)


@_kernel
def scale(values, factor, count, TILE: tl.constexpr):
    """values *= factor ``[]``, rounded once. Where the factor is 1, as it nearly always is in a backward,
    nothing is read or written, and nobody had to wait to find out."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        step = tl.num_programs(0).to(tl.int64) * TILE
        for start in range(tl.program_id(0).to(tl.int64) * TILE, count, step):
            at = values + start + tl.arange(0, TILE)
            inside = start + tl.arange(0, TILE) < count
            scaled = tl.load(at, mask=inside).to(tl.float32) * by
            tl.store(at, scaled.to(values.dtype.element_ty), mask=inside)
