"""The operators: one that computes losses and gradients, one in place, and their autograd.

``kdkernels::rows`` (and ``rows_``, which overwrites the student's logits) walks the tiles of a
schedule and returns per-row results with the gradients that were asked for. Two operators connect
these to autograd:

* ``attach``: the gradients were made in the forward, already weighted for the reduction. The
  backward scales them by what arrives, in place when nobody can ask for them again.
* ``deferred``: only the values were made; the backward walks the tiles with the arriving weights.
  It serves ``reduction="none"`` from hidden states, where dW depends on every token's weight.
"""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import CHOICES, chosen_backend, outcomes, serving, triton
from ..backends import row_state as rs
from ..backends.spec import Spec
from ..checks import require, warn
from . import sparse
from .layout import flat, folds, overlap
from .rows import HALF, HeadRows, LogitRows
from .schedule import Plan, plan
from .sparse import SparseRows

_Rows = LogitRows | HeadRows
#: What is widened to fp32 at a time where a half-precision gradient is scaled: 4 MiB of it.
_SLAB_LOGITS = 2**20


def rows_of(tensors: list[Tensor], vocab: int, wants: list[bool], grad: Optional[Tensor]) -> _Rows:
    if len(tensors) > 1:
        return HeadRows([flat(tensors[0]), *tensors[1:]], vocab, wants)
    return LogitRows(tensors[0], vocab, grad)


def _new_gradient(logits: Tensor, vocab: int) -> Tensor:
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.device.type == "cpu":
        from ..backends import native

        native.advise_huge_pages(grad)
    grad[..., vocab:].zero_()
    return grad


def _walk(
    student: _Rows,
    teacher: _Rows | SparseRows | None,
    labels: Optional[Tensor],
    weights: Tensor,
    spec: Spec,
    chunk_bytes: int,
    preferred: str,
) -> Tensor:
    """All tiles of the schedule: per-row results, gradients to the two sides."""
    if isinstance(teacher, SparseRows):
        return sparse.walk(student, teacher, labels, weights, spec, chunk_bytes, preferred)
    sides = [side for side in (student, teacher) if side is not None]
    dtypes = [dtype for side in sides for dtype in side.dtypes]
    backend = serving(preferred, weights.device, dtypes, divergence=spec.divergence)
    cost = sum(side.bytes_per_logit for side in sides) + backend.bytes_per_logit(dtypes)
    tiles = plan(tokens=student.tokens, vocab=student.vocab, bytes_per_logit=cost, chunk_bytes=chunk_bytes)
    results = weights.new_zeros(student.tokens, rs.RESULTS, dtype=torch.float64)
    for rows in tiles.row_chunks():
        chunk = _Chunk(student, teacher, labels, weights, spec, rows, tiles)
        run = chunk.fused if tiles.one_tile_per_row else chunk.by_vocabulary
        results[rows] = run(backend)
    return results


class _Chunk:
    """One chunk of tokens: either a single tile, or vocabulary chunks folded and walked again."""

    def __init__(
        self,
        student: _Rows,
        teacher: Optional[_Rows],
        labels: Optional[Tensor],
        weights: Tensor,
        spec: Spec,
        rows: slice,
        tiles: Plan,
    ) -> None:
        self.student, self.teacher, self.spec, self.rows, self.tiles = student, teacher, spec, rows, tiles
        self.labels = None if labels is None else labels[rows]
        self.weights = weights[rows]

    def _tiles(self, columns: slice) -> tuple[Tensor, Optional[Tensor]]:
        teacher = None if self.teacher is None else self.teacher.tile(self.rows, columns)
        return self.student.tile(self.rows, columns), teacher

    def _gradient_tiles(self, s: Tensor, t: Optional[Tensor], columns: slice):
        grad = self.student.gradient_tile(s, self.rows, columns)
        if self.teacher is None or t is None or not self.spec.teacher_hard_weight:
            return grad, None
        return grad, self.teacher.gradient_tile(t, self.rows, columns)

    def _backward(self, grad: Optional[Tensor], teacher_grad: Optional[Tensor], columns: slice) -> None:
        if grad is not None:
            self.student.backward(grad, self.rows, columns)
        if teacher_grad is not None and self.teacher is not None:
            self.teacher.backward(teacher_grad, self.rows, columns)

    def fused(self, backend) -> Tensor:
        columns = slice(0, self.tiles.vocab)
        s, t = self._tiles(columns)
        grad, teacher_grad = self._gradient_tiles(s, t, columns)
        results = backend.fused(
            s, t, self.labels, self.weights, spec=self.spec, grad=grad, teacher_grad=teacher_grad
        )
        self._backward(grad, teacher_grad, columns)
        return results

    def by_vocabulary(self, backend) -> Tensor:
        spec, vocab = self.spec, self.tiles.vocab
        state = rs.new_state(self.weights.shape[0], self.weights.device)
        for columns in self.tiles.column_chunks():
            s, t = self._tiles(columns)
            backend.accumulate(s, t, self.labels, offset=columns.start, spec=spec, state=state)
        if self.teacher is not None and spec.divergence.closed_form is None:
            for columns in self.tiles.column_chunks():
                s, t = self._tiles(columns)
                backend.accumulate_value(s, t, spec=spec, state=state)
        results = rs.finish(state, spec, self.labels, vocab, self.teacher is not None)
        if self._wants_gradient():
            for columns in self.tiles.column_chunks():
                self._gradient(backend, columns, state)
        return results

    def _wants_gradient(self) -> bool:
        sides = [self.student] if self.teacher is None else [self.student, self.teacher]
        return any(s.grad is not None if isinstance(s, LogitRows) else any(s.wants) for s in sides)

    def _gradient(self, backend, columns: slice, state: Tensor) -> None:
        s, t = self._tiles(columns)
        grad, teacher_grad = self._gradient_tiles(s, t, columns)
        backend.gradient(
            s,
            t,
            self.labels,
            self.weights,
            offset=columns.start,
            vocab=self.tiles.vocab,
            spec=self.spec,
            state=state,
            grad=grad,
            teacher_grad=teacher_grad,
        )
        self._backward(grad, teacher_grad, columns)


def _compute(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Optional[Tensor],
    weights: Tensor,
    spec: list[float],
    vocab: int,
    chunk_bytes: int,
    wants: list[bool],
    backend: str,
    inplace: bool,
) -> list[Tensor]:
    """[results, *student gradients, *teacher gradients] for the inputs that ``wants`` marks."""
    told = Spec.from_floats(spec)
    if backend == "reference":
        made = reference.operator(student, teacher, labels, weights, told, vocab, wants)
        if inplace:
            student[0].copy_(made.pop())
        return made
    kind = weights.device.type
    with torch.autocast(kind, enabled=False):
        return _compute_plain(
            student, teacher, labels, weights, told, vocab, chunk_bytes, wants, backend, inplace
        )


def _compute_plain(
    student, teacher, labels, weights, spec, vocab, chunk_bytes, wants, backend, inplace
) -> list[Tensor]:
    student_wants, teacher_wants = wants[: len(student)], wants[len(student) :]
    grad = teacher_grad = None
    heads = len(student) > 1 or (len(teacher) > 1 and not spec.tail)
    # Compaction waits for the number of live tokens; a graph being captured must not, and the kernels
    # skip masked rows by themselves.
    capturing = weights.is_cuda and torch.cuda.is_current_stream_capturing()
    masked = None if labels is None or not heads or capturing else labels < 0
    if len(student) == 1 and student_wants[0]:
        grad = student[0] if inplace else _new_gradient(student[0], vocab)
    if len(teacher) == 1 and teacher_wants[0]:
        teacher_grad = _new_gradient(teacher[0], vocab)
    results = weights.new_zeros(weights.shape[0], rs.RESULTS, dtype=torch.float64)
    made: list[Tensor] = []
    if not heads:
        _walk_logits(
            student[0],
            teacher,
            labels,
            weights,
            spec,
            vocab,
            chunk_bytes,
            backend,
            grad,
            teacher_grad,
            results,
        )
        made = [g for g in (grad, teacher_grad) if g is not None]
    else:
        s = rows_of(student, vocab, student_wants, grad)
        t: _Rows | SparseRows | None = None
        if teacher:
            t = (
                SparseRows(teacher, spec)
                if spec.tail
                else rows_of(teacher, vocab, teacher_wants, teacher_grad)
            )
        live = weights.shape[0] if masked is None else weights.shape[0] - int(masked.sum())
        if masked is None or live == weights.shape[0]:
            _leave_out(weights, s, t)
            results = _walk(s, t, labels, weights, spec, chunk_bytes, backend)
        else:
            kept, others = masked.to(torch.uint8).argsort(stable=True).tensor_split([live])
            for side in (s, t):
                if side is not None:
                    side.keep(kept, others)
            assert labels is not None
            _leave_out(weights[kept], s, t)
            results[kept] = _walk(s, t, labels[kept], weights[kept], spec, chunk_bytes, backend)
        made = s.gradients() + (t.gradients() if t is not None else [])
        made = [g.view(x.shape) for g, x in zip(made, wanted(student + teacher, wants))]
    if not inplace:
        return [results, *made]
    student[0][..., vocab:].zero_()
    return [results]


def _leave_out(weights: Tensor, *sides: _Rows | SparseRows | None) -> None:
    for side in sides:
        if isinstance(side, HeadRows):
            side.leave_out(weights == 0)


def _refuse_overlap(student: Tensor, teacher: list[Tensor]) -> None:
    """Writing over the student must not change what is still to be read of the teacher."""
    for t in teacher:
        same = t.data_ptr() == student.data_ptr() and t.stride() == student.stride()
        if not same and overlap(student, t):
            raise ValueError(
                "inplace=True, but student and teacher are different views of one tensor, with memory in "
                "common; clone the teacher, or inplace=False"
            )


def wanted(tensors: Sequence[Tensor], wants: Sequence[bool]) -> list[Tensor]:
    """The tensors that ``wants`` marks."""
    return [t for t, want in zip(tensors, wants) if want]


def _walk_logits(
    student, teacher, labels, weights, spec, vocab, chunk_bytes, backend, grad, teacher_grad, results
) -> None:
    """Logits on both sides, or a sparse teacher. What does not fold into ``[N, V]`` as a view is
    walked in parts, so that a shifted ``logits[:, :-1]`` costs no copy."""
    logits = [student, grad, teacher_grad] + ([] if spec.tail else teacher)
    if student.dim() > 2 and weights.numel() and not all(folds(t) for t in logits if t is not None):
        per = weights.shape[0] // student.shape[0]
        for i in range(student.shape[0]):
            part = slice(i * per, (i + 1) * per)
            _walk_logits(
                student[i],
                [t[part] if spec.tail else t[i] for t in teacher],
                None if labels is None else labels[part],
                weights[part],
                spec,
                vocab,
                chunk_bytes,
                backend,
                None if grad is None else grad[i],
                None if teacher_grad is None else teacher_grad[i],
                results[part],
            )
        return
    s = LogitRows(student, vocab, grad)
    t: LogitRows | SparseRows | None = None
    if spec.tail:
        t = SparseRows(teacher, spec)
    elif teacher:
        t = LogitRows(teacher[0], vocab, teacher_grad)
    results.copy_(_walk(s, t, labels, weights, spec, chunk_bytes, backend))


def _named(choice: Optional[Tensor]) -> str:
    return chosen_backend() if choice is None else CHOICES[int(choice)]


@torch.library.custom_op("kdkernels::rows", mutates_args=())
def rows(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Optional[Tensor],
    weights: Tensor,
    spec: list[float],
    vocab: int,
    chunk_bytes: int,
    wants: list[bool],
    choice: Optional[Tensor] = None,
) -> list[Tensor]:
    """``choice``: what :func:`deferred` gave of it; None is what is chosen in this thread now."""
    return _compute(student, teacher, labels, weights, spec, vocab, chunk_bytes, wants, _named(choice), False)


@rows.register_fake
def _(student, teacher, labels, weights, spec, vocab, chunk_bytes, wants, choice=None):
    results = weights.new_empty(weights.shape[0], rs.RESULTS, dtype=torch.float64)
    return [results] + [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in wanted(student + teacher, wants)
    ]


@torch.library.custom_op("kdkernels::rows_", mutates_args=("student",))
def rows_(
    student: Tensor,
    teacher: list[Tensor],
    labels: Optional[Tensor],
    weights: Tensor,
    spec: list[float],
    vocab: int,
    chunk_bytes: int,
) -> Tensor:
    _refuse_overlap(student, teacher)
    wants = [True] + [False] * len(teacher)
    chosen = chosen_backend()
    return _compute([student], teacher, labels, weights, spec, vocab, chunk_bytes, wants, chosen, True)[0]


@rows_.register_fake
def _(student, teacher, labels, weights, spec, vocab, chunk_bytes):
    return weights.new_empty(weights.shape[0], rs.RESULTS, dtype=torch.float64)


def _tracing(t: Tensor) -> bool:
    """Whether a compiler follows along: then nothing may depend on values or be overwritten."""
    return torch.compiler.is_compiling() or type(t) is not Tensor


def _batched(t: Tensor) -> bool:
    """Whether these are many backwards at once, by is_grads_batched (torch's old vmap) or torch.func.vmap."""
    return torch._C._functorch.is_legacy_batchedtensor(t) or torch._C._functorch.is_functorch_wrapped_tensor(
        t
    )


def _refuse_double_backward(tracing: bool) -> None:
    if torch.is_grad_enabled() and not tracing:
        raise RuntimeError(
            "kdkernels' gradient is made in the forward and cannot be differentiated again "
            "(create_graph=True); kd.use_backend('reference') can"
        )


def _scaled(grad: Tensor, factor: Tensor, reuse: bool) -> Tensor:
    """grad * factor, factor 0-dim or one per row of ``grad``; in ``grad``'s memory if ``reuse``."""
    if factor.dim() == 0 and factor.device.type == "cpu" and reuse and factor.item() == 1.0:
        return grad
    if factor.dim() == 0 and grad.is_cuda and reuse and grad.is_contiguous() and triton.why_not() is None:
        return triton.scale_(grad, factor)  # looks at the factor without waiting for it
    out = grad if reuse else torch.empty_like(grad)
    _multiply(grad, factor, out)
    return out


def _multiply(grad: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = grad * factor, rounded once. On the CPU torch would hold half precision in fp32 for a factor
    per row: so few rows at a time."""
    if factor.dim() == 0 or grad.dtype not in HALF or grad.device.type != "cpu":
        torch.mul(grad, factor.unsqueeze(-1) if factor.dim() else factor, out=out)
    elif not folds(grad):
        for part in zip(grad, factor, out):
            _multiply(*part)
    else:
        grad, out = flat(grad), flat(out)
        step = max(_SLAB_LOGITS // grad.shape[1], 1)
        for g, f, o in zip(grad.split(step), factor.reshape(-1, 1).split(step), out.split(step)):
            torch.mul(g, f, out=o)


@torch.library.custom_op("kdkernels::attach", mutates_args=())
def attach(value: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """``value``, with ``gradients`` as its derivative for ``inputs``."""
    return value.clone()


@attach.register_fake
def _(value, inputs, gradients):
    return torch.empty_like(value)


def _attach_setup(ctx, inputs, output) -> None:
    ctx.gradients, ctx.inputs = list(inputs[2]), len(inputs[1])


def _attach_backward(ctx, arriving):
    tracing = _tracing(arriving)
    _refuse_double_backward(tracing)
    if ctx.gradients is None:
        raise RuntimeError(
            "this loss was already differentiated and its gradient handed over; "
            "pass retain_graph=True to the first backward"
        )
    gradients = ctx.gradients
    if not tracing and not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.gradients = None  # the caller owns them now: .grad takes the buffer without a copy
    if tracing or _batched(arriving):
        factor = arriving.unsqueeze(-1) if arriving.dim() else arriving
        scaled = [(g * factor).to(g.dtype) for g in gradients]
    else:
        scaled = [_scaled(g, arriving, reuse=ctx.gradients is None) for g in gradients]
    return None, scaled, [None] * len(gradients)


attach.register_autograd(_attach_backward, setup_context=_attach_setup)


@torch.library.custom_op("kdkernels::deferred", mutates_args=())
def deferred(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Optional[Tensor],
    weights: Tensor,
    spec: list[float],
    vocab: int,
    chunk_bytes: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(per-row loss times weights, results, choice): the student's gradient is made in the backward.

    ``choice`` is the backend that served, as its place in CHOICES: a thread of autograd's has not chosen one.
    A tensor, since compiled code hands nothing else from its forward to its backward.
    """
    none, chosen = [False] * len(wants), chosen_backend()
    results = _compute(student, teacher, labels, weights, spec, vocab, chunk_bytes, none, chosen, False)[0]
    choice = torch.tensor(CHOICES.index(chosen), dtype=torch.uint8, device="cpu")
    return row_loss(results, weights, Spec.from_floats(spec)), results, choice


@deferred.register_fake
def _(student, teacher, labels, weights, spec, vocab, chunk_bytes, wants):
    results = weights.new_empty(weights.shape[0], rs.RESULTS, dtype=torch.float64)
    return torch.empty_like(weights), results, torch.empty((), dtype=torch.uint8, device="cpu")


def row_loss(results: Tensor, weights: Tensor, spec: Spec) -> Tensor:
    """weights * (soft + hard) per row in the dtype of ``weights``; weight 0 times an infinity is 0."""
    total = torch.zeros_like(results[:, rs.SOFT])
    if spec.soft_weight:
        total = spec.soft_weight * results[:, rs.SOFT]
    if spec.hard_weight:
        total = total + spec.hard_weight * results[:, rs.HARD]
    return torch.where(weights != 0, total * weights, 0.0).to(weights.dtype)


def _deferred_setup(ctx, inputs, output) -> None:
    student, teacher, labels, weights, *ctx.rest = inputs
    ctx.sizes = len(student), len(teacher)
    _, results, choice = output
    ctx.mark_non_differentiable(results, choice)
    tensors = [choice, labels, weights, *student, *teacher]
    # A teacher's tensors often come from inference mode; autograd does not save those, and nobody can
    # overwrite them outside of it.
    ctx.constants = [t if t is not None and t.is_inference() else None for t in tensors]
    ctx.save_for_backward(*(t if c is None else None for t, c in zip(tensors, ctx.constants)))


def _deferred_backward(ctx, arriving, *_):
    _refuse_double_backward(_tracing(arriving))
    if _batched(arriving):
        raise RuntimeError(
            "kdkernels takes token losses of a LinearHead backward one at a time; without is_grads_batched=True or "
            "vmap, or with kd.use_backend('reference')"
        )
    saved = zip(ctx.saved_tensors, ctx.constants)
    choice, labels, weights, *tensors = (t if c is None else c for t, c in saved)
    n, m = ctx.sizes
    wants = ctx.rest[3]
    made = iter(rows(tensors[:n], tensors[n:], labels, weights * arriving, *ctx.rest, choice)[1:])
    grads = [next(made) if want else None for want in wants]
    return (grads[:n], [None] * m) + (None,) * 6


deferred.register_autograd(_deferred_backward, setup_context=_deferred_setup)


@torch.library.custom_op("kdkernels::checked_labels", mutates_args=())
def checked_labels(labels: Optional[Tensor], mask: Optional[Tensor], vocab: int, ignore_index: int) -> Tensor:
    """Labels ``[N]`` with -1 for every token that ``ignore_index`` or the mask takes out, 0 for the others where
    there is a mask alone. What is out of range is a ValueError on the CPU; on an accelerator it is a
    device-side assertion, because looking would stop the stream."""
    if mask is not None:
        mask = mask.reshape(-1)
        if mask.dtype != torch.bool:
            require(
                (mask != 0) & (mask != 1), mask, "mask must be bool or hold 0 and 1, found {} at token {}"
            )
    if labels is None:
        assert mask is not None
        return torch.where(mask != 0, 0, -1)
    flat = labels.reshape(-1)
    ignored = flat == ignore_index if mask is None else (flat == ignore_index) | (mask == 0)
    require(
        ~ignored & ((flat < 0) | (flat >= vocab)),
        flat,
        f"labels must be in [0, {vocab}) or ignore_index={ignore_index}, found {{}}",
    )
    if mask is None and vocab > 2:
        _warn_of_a_mask(flat)
    return torch.where(ignored, -1, flat)


def _warn_of_a_mask(labels: Tensor) -> None:
    """Only where looking waits for nothing."""
    if labels.device.type == "cpu" and labels.numel() and bool(((labels == 0) | (labels == 1)).all()):
        warn("labels hold nothing but 0 and 1, and are taken as class ids; a mask of tokens goes in mask=")


@checked_labels.register_fake
def _(labels, mask, vocab, ignore_index):
    given = mask if labels is None else labels
    return given.new_empty(given.numel(), dtype=torch.int64)


@torch.library.custom_op("kdkernels::checked_items", mutates_args=())
def checked_items(num_items: Tensor, weights: Tensor) -> Tensor:
    """``num_items`` (0-dim) as a divisor, fp64 on the device of the rows' ``weights``: > 0 and finite, or 0 where
    every weight is 0. Anything else is an error as in :func:`checked_labels`."""
    items = num_items.double()
    require(~((items >= 0) & (items < torch.inf)), items, "num_items must be > 0 and finite, got {}")
    items = items.to(weights.device, non_blocking=True)
    nothing = (items == 0) & (weights == 0).all()
    require((items == 0) & ~nothing, items, "num_items must be > 0 where any token counts, got {}")
    return torch.where(nothing, 1.0, items)


@checked_items.register_fake
def _(num_items, weights):
    return weights.new_empty((), dtype=torch.float64)


@torch.library.custom_op("kdkernels::checked_target", mutates_args=())
def checked_target(
    ids: Tensor,
    values: Tensor,
    mask: Optional[Tensor],
    labels: Optional[Tensor],
    vocab: int,
    spec: list[float],
) -> Tensor:
    """A sparse target's ids ``[N, K]`` with -1 in empty slots and for masked tokens (labels of -1);
    ids and values out of range are an error as in :func:`checked_labels`. Warnings come from here too,
    since a compiler runs nothing else of it."""
    told = Spec.from_floats(spec)
    outcomes.warn_if_approximate(told.tail, told.temperature)
    checked = outcomes.check(ids, values, mask, labels, vocab=vocab, tail=told.tail, linear=told.linear)
    return checked.contiguous()


@checked_target.register_fake
def _(ids, values, mask, labels, vocab, spec):
    return ids.new_empty(ids.numel() // ids.shape[-1], ids.shape[-1])
