"""The operators of token log-probabilities, and their autograd: values in the forward, gradients in the backward.

``kdkernels::log_probs`` gives values and what the backward needs; ``kdkernels::log_probs_gradient`` the gradients, and
``log_probs_gradient_`` that of given logits over the logits themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import as_tensor, chosen_backend, name_of
from ..backends.spec import OUTPUTS, Output, specs_of
from ..operators import operator
from .autograd import new_gradient, save_tensors, saved_tensors
from .log_probs import Finished, Values, backward, empty_results, forward
from .request import Request
from .transforms import refuse_batched, refuse_double_backward, tracing

#: As the operators take them: (student, ids, labels, temperature) and (spec, vocab, shard, chunk_bytes, needs_grad,
#: gradient_tolerance).
Given = tuple[list[Tensor], Tensor, Tensor | None, Tensor]
Static = tuple[str, int, str, int, list[bool], float]


def request_of(given: Given, static: Static, backend: str, entropy_weights: Tensor | None = None) -> Request:
    """``entropy_weights`` ``[N]``: what arrives for the entropy, in the backward."""
    student, ids, labels, temperature = given
    spec, vocab, shard, chunk_bytes, needs_grad, tolerance = static
    weights = temperature.new_zeros(ids.shape[0], OUTPUTS)
    if entropy_weights is not None:
        weights[:, Output.ENTROPY] = entropy_weights
    tensors = student, [ids], labels, temperature, temperature.new_zeros(1, 2), weights
    limits = chunk_bytes, needs_grad, tolerance
    return Request(*tensors, specs_of(spec), vocab, shard, *limits, backend=backend)


def given_of(*student: Tensor | None) -> list[Tensor]:
    """Logits; or hidden states, an lm_head and its bias, if it has one."""
    return [t for t in student if t is not None]


@operator("log_probs")
def log_probs(
    student: Tensor,
    lm_head: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    spec: str,
    vocab: int,
    shard: str,
    chunk_bytes: int,
    needs_grad: list[bool],
    gradient_tolerance: float,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(*Values, *Finished, the backend that served): see :func:`.autograd.deferred`. The tensors
    are no lists, for the reason that :func:`.autograd.attach_one` gives.

    ``student`` is logits, or hidden states beside their ``lm_head``. ``inplace``: the backward overwrites given logits
    with their gradient.
    """
    backend = chosen_backend()
    given = given_of(student, lm_head, bias), ids, labels, temperature
    static = spec, vocab, shard, chunk_bytes, needs_grad, gradient_tolerance
    request = request_of(given, static, backend)
    if backend == "reference":
        values, finished = Values(*reference.log_prob_values(request)), empty_results(request)[1]
    else:
        values, finished = forward(request)
    return *values, *finished, as_tensor(backend)


@torch.library.register_fake(log_probs)
def _(student, lm_head, bias, ids, labels, temperature, *static):
    given = given_of(student, lm_head, bias), ids, labels, temperature
    values, finished = empty_results(request_of(given, static[:-1], "auto"))
    return *values, *finished, as_tensor("auto")


@operator("log_probs_gradient")
def log_probs_gradient(
    student: list[Tensor],
    ids: Tensor,
    arriving: Tensor,
    entropy_weights: Tensor | None,
    labels: Tensor | None,
    temperature: Tensor,
    finished: list[Tensor],
    spec: str,
    vocab: int,
    shard: str,
    chunk_bytes: int,
    needs_grad: list[bool],
    gradient_tolerance: float,
    choice: Tensor,
) -> list[Tensor]:
    """The gradients that are needed, for what arrives ``[N, K]`` for the log-probabilities and ``[N]`` for the
    entropy."""
    backend = name_of(choice)
    given = student, ids, labels, temperature
    static = spec, vocab, shard, chunk_bytes, needs_grad, gradient_tolerance
    request = request_of(given, static, backend, entropy_weights)
    if backend == "reference":
        return reference.log_prob_gradients(request, arriving)
    buffer = None if request.has_head else new_gradient(student[0])
    grads = backward(request, arriving, Finished(*finished), buffer)
    return [g.view(t.shape) for g, t in zip(grads, request.wanted())]


@torch.library.register_fake(log_probs_gradient)
def _(student, ids, arriving, entropy_weights, labels, temperature, finished, *static):
    spec, vocab, shard, chunk_bytes, needs_grad, *_ = static
    wanted = [t for t, needed in zip(student, needs_grad) if needed]
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in wanted]


@operator("log_probs_gradient_", mutates_args=("student",))
def log_probs_gradient_(
    student: Tensor,
    ids: Tensor,
    arriving: Tensor,
    entropy_weights: Tensor | None,
    labels: Tensor | None,
    temperature: Tensor,
    finished: list[Tensor],
    spec: str,
    vocab: int,
    shard: str,
    chunk_bytes: int,
    choice: Tensor,
) -> None:
    """The same as :func:`log_probs_gradient`, written over the given logits."""
    backend = name_of(choice)
    given, static = ([student], ids, labels, temperature), (spec, vocab, shard, chunk_bytes, [True], 0.0)
    request = request_of(given, static, backend, entropy_weights)
    if backend == "reference":
        student.copy_(reference.log_prob_gradients(request, arriving)[0])
        return
    backward(request, arriving, Finished(*finished), student)


@torch.library.register_fake(log_probs_gradient_)
def _(*_):
    """It gives nothing."""


#: Of the arguments, the tensors: student, lm_head, bias, ids, labels, temperature.
_TENSORS = 6


def _setup(ctx, inputs, output) -> None:
    tensors, ctx.rest = inputs[:_TENSORS], inputs[_TENSORS:]
    ctx.overwritten = False
    ctx.set_materialize_grads(False)  # nobody differentiates most of the outputs
    ctx.mark_non_differentiable(*output[2:])
    save_tensors(ctx, [*tensors, *output[len(Values._fields) :]])


def _backward(ctx, arriving, entropy_weights, *_):
    some = entropy_weights if arriving is None else arriving
    if some is None:  # nothing arrives for any output
        return (None,) * (_TENSORS + len(ctx.rest))
    compiling = tracing(some)
    refuse_double_backward(compiling)
    refuse_batched(some)
    saved = saved_tensors(ctx)
    *student, ids, labels, temperature = saved[:_TENSORS]
    *finished, choice = saved[_TENSORS:]
    student = given_of(*student)
    if arriving is None:
        arriving = some.new_zeros(ids.shape)
    spec, vocab, shard, chunk_bytes, needs_grad, gradient_tolerance, inplace = ctx.rest
    given = ids, arriving, entropy_weights, labels, temperature, finished, spec, vocab, shard, chunk_bytes
    if inplace and not compiling:  # what is compiled may not overwrite what a forward saved
        if ctx.overwritten:  # torch sees it too, but not where hooks save the logits
            raise RuntimeError(
                "the first backward has left the gradient where the student's logits were (inplace=True); inplace=False "
                "for a second one"
            )
        ctx.overwritten = True
        log_probs_gradient_(student[0], *given, choice)
        grads = [student[0].detach()]
    else:
        made = iter(log_probs_gradient(student, *given, needs_grad, gradient_tolerance, choice))
        grads = [next(made) if needed else None for needed in needs_grad]
    return (*grads, *[None] * (_TENSORS + len(ctx.rest) - len(grads)))


torch.library.register_autograd(log_probs, _backward, setup_context=_setup)
