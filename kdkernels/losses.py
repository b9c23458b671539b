"""The public losses. Each checks its arguments, describes the loss in numbers, and runs one operator."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from . import ops, reference
from .backends import candidates, chosen_backend, reference_asked
from .backends import row_state as rs
from .divergences import JSD, Divergence, ForwardKL, NoDivergence, simplified
from .heads import LinearHead
from .outcomes import check_divergence
from .schedule import DEFAULT_CHUNK_BYTES
from .spec import LogitMap, Spec
from .targets import SparseTarget

Logits = Union[Tensor, LinearHead]
Teacher = Union[Tensor, LinearHead, SparseTarget]
_REDUCTIONS = ("none", "sum", "mean", "batchmean")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Stats(NamedTuple):
    """Detached scalars, each a mean over the unmasked tokens except the count itself.

    ``soft`` is the divergence (without weight and T^2), ``hard`` the cross entropy, entropies are
    in nats at the loss's temperature, ``agreement`` is how often the two top-1 tokens are the same.
    With a :class:`SparseTarget` both entropies are those of the K + 1 (or K) outcomes that are compared.
    """

    soft: Tensor
    hard: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    tokens: Tensor


class CodistillationLoss(NamedTuple):
    """Both models' losses; add them (or weigh them) and call backward once."""

    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class _Side:
    tensors: list[Tensor]
    logit_map: LogitMap
    leading: torch.Size
    vocab: int

    @property
    def is_head(self) -> bool:
        return len(self.tensors) > 1

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


@dataclass(frozen=True)
class _Call:
    """A checked call: what goes to the operators."""

    student: _Side
    teacher: Optional[_Side]
    labels: Optional[Tensor]
    weights: Tensor
    scale: Union[Tensor, float]
    spec: Spec
    vocab: int
    chunk_bytes: int
    reduction: str

    @property
    def teacher_tensors(self) -> list[Tensor]:
        return [] if self.teacher is None else [t.detach() for t in self.teacher.tensors]

    @property
    def per_row(self) -> bool:
        """Whether token losses meet autograd: asked for, or fp16, whose gradients of a mean would
        underflow before a GradScaler's factor arrives in the backward."""
        return self.reduction == "none" or self.student.tensors[0].dtype == torch.float16


def _side(role: str, given: Logits) -> _Side:
    if isinstance(given, LinearHead):
        tensors, vocab, leading = given.tensors(), given.vocab_size, given.leading_shape
        logit_map = LogitMap(float(given.logit_scale), float(given.softcap or 0.0))
    elif isinstance(given, Tensor):
        if given.dim() < 1:
            raise ValueError(f"{role} logits need a vocabulary dimension, got a scalar")
        tensors, vocab, leading, logit_map = [given], given.shape[-1], given.shape[:-1], LogitMap()
    else:
        sparse = " or a kd.SparseTarget" if role == "teacher" else ""
        raise TypeError(f"{role} must be a Tensor of logits or a kd.LinearHead{sparse}, got {type(given)}")
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{role} needs fp64, fp32, bf16 or fp16, got {tensor.dtype}")
    if vocab == 0:
        raise ValueError(f"{role} has an empty vocabulary: shape {tuple(tensors[0].shape)}")
    return _Side(tensors, logit_map, leading, vocab)


def _check_tensor(name: str, given: Any) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(given)}")


def _vocab(student: _Side, teacher: Optional[_Side], vocab_size: Optional[int]) -> int:
    sizes = [student.vocab] + ([] if teacher is None else [teacher.vocab])
    if vocab_size is not None:
        _check_integer("vocab_size", vocab_size)
        if not 0 < vocab_size <= min(sizes):
            raise ValueError(f"vocab_size={vocab_size} must be in 1..{min(sizes)} (vocabularies {sizes})")
        return vocab_size
    if len(set(sizes)) > 1:
        raise ValueError(
            f"student has vocabulary {sizes[0]}, teacher {sizes[1]}; if they share a tokenizer "
            "and one is padded, pass vocab_size=<the tokenizer's size>"
        )
    return sizes[0]


def _check_sides(student: _Side, teacher: _Side) -> None:
    if student.leading != teacher.leading:
        raise ValueError(f"student has tokens {tuple(student.leading)}, teacher {tuple(teacher.leading)}")
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device}, teacher on {teacher.device}")


def _target_side(target: SparseTarget, student: _Side, labels: Optional[Tensor], vocab: int,
                 spec: Spec) -> _Side:  # fmt: skip
    if target.values.dtype not in _DTYPES:
        raise ValueError(f"SparseTarget needs fp64, fp32, bf16 or fp16, got {target.values.dtype}")
    values = target.values.detach().reshape(-1, target.slots)
    side = _Side([target.ids, values], LogitMap(), target.leading_shape, vocab)
    _check_sides(student, side)
    ids = ops.checked_target(target.ids, values, target.mask, labels, vocab, spec.to_floats())
    return replace(side, tensors=[ids, values])


def _check_labels(labels: Tensor, student: _Side, vocab: int, ignore_index: int) -> Tensor:
    _check_tensor("labels", labels)
    if labels.shape != student.leading:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, the student's tokens {tuple(student.leading)}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if labels.device != student.device:
        raise ValueError(f"labels are on {labels.device}, student on {student.device}")
    return ops.checked_labels(labels, vocab, ignore_index)


def _token_weights(token_weights: Optional[Tensor], student: _Side, dtype: torch.dtype) -> Tensor:
    if token_weights is None:
        return torch.ones(student.leading.numel(), dtype=dtype, device=student.device)
    _check_tensor("token_weights", token_weights)
    if token_weights.is_complex():
        raise ValueError(f"token_weights must be real numbers, got {token_weights.dtype}")
    if token_weights.shape != student.leading:
        raise ValueError(
            f"token_weights have shape {tuple(token_weights.shape)}, the student's tokens "
            f"{tuple(student.leading)}"
        )
    if token_weights.device != student.device:
        raise ValueError(f"token_weights are on {token_weights.device}, student on {student.device}")
    return token_weights.detach().reshape(-1).to(dtype)


def _scale(reduction: str, num_items: Union[int, float, Tensor, None], labels: Optional[Tensor],
           weights: Tensor, leading: torch.Size) -> Union[Tensor, float]:  # fmt: skip
    """What a token's loss is multiplied by in the reduction."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; there are {', '.join(_REDUCTIONS)}")
    if num_items is not None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"num_items divides the sum; it contradicts reduction={reduction!r}")
        if isinstance(num_items, Tensor):
            if num_items.numel() != 1:
                raise ValueError(f"num_items must be one number, got a tensor {tuple(num_items.shape)}")
            # A batch that is masked everywhere has 0 items: no token, so any divisor but 0 does.
            return 1.0 / (num_items.reshape(()).double() + (weights == 0).all())
        _check_number("num_items", num_items)
        if not num_items > 0:
            raise ValueError(f"num_items must be > 0, got {num_items}")
        return 1.0 / num_items
    if reduction == "mean":
        if labels is None:
            return 1.0 / max(leading.numel(), 1)
        return 1.0 / (labels >= 0).sum().clamp(min=1).double()
    if reduction == "batchmean":
        return 1.0 / max(leading[0] if leading else 1, 1)
    return 1.0


def _check_number(name: str, given: Any) -> None:
    if given is None or isinstance(given, str):
        raise TypeError(f"{name} must be a number, got {given!r}")
    if isinstance(given, Tensor) and given.requires_grad:
        raise ValueError(f"{name} requires grad, but it is a constant here and would get none; detach it")


def _check_integer(name: str, given: Any) -> None:
    if given is None or isinstance(given, (str, float)):
        raise TypeError(f"{name} must be an int, got {given!r}")


def _check_numbers(spec: Spec, labels: Optional[Tensor], chunk_bytes: int) -> None:
    for name in ("temperature", "soft_weight", "hard_weight", "label_smoothing", "z_loss"):
        _check_number(name, getattr(spec, name))
    _check_integer("chunk_bytes", chunk_bytes)
    if not 0 < spec.temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {spec.temperature}")
    if not chunk_bytes > 0:
        raise ValueError(f"chunk_bytes must be > 0, got {chunk_bytes}")
    if spec.hard_weight and labels is None:
        raise ValueError(f"hard_weight={spec.hard_weight} needs labels")
    if not 0.0 <= spec.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {spec.label_smoothing}")
    if (spec.label_smoothing or spec.z_loss) and not spec.hard_weight:
        raise ValueError(
            f"label_smoothing={spec.label_smoothing} and z_loss={spec.z_loss} belong to the hard "
            "term, but hard_weight=0"
        )


def _prepare(student: Logits, teacher: Optional[Teacher], labels: Optional[Tensor], spec: Spec, *,
             token_weights: Optional[Tensor], reduction: str,
             num_items: Union[int, float, Tensor, None], ignore_index: int,
             vocab_size: Optional[int], chunk_bytes: Optional[int]) -> _Call:  # fmt: skip
    chunk_bytes = DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    _check_integer("ignore_index", ignore_index)
    _check_numbers(spec, labels, chunk_bytes)
    s = _side("student", student)
    t = None if teacher is None or isinstance(teacher, SparseTarget) else _side("teacher", teacher)
    vocab = _vocab(s, t, vocab_size)
    if t is not None:
        _check_sides(s, t)
        spec = spec._replace(teacher_map=t.logit_map)
    spec = spec._replace(student_map=s.logit_map)
    if labels is not None:
        labels = _check_labels(labels, s, vocab, ignore_index)
    if isinstance(teacher, SparseTarget):
        spec = spec._replace(tail=teacher.tail, linear=teacher.logprobs is None)
        t = _target_side(teacher, s, labels, vocab, spec)
    dtype = torch.float64 if s.tensors[0].dtype == torch.float64 else torch.float32
    weights = _token_weights(token_weights, s, dtype)
    if labels is not None:
        weights = torch.where(labels >= 0, weights, 0.0)
    scale = _scale(reduction, num_items, labels, weights, s.leading)
    return _Call(s, t, labels, weights, scale, spec, vocab, chunk_bytes, reduction)


def _wants(tensors: list[Tensor]) -> list[bool]:
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("kdkernels has no forward-mode derivative; kd.use_backend('reference') has")
    return [torch.is_grad_enabled() and t.requires_grad for t in tensors]


def _check_inplace(call: _Call) -> None:
    if call.student.is_head:
        raise ValueError("inplace=True overwrites the student's logits, but student is a LinearHead")
    logits = call.student.tensors[0]
    if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride())):
        raise ValueError("inplace=True needs logits of their own memory, but student is expanded")
    # A compiler cannot look behind a view; it functionalises the write, so nothing is lost there.
    source = logits if torch.compiler.is_compiling() or logits._base is None else logits._base
    if source.is_leaf and source.requires_grad:
        raise ValueError(
            "inplace=True would overwrite a leaf tensor that requires grad; pass the output of the "
            "lm_head, or inplace=False"
        )


def _run(call: _Call, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """(loss, per-row results), attached to the student."""
    wants = _wants(call.student.tensors)
    if inplace and any(wants):
        _check_inplace(call)
    if call.per_row:
        rows, results = _rows_with_grad(call, wants, inplace)
        if call.reduction == "none":
            return rows.reshape(call.student.leading), results
        return (rows * call.scale).sum().to(rows.dtype), results
    weights = (call.weights * call.scale).to(call.weights.dtype)
    results, gradients = _rows(call, weights, wants, inplace)
    value = ops.row_loss(results, weights.double(), call.spec).sum().to(weights.dtype)
    if any(wants):
        value = ops.attach(value, ops.wanted(call.student.tensors, wants), gradients)
    return value, results


def _rows(call: _Call, weights: Tensor, wants: list[bool], inplace: bool,
          teacher_wants: Optional[list[bool]] = None) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Results and wanted gradients, outside autograd."""
    student, teacher = [t.detach() for t in call.student.tensors], call.teacher_tensors
    arguments = (teacher, call.labels, weights, call.spec.to_floats(), call.vocab, call.chunk_bytes)
    if inplace and any(wants):
        return ops.rows_(student[0], *arguments), student
    wants = wants + (teacher_wants or [False] * len(teacher))
    results, *gradients = ops.rows(student, *arguments, wants)
    return results, gradients


def _rows_with_grad(call: _Call, wants: list[bool], inplace: bool) -> tuple[Tensor, Tensor]:
    if any(wants) and call.student.is_head:
        all_wants = wants + [False] * len(call.teacher_tensors)
        value, results, _ = ops.deferred(
            call.student.tensors, call.teacher_tensors, call.labels, call.weights,
            call.spec.to_floats(), call.vocab, call.chunk_bytes, all_wants,
        )  # fmt: skip
        return value, results
    results, gradients = _rows(call, call.weights, wants, inplace)
    value = ops.row_loss(results, call.weights, call.spec)
    if any(wants):
        flat = [g.reshape(-1, g.shape[-1]) for g in gradients]
        flat_logits = [call.student.tensors[0].reshape(-1, call.student.tensors[0].shape[-1])]
        value = ops.attach(value, flat_logits, flat)
    return value, results


def _stats(call: _Call, results: Tensor) -> Stats:
    tokens = torch.full((), results.shape[0], device=results.device)
    if call.labels is not None:
        tokens = (call.labels >= 0).sum()
    means = (results.sum(0) / tokens.clamp(min=1)).to(call.weights.dtype)
    return Stats(
        soft=means[rs.SOFT],
        hard=means[rs.HARD],
        student_entropy=means[rs.STUDENT_ENTROPY],
        teacher_entropy=means[rs.TEACHER_ENTROPY],
        agreement=means[rs.AGREEMENT],
        tokens=tokens,
    )


def _soft_spec(divergence: Divergence, temperature: float, temperature_squared: bool,
               soft_weight: float, *, hard_weight: float, label_smoothing: float = 0.0,
               z_loss: float = 0.0) -> Spec:  # fmt: skip
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be a kd.Divergence such as kd.ForwardKL(), got {divergence!r}")
    if temperature_squared:
        _check_number("temperature", temperature)
        soft_weight = soft_weight * temperature * temperature
    return Spec(simplified(divergence), temperature, soft_weight, hard_weight, label_smoothing, z_loss)


def distillation_loss(
    student: Logits,
    teacher: Teacher,
    labels: Optional[Tensor] = None,
    *,
    divergence: Divergence = ForwardKL(),
    temperature: float = 1.0,
    temperature_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Optional[Tensor] = None,
    reduction: str = "mean",
    num_items: Union[int, float, Tensor, None] = None,
    ignore_index: int = -100,
    vocab_size: Optional[int] = None,
    inplace: bool = False,
    return_stats: bool = False,
    chunk_bytes: Optional[int] = None,
) -> Union[Tensor, tuple[Tensor, Stats]]:
    """soft_weight * D(teacher, student) + hard_weight * CE(labels, student), and its gradient.

    The full ``[tokens, vocab]`` logits of a LinearHead are never held, and logits that are given
    are read once. The teacher is a constant: no gradient reaches it.

    Args:
        student: logits ``[..., V]`` (fp64, fp32, bf16, fp16) or a :class:`LinearHead`.
        teacher: the same, of any dtype and width, with the same leading shape and vocabulary; or a
            :class:`SparseTarget`, whose tail says what of the teacher was not stored.
        labels: int64 ``[...]``; tokens at ``ignore_index`` leave both terms. Not shifted here.
        divergence: one of the classes in :mod:`kdkernels.divergences`.
        temperature: both distributions of the soft term are taken at logits / temperature. For a
            SparseTarget see :mod:`kdkernels.outcomes`; where it is an approximation, a warning says so.
        temperature_squared: multiply the soft term (value and gradient) by temperature^2
            (Hinton et al., 2015).
        soft_weight, hard_weight: the mix; the hard term is at temperature 1 and needs labels.
        label_smoothing, z_loss: of the hard term, as in :func:`cross_entropy`.
        token_weights: ``[...]``, multiplies each token's loss; does not enter the mean's divisor. A
            constant, as the teacher is.
        reduction: "none" (``[...]``), "sum", "mean" (over unmasked tokens) or "batchmean"
            (F.kl_div's: sum / size(0)). All masked or empty gives 0 with a zero gradient.
        num_items: divide the sum by this instead: the tokens of a whole accumulated batch.
        vocab_size: use only the first entries of both vocabularies (padding cut off).
        inplace: the student's logits are overwritten with their gradient.
        return_stats: also return :class:`Stats`.
        chunk_bytes: budget of the logit tiles, default 512 MiB.

    Returns:
        The loss in fp32 (fp64 for fp64 students), or (loss, stats).

    Raises:
        ValueError: shapes, dtypes, devices, labels or numbers that do not fit; the message names
            them. RuntimeError from a second backward without ``retain_graph=True``.

    >>> import torch, kdkernels as kd
    >>> head = kd.LinearHead(torch.randn(4, 8, requires_grad=True), torch.randn(100, 8))
    >>> kd.distillation_loss(head, torch.randn(4, 100), temperature=2.0).backward()
    """
    spec = _soft_spec(divergence, temperature, temperature_squared, soft_weight,
                      hard_weight=hard_weight, label_smoothing=label_smoothing,
                      z_loss=z_loss)  # fmt: skip
    if teacher is None:
        raise TypeError("distillation_loss needs a teacher, got None; kd.cross_entropy has none")
    if isinstance(teacher, SparseTarget):
        check_divergence(teacher.tail, divergence)
    call = _prepare(student, teacher, labels, spec, token_weights=token_weights,
                    reduction=reduction, num_items=num_items, ignore_index=ignore_index,
                    vocab_size=vocab_size, chunk_bytes=chunk_bytes)  # fmt: skip
    if reference_asked():
        loss, results = reference.run(student, teacher, call, divergence)
    else:
        loss, results = _run(call, inplace)
    return (loss, _stats(call, results.detach())) if return_stats else loss


def codistillation_loss(
    student: Logits,
    teacher: Logits,
    labels: Tensor,
    *,
    divergence: Divergence = ForwardKL(),
    temperature: float = 1.0,
    temperature_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 1.0,
    token_weights: Optional[Tensor] = None,
    reduction: str = "mean",
    num_items: Union[int, float, Tensor, None] = None,
    ignore_index: int = -100,
    vocab_size: Optional[int] = None,
    return_stats: bool = False,
    chunk_bytes: Optional[int] = None,
) -> Union[CodistillationLoss, tuple[CodistillationLoss, Stats]]:
    """Both models' losses from one pass over each model's logits.

    The teacher's loss is its own cross entropy; the student's is ``soft_weight * D +
    hard_weight * CE`` against the detached teacher. A teacher's tile is projected once and serves
    both. Arguments and errors as in :func:`distillation_loss`.

    With ``reduction="none"`` or fp16 models the two losses are taken in two passes.

    >>> import torch, kdkernels as kd
    >>> s, t = (torch.randn(4, 100, requires_grad=True) for _ in range(2))
    >>> losses = kd.codistillation_loss(s, t, torch.tensor([1, 2, -100, 3]))
    >>> (losses.student + losses.teacher).backward()
    """
    spec = _soft_spec(divergence, temperature, temperature_squared, soft_weight,
                      hard_weight=hard_weight)  # fmt: skip
    shared: dict[str, Any] = dict(token_weights=token_weights, reduction=reduction, num_items=num_items,
                  ignore_index=ignore_index, vocab_size=vocab_size,
                  chunk_bytes=chunk_bytes)  # fmt: skip
    if teacher is None or isinstance(teacher, SparseTarget):
        kind = "None" if teacher is None else "a kd.SparseTarget"
        raise TypeError(f"codistillation_loss trains its teacher, so it cannot be {kind}")
    if labels is None:
        raise ValueError("codistillation_loss needs labels: the teacher's loss is its cross entropy")
    call = _prepare(student, teacher, labels, spec, **shared)
    if reference_asked():
        student_loss, results = reference.run(student, teacher, call, divergence)
        losses = CodistillationLoss(student_loss, cross_entropy(teacher, labels, **shared))
    elif call.per_row or call.teacher_tensors[0].dtype == torch.float16:
        vocab = {**shared, "vocab_size": call.vocab}
        student_loss, results = _run(call)
        losses = CodistillationLoss(student_loss, cross_entropy(teacher, labels, **vocab))
    else:
        losses, results = _run_both(call)
    return (losses, _stats(call, results.detach())) if return_stats else losses


def _run_both(call: _Call) -> tuple[CodistillationLoss, Tensor]:
    """Both losses from one pass, each attached to its model, and the per-row results."""
    call = replace(call, spec=call.spec._replace(teacher_hard_weight=1.0))
    assert call.teacher is not None
    own, teachers = call.student.tensors, call.teacher.tensors
    wants, teacher_wants = _wants(own), _wants(teachers)
    weights = (call.weights * call.scale).to(call.weights.dtype)
    results, gradients = _rows(call, weights, wants, False, teacher_wants)
    wide = weights.double()
    student_loss = ops.row_loss(results, wide, call.spec).sum().to(weights.dtype)
    teacher_loss = (results[:, rs.TEACHER_HARD] * wide).sum().to(weights.dtype)
    split = sum(wants)
    if split:
        student_loss = ops.attach(student_loss, ops.wanted(own, wants), gradients[:split])
    if any(teacher_wants):
        teacher_loss = ops.attach(teacher_loss, ops.wanted(teachers, teacher_wants), gradients[split:])
    return CodistillationLoss(student_loss, teacher_loss), results


def cross_entropy(
    student: Logits,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Optional[Tensor] = None,
    reduction: str = "mean",
    num_items: Union[int, float, Tensor, None] = None,
    ignore_index: int = -100,
    vocab_size: Optional[int] = None,
    inplace: bool = False,
    chunk_bytes: Optional[int] = None,
) -> Tensor:
    """``F.cross_entropy`` from logits or a :class:`LinearHead`, with ``z_loss * logsumexp^2`` (PaLM).

    ``label_smoothing`` is F.cross_entropy's. Other arguments and errors as in
    :func:`distillation_loss`.

    >>> import torch, kdkernels as kd
    >>> logits = torch.randn(3, 10)
    >>> labels = torch.tensor([1, -100, 2])
    >>> ours, theirs = kd.cross_entropy(logits, labels), torch.nn.functional.cross_entropy(logits, labels)
    >>> bool(torch.isclose(ours, theirs))
    True
    """
    spec = Spec(NoDivergence(), soft_weight=0.0, hard_weight=1.0,
                label_smoothing=label_smoothing, z_loss=z_loss)  # fmt: skip
    call = _prepare(student, None, labels, spec, token_weights=token_weights,
                    reduction=reduction, num_items=num_items, ignore_index=ignore_index,
                    vocab_size=vocab_size, chunk_bytes=chunk_bytes)  # fmt: skip
    if reference_asked():
        return reference.run(student, None, call, NoDivergence())[0]
    return _run(call, inplace)[0]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Optional[Tensor] = None,
                         **options) -> Tensor:  # fmt: skip
    """:func:`cross_entropy` of ``LinearHead(hidden, weight, bias)``; options are cross_entropy's.

    >>> import torch, kdkernels as kd
    >>> loss = kd.linear_cross_entropy(torch.randn(3, 8), torch.randn(10, 8), torch.tensor([1, 2, 3]))
    """
    return cross_entropy(LinearHead(hidden, weight, bias), labels, **options)


def kl_div(student: Logits, teacher: Teacher, labels: Optional[Tensor] = None, **options):
    """Forward KL(teacher || student): :func:`distillation_loss` under its common name.

    Takes logits, not log-probabilities. ``reduction="batchmean"`` divides as F.kl_div's does.

    >>> import torch, kdkernels as kd
    >>> s, t = torch.randn(4, 10), torch.randn(4, 10)
    >>> theirs = torch.nn.functional.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    >>> bool(torch.isclose(kd.kl_div(s, t, reduction="batchmean"), theirs, atol=1e-6))
    True
    """
    return distillation_loss(student, teacher, labels, divergence=ForwardKL(), **options)


def js_divergence(student: Logits, teacher: Teacher, labels: Optional[Tensor] = None, *,
                  beta: float = 0.5, **options):  # fmt: skip
    """Generalised Jensen-Shannon divergence :class:`JSD` (beta): options as distillation_loss's.

    >>> import torch, kdkernels as kd
    >>> loss = kd.js_divergence(torch.randn(4, 10), torch.randn(4, 10), beta=0.5)
    """
    return distillation_loss(student, teacher, labels, divergence=JSD(beta), **options)


def explain(student: Logits, teacher: Optional[Teacher] = None) -> str:
    """Which backend serves these inputs, and why those before it do not.

    >>> import torch, kdkernels as kd
    >>> kd.explain(torch.randn(2, 5, dtype=torch.float64)).splitlines()[-1]
    'eager: serves this call'
    """
    if reference_asked():
        return "reference: serves this call"
    sides = [_side("student", student)]
    entry = "fused_sparse" if isinstance(teacher, SparseTarget) else "fused"
    if teacher is not None and not isinstance(teacher, SparseTarget):
        sides.append(_side("teacher", teacher))
    dtypes = [side.tensors[0].dtype for side in sides]
    lines = []
    for module, reason in candidates(chosen_backend(), sides[0].device, dtypes, entry):
        lines.append(f"{module.name}: {reason or 'serves this call'}")
        if reason is None:
            break
    return "\n".join(lines)
