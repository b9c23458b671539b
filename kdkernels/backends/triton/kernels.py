"""The kernels. All of them read a row's logits in fp32, whatever their dtype, and never use atomics,
so that the same inputs give the same bits.

============ ==================== ==========================================================
kernel       a program            does
============ ==================== ==========================================================
fused        rows, one by one     results and gradients of whole rows
fold         (row, part)          the state of one part of a row's columns
merge        a vector of rows     the parts' states into the rows' states, in order
value        (row, part)          second pass of one part: value and sum_q_psi
merge_value  a vector of rows     the parts' values into the rows' states, in order
finish       a vector of rows     results from finished states
gradient     (row, part)          the gradient of one part from the finished state
scale        tiles, one by one    a finished gradient times a number that only the GPU knows
============ ==================== ==========================================================
"""

import inspect

import triton
import triton.language as tl

from .. import spec
from .divergences import REVERSE_KL, load_parameters
from .rows import (
    GradRows,
    Matrix,
    Row,
    Side,
    Softmax,
    Span,
    Stored,
    Weights,
    divergence,
    fold_row,
    row_pointer,
    value_row,
    write_gradient,
    write_zeros,
)
from .state import (
    COLUMNS,
    LOG2E,
    SUM_Q_PSI,
    VALUE,
    Normaliser,
    above,
    load_state,
    lse,
    merged,
    normaliser,
    store_state,
    with_value,
)

SOFT = tl.constexpr(spec.Output.SOFT)
LABEL = tl.constexpr(spec.Output.LABEL)
SMOOTH = tl.constexpr(spec.Output.SMOOTH)
LSE_SQUARED = tl.constexpr(spec.Output.LSE_SQUARED)
ENTROPY = tl.constexpr(spec.Output.ENTROPY)
TEACHER_LABEL = tl.constexpr(spec.Output.TEACHER_LABEL)
STUDENT_ENTROPY = tl.constexpr(spec.Result.STUDENT_ENTROPY)
TEACHER_ENTROPY = tl.constexpr(spec.Result.TEACHER_ENTROPY)
AGREEMENT = tl.constexpr(spec.Result.AGREEMENT)
OUTPUTS = tl.constexpr(spec.OUTPUTS)
RESULTS = tl.constexpr(spec.RESULTS)


def _kernel(function):
    """jit, with nothing specialised but what Flags says: no new code for another size or address."""
    given = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[p.name for p in given if p.annotation is not tl.constexpr])


@triton.jit
def _entropy(side):
    return tl.log(side.sum_exp) - side.sum_exp_shift / side.sum_exp


@triton.jit
def _results(F: tl.constexpr, r, vocab):
    """In the order of Output and Result; 0 where nobody asked."""
    s, t = r.student, r.teacher
    zero = s.reference * 0.0
    soft, label, smooth, lse_squared, entropy, teacher_label = zero, zero, zero, zero, zero, zero
    student_entropy, teacher_entropy, agreement = zero, zero, zero
    if F.kind:
        soft = divergence(F, r)
    if F.label:
        label = above(normaliser(s), s.label_logit)
    if F.smooth:
        smooth = above(normaliser(s), s.sum_logits / vocab)
    if F.lse_squared:
        lse_squared = lse(normaliser(s)) * lse(normaliser(s))
    if F.entropy:
        entropy = _entropy(s)
    if F.teacher_label:
        teacher_label = above(normaliser(t), t.label_logit)
    if F.stats:
        student_entropy = _entropy(s)
        if F.teacher:
            teacher_entropy = _entropy(t)
            agreement = tl.where(s.top_index == t.top_index, 1.0, zero)
    return (
        soft,
        label,
        smooth,
        lse_squared,
        entropy,
        teacher_label,
        student_entropy,
        teacher_entropy,
        agreement,
    )


@triton.jit
def _label(F: tl.constexpr, labels, row, offset):
    """The label's column in the tile, and whether the row takes part."""
    label, live = -1, True
    if F.labels:
        given = tl.load(labels + row)
        label, live = (given - offset).to(tl.int32), given >= 0
    return label, live


@triton.jit
def _weight(pointer, live, ASKED: tl.constexpr):
    weight = tl.cast(0.0, tl.float64)
    if ASKED:
        weight = tl.where(live, tl.load(pointer), 0.0)
    return weight


@triton.jit
def _weights(F: tl.constexpr, pointer, row, live):
    pointer += tl.cast(row, tl.int64) * OUTPUTS
    return Weights(
        soft=_weight(pointer + SOFT, live, F.kind != 0 or F.sparse),
        label=_weight(pointer + LABEL, live, F.label),
        smooth=_weight(pointer + SMOOTH, live, F.smooth),
        lse_squared=_weight(pointer + LSE_SQUARED, live, F.lse_squared),
        entropy=_weight(pointer + ENTROPY, live, F.entropy),
        teacher_label=_weight(pointer + TEACHER_LABEL, live, F.teacher_label),
    )


@triton.jit
def _any(w):
    """Whether a weight is not 0: NaN is not."""
    some = (w.soft != 0.0) | (w.label != 0.0) | (w.smooth != 0.0)
    return some | (w.lse_squared != 0.0) | (w.entropy != 0.0) | (w.teacher_label != 0.0)


@triton.jit
def _temperature(F: tl.constexpr, temperature, stride, row, mask):
    found = tl.cast(1.0, tl.float64)
    if F.tempered:
        found = tl.load(temperature + stride.to(tl.int64) * row, mask)
    return found


@triton.jit
def _side(F: tl.constexpr, matrix, logit_map, row):
    return Side(row_pointer(F, matrix, row), logit_map)


@triton.jit
def _row(F: tl.constexpr, student, teacher, maps, row, label, temperature, parameters):
    s = _side(F, student, maps.student, row)
    t, numbers = s, 0.0
    if F.teacher:
        t = _side(F, teacher, maps.teacher, row)
    if F.kind:
        numbers = load_parameters(F, parameters)
    return Row(s, t, label, temperature, (1.0 / temperature * LOG2E).to(tl.float32), numbers)


@triton.jit
def _gradient_rows(F: tl.constexpr, grad, teacher_grad, row, student):
    """The rows that are written; ``student``, which nobody uses, for one that is not there."""
    g, h = student.row, student.row
    if F.grad:
        g = row_pointer(F, grad, row)
    if F.teacher_grad:
        h = row_pointer(F, teacher_grad, row)
    return GradRows(g, h)


@_kernel
def fused(
    student,
    student_stride,
    teacher,
    teacher_stride,
    labels,
    temperature,
    temperature_stride,
    parameters,
    weights,
    grad,
    grad_stride,
    teacher_grad,
    teacher_grad_stride,
    results,
    rows,
    columns,
    maps,
    F: tl.constexpr,
    LANES: tl.constexpr,
    K: tl.constexpr,
):
    """Whole rows: results and, where F says so, weights * d(outputs)/d(logits).

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
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        label, live = _label(F, labels, i, 0)
        w = _weights(F, weights, i, live)
        t = _temperature(F, temperature, temperature_stride, i, None)
        s_rows, t_rows = Matrix(student, student_stride), Matrix(teacher, teacher_stride)
        row = _row(F, s_rows, t_rows, maps, i, label, t, parameters)
        g_rows, h_rows = Matrix(grad, grad_stride), Matrix(teacher_grad, teacher_grad_stride)
        grads = _gradient_rows(F, g_rows, h_rows, i, row.student)
        span, nothing = Span(0, columns, 0, columns), Softmax(0.0, 0.0, 0.0)
        stored = Stored(row.student.row, 0, row.student.row, 0.0, Normaliser(0.0, 0.0), nothing)
        results_row = results + tl.cast(i, tl.int64) * RESULTS
        if live:
            r = fold_row(F, row, stored, span, LANES, K)
            if F.kind > REVERSE_KL:
                value, sum_q_psi = value_row(F, r, row, span, LANES, K)
                r = with_value(r, value, sum_q_psi)
            found = _results(F, r, columns)
            for k in tl.static_range(RESULTS):
                tl.store(results_row + k, found[k])
            tl.debug_barrier()
            if _any(w):
                write_gradient(F, r, row, w, stored, span, grads, LANES, K)
        else:
            for k in tl.static_range(RESULTS):
                tl.store(results_row + k, tl.cast(0.0, tl.float64))
        if not _any(w):
            write_zeros(F, span, grads, LANES, K)


@triton.jit
def _part(columns, part, offset, vocab, TILE: tl.constexpr):
    """This program's columns; ``part`` is a multiple of the tile, which the compiler is told: else it would
    load one column at a time."""
    begin = tl.multiple_of(tl.program_id(1) * part, TILE)
    return Span(begin, tl.minimum(begin + part, columns), offset, vocab)


@triton.jit
def _stored_ids(F: tl.constexpr, ids, slots, row, student):
    """The row's stored ids; the address of ``student``, which nobody uses, where there are none."""
    at = student.row
    if F.sparse:
        at = ids + slots.to(tl.int64) * row
    return Stored(at, slots, at, 0.0, Normaliser(0.0, 0.0), Softmax(0.0, 0.0, 0.0))


@_kernel
def fold(
    student,
    student_stride,
    teacher,
    teacher_stride,
    labels,
    temperature,
    temperature_stride,
    parameters,
    ids,
    slots,
    partial,
    rows,
    columns,
    part,
    offset,
    maps,
    F: tl.constexpr,
    LANES: tl.constexpr,
    K: tl.constexpr,
):
    """``partial [parts, rows, COLUMNS]``: each part's state, untouched for skipped rows. One read of s and t.

    ``ids [rows, slots]``, where F says so, stay out of the student's reference, sums and top logit.
    """
    i = tl.program_id(0)
    label, live = _label(F, labels, i, offset)
    span = _part(columns, part, offset, columns, LANES * K)
    if live:
        t = _temperature(F, temperature, temperature_stride, i, None)
        s_rows, t_rows = Matrix(student, student_stride), Matrix(teacher, teacher_stride)
        row = _row(F, s_rows, t_rows, maps, i, label, t, parameters)
        r = fold_row(F, row, _stored_ids(F, ids, slots, i, row.student), span, LANES, K)
        at = (tl.program_id(1).to(tl.int64) * rows + i) * COLUMNS
        store_state(partial + at, r, None)


@_kernel
def merge(
    partial,
    state,
    labels,
    temperature,
    temperature_stride,
    rows,
    parts,
    F: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The parts' states into ``state [rows, COLUMNS]``, first to last."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    if F.labels:
        live = live & (tl.load(labels + row, live, other=-1) >= 0)
    t = _temperature(F, temperature, temperature_stride, row, live)
    at = row.to(tl.int64) * COLUMNS
    r = load_state(state + at, live)
    for _ in range(0, parts):
        r = merged(F, r, load_state(partial + at, live), t)
        at += rows.to(tl.int64) * COLUMNS
    store_state(state + row.to(tl.int64) * COLUMNS, r, live)


@_kernel
def value(
    student,
    student_stride,
    teacher,
    teacher_stride,
    temperature,
    temperature_stride,
    parameters,
    state,
    partial,
    rows,
    columns,
    part,
    maps,
    F: tl.constexpr,
    LANES: tl.constexpr,
    K: tl.constexpr,
):
    """``partial [parts, rows, 2]``: each part's value and sum_q_psi. One read of s and t."""
    i = tl.program_id(0)
    t = _temperature(F, temperature, temperature_stride, i, None)
    s_rows, t_rows = Matrix(student, student_stride), Matrix(teacher, teacher_stride)
    row = _row(F, s_rows, t_rows, maps, i, -1, t, parameters)
    r = load_state(state + i.to(tl.int64) * COLUMNS, None)
    span = _part(columns, part, 0, columns, LANES * K)
    phi, sum_q_psi = value_row(F, r, row, span, LANES, K)
    at = partial + (tl.program_id(1).to(tl.int64) * rows + i) * 2
    tl.store(at, phi)
    tl.store(at + 1, sum_q_psi)


@_kernel
def merge_value(partial, state, rows, parts, ROWS: tl.constexpr):
    """The parts' values and sum_q_psi into ``state``, first to last."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    to = state + row.to(tl.int64) * COLUMNS
    phi, sum_q_psi = tl.load(to + VALUE, live), tl.load(to + SUM_Q_PSI, live)
    at = partial + row.to(tl.int64) * 2
    for _ in range(0, parts):
        phi += tl.load(at, live)
        sum_q_psi += tl.load(at + 1, live)
        at += rows.to(tl.int64) * 2
    tl.store(to + VALUE, phi, live)
    tl.store(to + SUM_Q_PSI, sum_q_psi, live)


@_kernel
def finish(state, labels, results, rows, vocab, F: tl.constexpr, ROWS: tl.constexpr):
    """``results [rows, RESULTS]`` from finished states, 0 in skipped rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    live = inside
    if F.labels:
        live = inside & (tl.load(labels + row, inside, other=-1) >= 0)
    found = _results(F, load_state(state + row.to(tl.int64) * COLUMNS, live), vocab)
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
    temperature,
    temperature_stride,
    parameters,
    weights,
    grad,
    grad_stride,
    teacher_grad,
    teacher_grad_stride,
    ids,
    slots,
    stored,
    stored_stride,
    rest,
    at_1,
    softmax,
    state,
    columns,
    part,
    offset,
    vocab,
    maps,
    F: tl.constexpr,
    LANES: tl.constexpr,
    K: tl.constexpr,
):
    """weights * d(outputs)/d(logits) of a chunk from finished states; 0 in skipped rows.

    With a sparse target the soft term is ``rest`` times the softmax of the rest, and ``stored`` at ``ids``.
    One read of s and t, one write. Aliasing as in ``fused``: a program reads only what it writes.
    """
    i = tl.program_id(0)
    label, live = _label(F, labels, i, offset)
    w = _weights(F, weights, i, live)
    t = _temperature(F, temperature, temperature_stride, i, None)
    s_rows, t_rows = Matrix(student, student_stride), Matrix(teacher, teacher_stride)
    row = _row(F, s_rows, t_rows, maps, i, label, t, parameters)
    g_rows, h_rows = Matrix(grad, grad_stride), Matrix(teacher_grad, teacher_grad_stride)
    grads = _gradient_rows(F, g_rows, h_rows, i, row.student)
    span = _part(columns, part, offset, vocab, LANES * K)
    if _any(w):
        r = load_state(state + i.to(tl.int64) * COLUMNS, None)
        at = _stored_ids(F, ids, slots, i, row.student)
        if F.sparse:
            solved = stored + stored_stride.to(tl.int64) * i
            of_row = softmax + 3 * i.to(tl.int64)
            whole = Softmax(tl.load(of_row), tl.load(of_row + 1), tl.load(of_row + 2))
            row_at_1 = at_1 + 2 * i.to(tl.int64)
            whole_at_1 = Normaliser(tl.load(row_at_1), tl.load(row_at_1 + 1))
            at = Stored(at.ids, slots, solved, tl.load(rest + i), whole_at_1, whole)
        write_gradient(F, r, row, w, at, span, grads, LANES, K)
    else:
        write_zeros(F, span, grads, LANES, K)


@_kernel
def scale(values, factor, count, TILE: tl.constexpr):
    """values *= factor ``[]`` in fp32 at least, rounded once. Where the factor is 1, as it nearly always is in a backward,
    nothing is read or written, and nobody had to wait to find out."""
    wide: tl.constexpr = tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32
    by = tl.load(factor).to(wide)
    if by != 1.0:
        step = tl.num_programs(0).to(tl.int64) * TILE
        for start in range(tl.program_id(0).to(tl.int64) * TILE, count, step):
            at = values + start + tl.arange(0, TILE)
            inside = start + tl.arange(0, TILE) < count
            scaled = tl.load(at, mask=inside).to(wide) * by
            tl.store(at, scaled.to(values.dtype.element_ty), mask=inside)
