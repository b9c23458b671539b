"""The operators: one that computes losses and gradients, one in place, and their autograd.

``kdkernels::rows`` (and ``rows_``, which overwrites the student's logits) walks a request and returns per-row
results with the gradients that are needed. Two more connect these to autograd:

* ``attach``: the gradients were made in the forward. The backward multiplies them by what arrives, in place
  when nobody can ask for them again.
* ``deferred``: only the values were made; the backward walks the tiles with the arriving weights. It serves an
  lm_head that learns from tokens' losses that meet autograd one by one (``reduction="none"``, fp16): dW depends on
  every weight. The gradient for the hidden states of a frozen one does not, and is attached.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .. import reference
from ..backends import as_tensor, chosen_backend, name_of, native
from ..backends.protocol import Gradients
from ..backends.spec import OUTPUTS, RESULTS, Output, specs_of, text_of
from ..operators import operator
from .exchange import Merged
from .layout import overlap
from .request import Request
from .scaling import scaled
from .transforms import batched, refuse_batched, refuse_double_backward, tracing
from .walk import merged_for, walk


def new_gradient(logits: Tensor) -> Tensor:
    """Memory for the gradient of ``logits``, not yet written to."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.device.type == "cpu":
        native.advise_huge_pages(grad)
    return grad


def _buffers(request: Request) -> Gradients:
    """New ones for the gradients of given logits."""
    count = len(request.student)
    own, theirs = request.needs_grad[:count], request.needs_grad[count:]
    return Gradients(
        new_gradient(request.student[0]) if count == 1 and any(own) else None,
        new_gradient(request.teacher[0]) if len(theirs) == 1 and any(theirs) else None,
    )


def compute(request: Request, merged: Merged | None = None) -> list[Tensor]:
    """[results ``[N, D * RESULTS]``, *gradients that are needed]."""
    if request.backend == "reference":
        return reference.compute(request)
    results, *gradients = walk(request, _buffers(request), merged)
    return [results, *(g.view(t.shape) for g, t in zip(gradients, request.wanted()))]


def _empty_results(weights: Tensor) -> Tensor:
    return weights.new_empty(weights.shape[0], weights.shape[1] // OUTPUTS * RESULTS)


@operator("rows")
def rows(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    temperature: Tensor,
    parameters: Tensor,
    weights: Tensor,
    spec: str,
    vocab: int,
    shard: str,
    chunk_bytes: int,
    needs_grad: list[bool],
    gradient_tolerance: float,
    choice: Tensor | None = None,
    state: Tensor | None = None,
    stored: Tensor | None = None,
) -> list[Tensor]:
    """``choice``: the backend, as a tensor; None takes this thread's. ``state`` and ``stored``: what a
    shard's forward left in :class:`Merged`. :func:`deferred` gives all three."""
    backend = chosen_backend() if choice is None else name_of(choice)
    given = student, teacher, labels, temperature, parameters, weights
    static = spec, vocab, shard, chunk_bytes, needs_grad, gradient_tolerance
    request = Request.from_arguments(*given, *static, backend=backend)
    merged = None
    if state is not None and stored is not None and len(state):
        merged = Merged(state, stored, ready=True)
    return compute(request, merged)


@torch.library.register_fake(rows)
def _(*given):
    request = Request.from_arguments(*given[:12])  # without choice, state and stored
    wanted = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in request.wanted()]
    return [_empty_results(request.weights), *wanted]


@operator("rows_", mutates_args=("student",))
def rows_(
    student: Tensor,
    teacher: list[Tensor],
    labels: Tensor | None,
    temperature: Tensor,
    parameters: Tensor,
    weights: Tensor,
    spec: str,
    vocab: int,
    shard: str,
    chunk_bytes: int,
) -> Tensor:
    _refuse_overlap(student, teacher)
    given = [student], teacher, labels, temperature, parameters, weights
    static = spec, vocab, shard, chunk_bytes, [True] + [False] * len(teacher), 0.0
    request = Request.from_arguments(*given, *static, backend=chosen_backend())
    if request.backend == "reference":
        results, gradient = reference.compute(request)
        student.copy_(gradient)
        return results
    return walk(request, Gradients(student, None))[0]


@torch.library.register_fake(rows_)
def _(student, teacher, labels, temperature, parameters, weights, *_):
    return _empty_results(weights)


def _refuse_overlap(student: Tensor, teacher: list[Tensor]) -> None:
    """Writing over the student must not change what is still to be read of the teacher: logits in the same places are read
    before they are written, and nothing else is."""
    for t in teacher:
        same = len(teacher) == 1 and t.data_ptr() == student.data_ptr() and t.stride() == student.stride()
        if not same and overlap(student, t):
            raise ValueError(
                "inplace=True, but student and teacher are different views of one tensor, with memory in "
                "common; clone the teacher, or inplace=False"
            )


def overwrite(student: Tensor, *given) -> Tensor:
    """:func:`rows_`, whose write autograd is told of by ``attach``, and not before.

    Once a view counts as written to, torch gives it another grad_fn: as_strided, whose backward allocates one more gradient,
    or an error if a torch.autograd.Function made the view. ``attach`` is to be linked to the one that it had. A compiler
    must be told at once.
    """
    if tracing(student):
        return rows_(student, *given)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return rows_(student, *given)


def renew(overwritten: Tensor) -> None:
    """Gives a view that ``attach`` has marked as written to its new grad_fn.

    torch does so when grad_fn is read. ``register_hook``, which FSDP calls on what a module returns, does not read it first,
    and crashes the process on the old one.
    """
    if not tracing(overwritten) and overwritten._is_view():
        # A view that a torch.autograd.Function made has none: register_hook raises the same error.
        with contextlib.suppress(RuntimeError):
            overwritten.grad_fn  # noqa: B018


@operator("attach")
def attach(value: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """``value``, with ``gradients`` as its derivative for ``inputs``."""
    return value.clone()


@torch.library.register_fake(attach)
def _(value, inputs, gradients):
    return torch.empty_like(value)


@operator("attach_one")
def attach_one(value: Tensor, input: Tensor, gradient: Tensor) -> Tensor:
    """:func:`attach` of one input. Where a list is among an operator's arguments torch walks through all of them in Python
    several times a call."""
    return value.clone()


@torch.library.register_fake(attach_one)
def _(value, input, gradient):
    return torch.empty_like(value)


def _attach_setup(ctx, inputs, output) -> None:
    ctx.gradients = list(inputs[2]) if isinstance(inputs[2], list) else [inputs[2]]
    if tracing(output):
        ctx.versions = []
        return
    torch.autograd.graph.increment_version(ctx.gradients)  # those in place have overwritten logits
    ctx.versions = _versions(ctx.gradients)


def _versions(gradients: list[Tensor]) -> list[int]:
    """How often each was written to. Parts of a tensor have one count for all of it, which says nothing of one part."""
    whole = [g.untyped_storage().nbytes() == g.numel() * g.element_size() for g in gradients]
    return [g._version if is_whole else 0 for g, is_whole in zip(gradients, whole)]


def _attach_backward(ctx, arriving):
    compiling = tracing(arriving)
    refuse_double_backward(compiling)
    if ctx.gradients is None:
        raise RuntimeError(
            "this loss was already differentiated and its gradient handed over; "
            "pass retain_graph=True to the first backward"
        )
    gradients = ctx.gradients
    if not compiling and ctx.versions != _versions(gradients):
        raise RuntimeError(
            "the student's logits, where inplace=True has left their gradient, were written to before the backward; "
            "clone them before, or inplace=False"
        )
    # torch has no public name for whether retain_graph=True was given.
    if not compiling and not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.gradients = None  # the caller owns them now: .grad takes the buffer without a copy
    if compiling or batched(arriving):
        factor = arriving.unsqueeze(-1) if arriving.dim() else arriving
        made = [(g * factor).to(g.dtype) for g in gradients]
    else:
        made = [scaled(g, arriving, reuse=ctx.gradients is None) for g in gradients]
    return None, made, [None] * len(gradients)


torch.library.register_autograd(attach, _attach_backward, setup_context=_attach_setup)


def _attach_one_backward(ctx, arriving):
    return None, _attach_backward(ctx, arriving)[1][0], None


torch.library.register_autograd(attach_one, _attach_one_backward, setup_context=_attach_setup)


@operator("deferred")
def deferred(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    temperature: Tensor,
    parameters: Tensor,
    weights: Tensor,
    spec: str,
    vocab: int,
    shard: str,
    chunk_bytes: int,
    needs_grad: list[bool],
    gradient_tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(the student's losses ``[N, D]`` fp64, results, choice, state, stored): the student's gradient is made in the
    backward. State and stored are :class:`Merged`'s.

    ``choice`` is the backend that served, as a tensor.
    """
    given = student, teacher, labels, temperature, parameters, weights
    backend = chosen_backend()
    static = spec, vocab, shard, chunk_bytes, [False] * len(needs_grad), 0.0
    request = Request.from_arguments(*given, *static, backend=backend)
    merged = merged_for(request)
    results = compute(request, merged if len(merged.state) else None)[0]
    each = zip(results.split(RESULTS, 1), weights.split(OUTPUTS, 1))
    losses = torch.stack([row_losses(*one) for one in each], 1)
    return losses, results, as_tensor(backend), merged.state, merged.stored


@torch.library.register_fake(deferred)
def _(*given):
    request = Request.from_arguments(*given)
    weights = request.weights
    merged, losses = merged_for(request), weights.new_empty(weights.shape[0], len(request.specs))
    return losses, _empty_results(weights), as_tensor("auto"), merged.state, merged.stored


def row_losses(results: Tensor, weights: Tensor) -> Tensor:
    """Of one loss, the sum of weight times output over all outputs but the teacher's own, which comes last; weight 0 times an
    infinity is 0."""
    results, weights = results[:, : Output.TEACHER_LABEL], weights[:, : Output.TEACHER_LABEL]
    return (results * weights).masked_fill_(weights == 0, 0.0).sum(1)


def _deferred_setup(ctx, inputs, output) -> None:
    student, teacher, labels, temperature, parameters, weights, *ctx.rest = inputs
    ctx.sizes = len(student), len(teacher)
    _, results, choice, state, stored = output
    ctx.mark_non_differentiable(results, choice, state, stored)
    save_tensors(ctx, [choice, state, stored, labels, temperature, parameters, weights, *student, *teacher])


def save_tensors(ctx, tensors: list[Tensor | None]) -> None:
    # A teacher's tensors often come from inference mode; autograd does not save those, and nobody can
    # overwrite them outside of it.
    ctx.constants = [t if t is not None and t.is_inference() else None for t in tensors]
    ctx.save_for_backward(*(t if c is None else None for t, c in zip(tensors, ctx.constants)))


def saved_tensors(ctx) -> list[Tensor | None]:
    return [t if c is None else c for t, c in zip(ctx.saved_tensors, ctx.constants)]


def _deferred_backward(ctx, arriving, *_):
    refuse_double_backward(tracing(arriving))
    refuse_batched(arriving)
    choice, state, stored, labels, temperature, parameters, weights, *tensors = saved_tensors(ctx)
    n, m = ctx.sizes
    spec, *where, needs_grad, tolerance = ctx.rest
    weights = torch.where(weights != 0, weights * arriving.repeat_interleave(OUTPUTS, 1), 0.0)
    given = tensors[:n], tensors[n:], labels, temperature, parameters, weights
    static = _without_stats(spec), *where, needs_grad, tolerance
    made = iter(rows(*given, *static, choice, state, stored)[1:])
    grads = [next(made) if needed else None for needed in needs_grad]
    return (grads[:n], [None] * m) + (None,) * 10


def _without_stats(spec: str) -> str:
    return text_of(tuple(one._replace(stats=0) for one in specs_of(spec)))


torch.library.register_autograd(deferred, _deferred_backward, setup_context=_deferred_setup)
