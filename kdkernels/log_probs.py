"""Log-probabilities of given tokens, and entropies: what policies and on-policy distillation are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .backends import chosen_backend, reference_asked
from .backends.spec import Asked, Spec, Tail
from .core import log_prob_operators as operators
from .core import shards
from .core.dtensors import unwrapped
from .core.inplace import check_inplace, overwrites
from .core.log_probs import Values
from .core.make import needs_grad, signature
from .core.option_checks import checked
from .core.request import loss_dtype
from .core.schedule import default_chunk_bytes
from .core.sides import Logits, Side, common_vocab, side
from .core.tokens import live_ids, per_row
from .core.transforms import refuse_transforms
from .heads import ShardedLogits


class TokenLogProbs(NamedTuple):
    """What :func:`token_log_probs` returns, in nats. ``log_probs`` has the shape of the ids, ``[...]`` or ``[..., K]``;
    all else is one number per token, ``[...]``: fp32 (fp64 for fp64 students), ``top1`` int64.

    >>> import torch, kdkernels as kd
    >>> of = kd.token_log_probs(torch.zeros(2, 4), torch.tensor([0, 3]), entropy=True)
    >>> of.log_probs.exp(), of.entropy.exp(), of.top1
    (tensor([0.2500, 0.2500]), tensor([4., 4.]), None)
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    top1: Tensor | None = None


def token_log_probs(
    student: Logits,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    return_stats: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    inplace: bool = False,
    chunk_bytes: int | None = None,
    gradient_tolerance: float = 0.0,
) -> TokenLogProbs:
    """log softmax(student / temperature) at ``ids``, and the entropy of that softmax, both differentiable.

    ``log_probs`` is ``(student / temperature).log_softmax(-1)`` gathered at the ids, with all its digits where a token
    has nearly all the mass, and ``entropy`` is -sum q log q over the whole vocabulary, exactly 0 where one token has
    all of it. Their gradients, w (onehot - q) / T and -w q (log q + H) / T, are those for whatever arrives from
    autograd: one pass over the logits in the forward, and one in the backward. The full ``[tokens, vocab]`` logits of
    a LinearHead are never held. Its backward projects again, unless its hidden states alone need a gradient and
    are not fp16.

    Args:
        student: logits ``[..., V]`` (fp64, fp32, bf16, fp16) or a :class:`LinearHead`.
        ids: int64 ``[...]``, or ``[..., K]`` for several per token, which share the pass. -1 is no id: log-probability
            0, no gradient. Not shifted here.
        temperature: a number, or a tensor: 0-dim or one for each token ``[...]``, a constant.
        entropy: also return the entropy.
        return_stats: also return ``logsumexp`` (of the logits / temperature) and ``top1``, the most probable id (the
            first of equal ones), both detached.
        ignore_index: masks a token, as a label does: all it gets is 0 without a gradient, but a ``top1`` of -1. Of
            K ids all or none must be ``ignore_index``.
        vocab_size: use only the first entries of the vocabulary (padding cut off).
        inplace: the backward overwrites the student's logits with their gradient; compiled code does not. Until then
            nobody else may write to them, and a second backward is an error.
        chunk_bytes: budget of the logit tiles, default 512 MiB; on a GPU what 2048 rows need, if that is more
            and no more than a sixteenth of its memory.
        gradient_tolerance: of a :class:`LinearHead` that learns, in [0, 1): how far the backward's gradient for each
            chunk's logits may be off, as in :func:`kdkernels.distillation_loss`. With a frozen lm_head dH is exact,
            but in fp16.

    Returns:
        :class:`TokenLogProbs` in fp32 (fp64 for fp64 students), with None for what was not asked for.

    Raises:
        ValueError: shapes, dtypes, devices, ids or numbers that do not fit; the message names them (on an accelerator,
            ids out of range are a device-side assertion). RuntimeError for ``create_graph=True``.

    >>> import torch, kdkernels as kd
    >>> head = kd.LinearHead(torch.randn(4, 8, requires_grad=True), torch.randn(100, 8))
    >>> of = kd.token_log_probs(head, torch.tensor([3, 99, -100, 7]), entropy=True)
    >>> (-of.log_probs - 0.01 * of.entropy).sum().backward()
    >>> kd.token_log_probs(torch.tensor([[1.0, 3.0]]).log(), torch.tensor([[0, 1]])).log_probs.exp()
    tensor([[0.2500, 0.7500]])
    """
    options = dict(
        temperature=temperature,
        entropy=entropy,
        return_stats=return_stats,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        inplace=inplace,
        chunk_bytes=chunk_bytes,
        gradient_tolerance=gradient_tolerance,
    )
    student = unwrapped("student", student)
    shard = getattr(student, "shard", None)
    if shard is None:
        call = _call(student, ids, options)
    else:
        call = shards.agreed(shard, lambda: _call(student, ids, options), _signature)
    own = call.own
    if reference_asked():
        if isinstance(student, ShardedLogits) or shard is not None:
            raise ValueError("kd.use_backend('reference') takes whole vocabularies, not shards of them")
        request = operators.request_of(call.given, call.static, "reference")
        made = Values(*reference.log_prob_values(request, student))
    else:
        tensors, *others = call.given
        absent = [None] * (3 - len(tensors))
        values = operators.log_probs(*tensors, *absent, *others, *call.static, call.inplace)
        made = Values(*values[: len(Values._fields)])
    leading, dtype = own.leading, loss_dtype(own.tensors)
    return TokenLogProbs(
        made.log_probs.reshape(ids.shape).to(dtype),
        made.entropy.reshape(leading).to(dtype) if entropy else None,
        made.logsumexp.detach().reshape(leading).to(dtype) if return_stats else None,
        made.top1.reshape(leading) if return_stats else None,
    )


class _Call(NamedTuple):
    """What the operators take."""

    own: Side
    given: operators.Given
    static: operators.Static
    inplace: bool


def _call(student: Logits, ids: Tensor, options: dict[str, Any]) -> _Call:
    """The checked call."""
    options = checked(**options)
    own = side("student", student)
    refuse_transforms(own.tensors)
    own, _ = shards.placed(own, None)
    vocab = common_vocab(own, None, options["vocab_size"])
    place = shards.place(own, None, vocab)
    # An exported program's gradients cost nothing before somebody asks for them.
    wanted = needs_grad(own.tensors, enabled=torch.is_grad_enabled() or torch.compiler.is_exporting())
    inplace = overwrites(options["inplace"], wanted)
    if inplace:
        check_inplace(own.tensors)
    ids, labels = live_ids(ids, own, vocab, options["ignore_index"])
    temperature = options["temperature"]
    # The ids travel as a sparse target's do, so that there is a tail: with this one the student is tempered.
    spec = Spec(
        tail=Tail.TRUNCATE,
        asked=Asked.ENTROPY if options["entropy"] else 0,
        tempered=int(isinstance(temperature, Tensor) or temperature != 1.0),
        stats=int(options["return_stats"]),
        student_scale=own.logit_map.scale,
        student_softcap=own.logit_map.softcap,
    )
    given = own.tensors, ids, labels, per_row("temperature", temperature, own, labels)
    budget = options["chunk_bytes"] or default_chunk_bytes(own.device, vocab)
    shard, tolerance = "" if place is None else place.text(), options["gradient_tolerance"]
    return _Call(own, given, (spec.text(), vocab, shard, budget, wanted, tolerance), inplace)


def _signature(call: _Call) -> dict[str, Any]:
    request = operators.request_of(call.given, call.static, chosen_backend())
    same = signature(request, call.own.leading)
    if request.has_all_tokens:
        ids = request.teacher[0]
        same["slots"], same["ids"] = ids.shape[-1], shards.fingerprint(ids)
    return same
