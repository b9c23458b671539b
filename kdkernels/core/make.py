"""A request made of what the public losses are given: each argument checked once, and the models' sides together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import chosen_backend, native, reference_asked
from ..backends.outcomes import check_divergence
from ..backends.spec import Asked, Spec, Tail
from ..checks import DTYPES, check_plain
from ..divergences import Divergence, NoDivergence
from ..targets import SparseTarget
from . import shards, tokens
from .checked import checked_target
from .dtensors import unwrapped
from .inplace import check_inplace, overwrites
from .option_checks import checked
from .request import Call, Limits, Reducer, Request, Terms, Tokens, loss_dtype
from .schedule import default_chunk_bytes
from .sides import Logits, Side, Teacher, check_together, common_vocab, side
from .transforms import refuse_transforms
from .weights import output_weights, token_weights


class Given(NamedTuple):
    """What a loss is given beside the models."""

    terms: Terms
    tokens: Tokens
    limits: Limits = Limits()
    inplace: bool = False


def make(student: Logits, teacher: Teacher | None, given: Callable[[], Given]) -> Call:
    """The call that these arguments describe; an error where they describe none. ``given`` is called where the ranks of a
    shard's group learn of each other's errors; what is wrong with a model's shard itself is one rank's to say."""
    student, teacher = unwrapped("student", student), unwrapped("teacher", teacher)
    checked_call = functools.partial(_checked_call, student, teacher, given)
    shard = getattr(student, "shard", None)
    return checked_call() if shard is None else shards.agreed(shard, checked_call, _signature)


def signature(request: Request, leading: torch.Size) -> dict[str, Any]:
    """What must be the same on all ranks of a shard's group, so that they walk the same chunks; a loss's target aside."""
    assert request.place is not None
    models = [request.student] if request.spec.tail else [request.student, request.teacher]
    heads = [tensors for tensors in models if len(tensors) > 1]
    same: dict[str, Any] = {
        **request.place.options(),
        "hidden widths": [hidden.shape[-1] for hidden, *_ in heads],
        **{f"the loss's {part}": [getattr(spec, part) for spec in request.specs] for part in Spec._fields},
        "vocabulary": request.vocab,
        "chunk_bytes": request.chunk_bytes,
        "gradient_tolerance": request.gradient_tolerance,
        "dtypes": [str(t.dtype) for t in request.tensors],
        "gradients": request.needs_grad,
        "backend": (chosen_backend(), native.why_not() is None),
        "the divergence's numbers": request.parameters.tolist(),
    }
    if request.has_all_tokens:
        same["tokens"] = list(leading)
        same["temperature"] = shards.fingerprint(request.temperature)
        same["labels"] = shards.fingerprint(request.labels)
        same["weights"] = shards.fingerprint(request.weights)
    return same


def _signature(call: Call) -> dict[str, Any]:
    request = call.request
    same = signature(request, call.reducer.leading)
    same["reduction"] = "none" if call.reducer.per_row else "one number"
    if request.spec.tail and request.has_all_tokens:
        ids, values = request.teacher
        same["slots"] = ids.shape[-1]
        same["the sparse target's ids"] = shards.fingerprint(ids)
        stored = values.reshape(ids.shape).masked_fill(ids < 0, 0.0)
        same["the sparse target's values"] = shards.fingerprint(stored)
    return same


def _checked_call(student: Logits, teacher: Teacher | None, given: Callable[[], Given]) -> Call:
    terms, tokens_given, limits, inplace = given()
    terms, tokens_given, limits = terms.checked(), tokens_given.checked(), limits.checked()
    checked(inplace=inplace)
    terms.check_labels(tokens_given.labels)
    s = side("student", student)
    t = None if teacher is None or isinstance(teacher, SparseTarget) else side("teacher", teacher)
    refuse_transforms(s.tensors if t is None else s.tensors + t.tensors)
    s, t = shards.placed(s, t)
    vocab = common_vocab(s, t, limits.vocab_size)
    place = shards.place(s, t, vocab)
    if t is not None:
        check_together(s, t)
    live = tokens.live_labels(tokens_given.labels, tokens_given.mask, s, vocab, tokens_given.ignore_index)
    spec = _spec(terms, s, t)
    if isinstance(teacher, SparseTarget):
        spec, t = _sparse(teacher, s, live, vocab, spec, terms.divergences[0])
    if not spec.asked & (Asked.SOFT | Asked.TEACHER_LABEL):  # nobody looks at the teacher
        spec, t = spec._replace(kind=NoDivergence.code, tail=Tail.DENSE), None
    temperature = tokens.per_row("temperature", terms.temperature, s, live)
    weights, scale = token_weights(tokens_given, s, live, terms, vocab)
    learning = s.tensors + (t.tensors if t is not None and terms.teacher_learns else [])
    per_row = tokens_given.reduction == "none" or any(tensor.dtype == torch.float16 for tensor in learning)
    reducer = Reducer(
        tokens_given.reduction, scale if per_row else None, s.leading, loss_dtype(s.tensors), per_row
    )
    request = Request(
        student=s.tensors,
        teacher=[] if t is None else t.tensors,
        labels=live,
        temperature=temperature,
        parameters=tokens.parameters(terms.divergences, s.device),
        weights=output_weights(terms, weights if per_row else weights * scale, temperature, s, live),
        specs=(spec, *(spec._replace(kind=other.kind) for other in terms.divergences[1:])),
        vocab=vocab,
        shard="" if place is None else place.text(),
        chunk_bytes=limits.chunk_bytes or default_chunk_bytes(s.device, vocab),
        needs_grad=_needs_grad(s, t, terms),
        gradient_tolerance=limits.gradient_tolerance,
    )
    inplace = overwrites(inplace, request.needs_grad)
    if inplace:
        check_inplace(request.student)
    return Call(request, reducer, terms, inplace)


def _spec(terms: Terms, student: Side, teacher: Side | None) -> Spec:
    tempered = isinstance(terms.temperature, Tensor) or terms.temperature != 1.0
    spec = Spec(
        kind=terms.divergences[0].kind,
        asked=terms.asked,
        tempered=int(tempered),
        stats=int(terms.return_stats),
        student_scale=student.logit_map.scale,
        student_softcap=student.logit_map.softcap,
    )
    if teacher is None:
        return spec
    return spec._replace(teacher_scale=teacher.logit_map.scale, teacher_softcap=teacher.logit_map.softcap)


def _sparse(
    target: SparseTarget, student: Side, labels: Tensor | None, vocab: int, spec: Spec, divergence: Divergence
) -> tuple[Spec, Side]:
    check_divergence(target.tail, divergence)
    if target.tail == "conditional" and spec.asked & Asked.ENTROPY and not spec.asked & Asked.HARD:
        raise ValueError(
            "entropy_weight is of the whole vocabulary, which tail='conditional' without a hard term never sees; take "
            "another tail, hard_weight with labels, or kd.token_log_probs(..., entropy=True)"
        )
    if target.values.dtype not in DTYPES:
        raise ValueError(f"SparseTarget needs fp64, fp32, bf16 or fp16, got {target.values.dtype}")
    if not reference_asked():  # which goes through torch.func
        for tensor in (target.ids, target.values):
            check_plain("SparseTarget's tensors", tensor)
    values = target.values.detach().reshape(-1, target.slots)
    given = Side([target.ids, values], student.logit_map, target.leading_shape, vocab)
    check_together(student, given)
    spec = spec._replace(tail=int(Tail[target.tail.upper()]), linear=int(target.logprobs is None))
    ids = checked_target(target.ids, values, target.mask, labels, vocab, spec.text())
    return spec, replace(given, tensors=[ids, values])


def _needs_grad(student: Side, teacher: Side | None, terms: Terms) -> list[bool]:
    enabled = torch.is_grad_enabled()
    own = needs_grad(student.tensors, enabled=enabled)
    if teacher is None:
        return own
    return own + needs_grad(teacher.tensors, enabled=enabled and terms.teacher_learns)


def needs_grad(tensors: list[Tensor], *, enabled: bool) -> list[bool]:
    """Which of them need a gradient. What an exported program will be given may, whatever its examples do; its frozen
    parameters stay frozen."""
    return [enabled and (t.requires_grad or _may_be_given(t)) for t in tensors]


def _may_be_given(t: Tensor) -> bool:
    return torch.compiler.is_exporting() and not isinstance(t, torch.nn.Parameter)
