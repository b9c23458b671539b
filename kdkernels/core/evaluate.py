"""A request, solved and tied to autograd: by the oracle, by an operator that makes gradients in the forward, or by one
that makes them in the backward."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backends import reference_asked
from ..backends.spec import Asked, Output
from ..divergences import AlphaBeta
from ..heads import ShardedLogits
from . import autograd
from .request import Call, Request
from .sides import Logits, Teacher

#: While a token's gradient waits in fp16 the sum of its weights has an exponent between these.
_LEAST_EXPONENT, _HIGHEST_EXPONENT = 6, 13


class _Solved(NamedTuple):
    """Per-row results, and the gradients that are needed; in place, the student's logits are its gradient."""

    results: Tensor
    gradients: list[Tensor]


def _solve(request: Request, inplace: bool) -> _Solved:
    """What the operator makes of a request, outside autograd."""
    student, teacher, *others, needs_grad, tolerance = request.arguments()
    student, teacher = [t.detach() for t in student], [t.detach() for t in teacher]
    if inplace:
        results = autograd.overwrite(student[0], teacher, *others)
        return _Solved(results, student)
    results, *gradients = autograd.rows(student, teacher, *others, needs_grad, tolerance)
    return _Solved(results, gradients)


class Evaluated(NamedTuple):
    """The student's loss, attached to it; the teacher's own, where it learns; and the per-row results."""

    student: Tensor
    teacher: Tensor | None
    results: Tensor


def evaluate(student: Logits, teacher: Teacher | None, call: Call) -> Evaluated:
    """A call, solved by the oracle where that is asked for, else by an operator. The oracle takes the models as they were
    given."""
    if reference_asked():
        if isinstance(student, ShardedLogits) or isinstance(teacher, ShardedLogits) or call.request.shard:
            raise ValueError("kd.use_backend('reference') takes whole vocabularies, not shards of them")
        loss, own, results = reference.losses(student, teacher, call)
        return Evaluated(loss, own if call.terms.teacher_learns else None, results.detach())
    if not call.terms.teacher_learns:
        return _alone(call)
    if call.request.spec.asked & Asked.SOFT and not call.reducer.per_row:
        return _both(call)
    # Nothing to share, or each model's gradient is made when its own tokens' weights arrive.
    student_only, teacher_only = _alone(call.student_alone), _alone(call.teacher_alone)
    return Evaluated(student_only.student, teacher_only.student, student_only.results)


def _alone(call: Call) -> Evaluated:
    """One model's loss."""
    request, reducer = call.request, call.reducer
    needed = any(request.needs_grad)
    if needed and reducer.per_row and request.has_head:
        if not request.only_hidden_learns:
            losses, results, *_ = autograd.deferred(*request.arguments())
            return Evaluated(reducer.apply(losses[:, 0]), None, results)
        # A tolerance is of the weighted gradient, whose weights have not arrived.
        request = replace(request, gradient_tolerance=0.0)
    lift = _lift(request) if needed else None
    if lift is not None:
        request = replace(request, weights=request.weights * lift[:, None])
    solved = _solve(request, call.inplace)
    value = autograd.row_losses(solved.results, request.weights)
    # fp64 stays inside: what is added up in a reduction is rounded once.
    value = value.reshape(reducer.leading) if reducer.per_row else reducer.apply(value)
    value = _attached(value, request.wanted(), solved.gradients)
    if call.inplace:
        autograd.renew(request.student[0])
    if lift is not None:
        value = value / lift.reshape(reducer.leading)
    return Evaluated(reducer.apply(value) if reducer.per_row else value, None, solved.results)


def _lift(request: Request) -> Tensor | None:
    """``[N]``: the power of two that a token's weights are multiplied by while its gradient waits in fp16 for what arrives.

    It brings their sum to at least 32, so that a gradient of 1e-6 a weight keeps fp16's digits and one of 1000 a weight
    fits, and to less than 2^13. A gradient at a high temperature T is about 1 / T^2. None where it may have any size: that
    of powers of probabilities, and of a user's formula.
    """
    kind = request.spec.kind
    if request.student[0].dtype != torch.float16 or kind < 0 or kind == AlphaBeta.code:
        return None
    weights = request.weights[:, : Output.TEACHER_LABEL].abs()  # without the teacher's own
    if request.spec.tempered:
        for output in (Output.SOFT, Output.ENTROPY):  # one by one: a list of columns would be copied to a GPU
            weights[:, output] /= request.temperature.square()
    total = weights.sum(1) * abs(request.spec.student_scale)
    # Of weights that are all 0 it is a number too. As fp64: torch's compiler makes no C++ of int32 vectors less a number.
    exponent = torch.frexp(total.clamp(1e-30, 1e30)).exponent.double()
    shift = (_LEAST_EXPONENT - exponent).clamp(min=0).minimum(_HIGHEST_EXPONENT - exponent)
    return torch.ldexp(torch.ones_like(total), shift)


def _both(call: Call) -> Evaluated:
    """Both models' losses from one pass."""
    request = call.request
    solved, inputs = _solve(request, inplace=False), request.wanted()
    split = sum(request.needs_grad[: len(request.student)])
    own = request.weights[:, Output.TEACHER_LABEL]
    loss = call.reducer.apply(autograd.row_losses(solved.results, request.weights))
    theirs = torch.where(own != 0, solved.results[:, Output.TEACHER_LABEL] * own, 0.0)
    teachers = call.reducer.of(request.teacher).apply(theirs)
    return Evaluated(
        _attached(loss, inputs[:split], solved.gradients[:split]),
        _attached(teachers, inputs[split:], solved.gradients[split:]),
        solved.results,
    )


def evaluate_each(student: Logits, teacher: Teacher, call: Call) -> tuple[Tensor, ...]:
    """The token losses of several divergences: a tile is projected once and serves them all. Their gradient is made in
    the backward, where the weights of each token and divergence arrive."""
    if not reference_asked():
        losses, *_ = autograd.deferred(*call.request.arguments())
        return tuple(call.reducer.apply(each) for each in losses.unbind(1))
    calls = (
        replace(call, terms=replace(call.terms, divergences=(divergence,)), request=request)
        for divergence, request in zip(call.terms.divergences, call.request.each())
    )
    return tuple(evaluate(student, teacher, each).student for each in calls)


def _attached(value: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    if len(inputs) == 1:
        return autograd.attach_one(value, inputs[0], gradients[0])
    return autograd.attach(value, inputs, gradients) if inputs else value
