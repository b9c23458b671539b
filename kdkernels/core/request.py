"""What the public losses are given: checked once, and packed into one :class:`Call` for the operators."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Callable, Optional, Union

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ..backends import reference_asked
from ..backends.outcomes import check_divergence
from ..backends.spec import LogitMap, Spec
from ..checks import (
    DTYPES,
    check_constant,
    check_one_number,
    check_tensor,
    flag,
    integer,
    number,
    positive_integer,
    shown,
)
from ..divergences import JSD, Divergence, NoDivergence, simplified
from ..heads import LinearHead, MappedLogits
from ..targets import SparseTarget
from . import autograd
from .schedule import DEFAULT_CHUNK_BYTES

Logits = Union[Tensor, LinearHead, MappedLogits]
Teacher = Union[Logits, SparseTarget]
REDUCTIONS = ("none", "sum", "mean", "batchmean")


@dataclass(frozen=True)
class Side:
    """One model's tensors: logits, or hidden, weight and bias; or a sparse target's ids and values."""

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
class Call:
    """A checked call: what goes to the operators."""

    student: Side
    teacher: Optional[Side]
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


# Single options: each is checked by its name, wherever it is given.


def _divergence(name: str, given: Any) -> Divergence:
    if not isinstance(given, Divergence):
        raise TypeError(f"{name} must be a kd.Divergence such as kd.ForwardKL(), got {shown(given)}")
    given.check()
    return given


def _temperature(name: str, given: Any) -> float:
    given = number(name, given)
    if not given > 0:
        raise ValueError(f"{name} must be > 0 and finite, got {given}")
    return given


def _label_smoothing(name: str, given: Any) -> float:
    given = number(name, given)
    if not 0.0 <= given <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {given}")
    return given


def _reduction(name: str, given: Any) -> str:
    if given not in REDUCTIONS:
        raise ValueError(f"unknown {name} {shown(given)}; there are {', '.join(REDUCTIONS)}")
    return given


def _num_items(name: str, given: Any) -> Union[int, float, Tensor, None]:
    if isinstance(given, Tensor):
        check_one_number(name, given)
        return given  # its value is looked at where that waits for nothing
    if given is not None and not number(name, given) > 0:
        raise ValueError(f"{name} must be > 0, got {given}")
    return given


def _optional(check: Callable[[str, Any], int]) -> Callable[[str, Any], Optional[int]]:
    return lambda name, given: None if given is None else check(name, given)


_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "divergence": _divergence,
    "beta": lambda name, given: JSD(given),
    "temperature": _temperature,
    "temperature_squared": flag,
    "soft_weight": number,
    "hard_weight": number,
    "label_smoothing": _label_smoothing,
    "z_loss": number,
    "reduction": _reduction,
    "num_items": _num_items,
    "ignore_index": integer,
    "vocab_size": _optional(positive_integer),
    "inplace": flag,
    "return_stats": flag,
    "chunk_bytes": _optional(positive_integer),
}


def checked(**options) -> dict[str, Any]:
    """The same options, each checked by what its name stands for."""
    return {name: _OPTIONS[name](name, given) for name, given in options.items()}


def check_options(options: dict[str, Any]) -> None:
    """Those of them that are not one tensor for each call."""
    checked(**{name: given for name, given in options.items() if name in _OPTIONS})


def soft_spec(
    divergence: Divergence,
    temperature: float,
    temperature_squared: bool,
    soft_weight: float,
    *,
    hard_weight: float,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Spec:
    """What the options of a distillation loss mean for a row."""
    given = checked(
        divergence=divergence,
        temperature=temperature,
        temperature_squared=temperature_squared,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    if given.pop("temperature_squared"):
        given["soft_weight"] *= given["temperature"] * given["temperature"]
    return Spec(simplified(given.pop("divergence")), **given)


def hard_spec(label_smoothing: float, z_loss: float) -> Spec:
    """The cross entropy alone."""
    return Spec(
        NoDivergence(),
        soft_weight=0.0,
        hard_weight=1.0,
        **checked(label_smoothing=label_smoothing, z_loss=z_loss),
    )


# What depends on several arguments.


def side(role: str, given: Logits) -> Side:
    """The model's side of a call, its tensors as they are."""
    if isinstance(given, (LinearHead, MappedLogits)):
        tensors, vocab, leading = given.tensors(), given.vocab_size, given.leading_shape
        logit_map = LogitMap(given.logit_scale, given.softcap or 0.0)
    elif isinstance(given, Tensor):
        check_tensor(f"{role} logits", given)
        if given.dim() < 1:
            raise ValueError(f"{role} logits need a vocabulary dimension, got a scalar")
        tensors, vocab, leading, logit_map = [given], given.shape[-1], given.shape[:-1], LogitMap()
    else:
        sparse = " or a kd.SparseTarget" if role == "teacher" else ""
        raise TypeError(f"{role} must be a Tensor of logits or a kd.LinearHead{sparse}, got {shown(given)}")
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{role} needs fp64, fp32, bf16 or fp16, got {tensor.dtype}")
    if vocab == 0:
        raise ValueError(f"{role} has an empty vocabulary: shape {tuple(tensors[0].shape)}")
    return Side(tensors, logit_map, leading, vocab)


def common_vocab(student: Side, teacher: Optional[Side], vocab_size: Optional[int]) -> int:
    sizes = [student.vocab] + ([] if teacher is None else [teacher.vocab])
    if vocab_size is not None:
        if vocab_size > min(sizes):
            raise ValueError(f"vocab_size={vocab_size} must be in 1..{min(sizes)} (vocabularies {sizes})")
        return vocab_size
    if len(set(sizes)) > 1:
        raise ValueError(
            f"student has vocabulary {sizes[0]}, teacher {sizes[1]}; if they share a tokenizer "
            "and one is padded, pass vocab_size=<the tokenizer's size>"
        )
    return sizes[0]


def _refuse_transforms(tensors: list[Tensor]) -> None:
    """What cannot see through an operator; torch's own errors would not say whose operator it is."""
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record kdkernels; torch.export.export and torch.compile can"
        )
    if reference_asked():
        return
    if any(unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("kdkernels has no forward-mode derivative; kd.use_backend('reference') has")
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        raise RuntimeError(
            "torch.func (grad, vmap, jacrev, ...) cannot transform kdkernels' operators; use torch.autograd.grad, "
            "which takes is_grads_batched=True, and leading dimensions for vmap's, or kd.use_backend('reference')"
        )


def _check_sides(student: Side, teacher: Side) -> None:
    if student.leading != teacher.leading:
        raise ValueError(f"student has tokens {tuple(student.leading)}, teacher {tuple(teacher.leading)}")
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device}, teacher on {teacher.device}")


def _target_side(
    target: SparseTarget, student: Side, labels: Optional[Tensor], vocab: int, spec: Spec
) -> Side:
    if target.values.dtype not in DTYPES:
        raise ValueError(f"SparseTarget needs fp64, fp32, bf16 or fp16, got {target.values.dtype}")
    values = target.values.detach().reshape(-1, target.slots)
    given = Side([target.ids, values], LogitMap(), target.leading_shape, vocab)
    _check_sides(student, given)
    ids = autograd.checked_target(target.ids, values, target.mask, labels, vocab, spec.to_floats())
    return replace(given, tensors=[ids, values])


def _check_per_token(name: str, given: Any, student: Side) -> None:
    check_tensor(name, given)
    if given.shape != student.leading:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}, the student's tokens {tuple(student.leading)}"
        )
    if given.device != student.device:
        raise ValueError(f"{name} is on {given.device}, student on {student.device}")


def _check_labels(labels: Any, student: Side) -> None:
    check_tensor("labels", labels)
    if labels.is_floating_point() and labels.dim() > len(student.leading):
        raise ValueError(
            f"labels must be int64 class ids, got {labels.dtype} {tuple(labels.shape)}; "
            "probabilities are a teacher: kd.kl_div(student, probabilities.log())"
        )
    if labels.dtype == torch.bool:
        raise ValueError("labels must be int64 class ids, got torch.bool; a mask of tokens goes in mask=")
    _check_per_token("labels", labels, student)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")


def _check_mask(mask: Any, student: Side) -> None:
    _check_per_token("mask", mask, student)
    check_constant("mask", mask)
    if mask.is_complex():
        raise ValueError(f"mask must be bool or hold 0 and 1, got {mask.dtype}")


def _live_labels(
    labels: Optional[Tensor], mask: Optional[Tensor], student: Side, vocab: int, ignore_index: int
) -> Optional[Tensor]:
    """int64 ``[N]``, -1 where a token takes no part; None where all do and nobody gave a label."""
    if labels is not None:
        _check_labels(labels, student)
    if mask is not None:
        _check_mask(mask, student)
    if labels is None and mask is None:
        return None
    return autograd.checked_labels(labels, mask, vocab, ignore_index)


def _token_weights(token_weights: Any, student: Side, dtype: torch.dtype) -> Tensor:
    if token_weights is None:
        return torch.ones(math.prod(student.leading), dtype=dtype, device=student.device)
    _check_per_token("token_weights", token_weights, student)
    check_constant("token_weights", token_weights)
    if token_weights.is_complex():
        raise ValueError(f"token_weights must be real numbers, got {token_weights.dtype}")
    return token_weights.reshape(-1).to(dtype)


def _class_weights(class_weights: Any, labels: Tensor, spec: Spec, vocab: int, dtype: torch.dtype) -> Tensor:
    """What each token's class weighs, ``[N]``; 0 where it is masked."""
    check_tensor("class_weights", class_weights)
    check_constant("class_weights", class_weights)
    if class_weights.shape != (vocab,) or not class_weights.is_floating_point():
        raise ValueError(
            f"class_weights must be floating [V] = ({vocab},), got {class_weights.dtype} {tuple(class_weights.shape)}"
        )
    if class_weights.device != labels.device:
        raise ValueError(f"class_weights is on {class_weights.device}, student on {labels.device}")
    if spec.label_smoothing:
        raise ValueError(
            f"class_weights with label_smoothing={spec.label_smoothing} weigh every class of every token, "
            "which one pass does not; use torch.nn.functional.cross_entropy"
        )
    return torch.where(labels >= 0, class_weights.to(dtype)[labels.clamp(min=0)], 0.0)


def _check_items(num_items: Tensor, device: torch.device) -> None:
    if num_items.device.type != "cpu" and num_items.device != device:
        raise ValueError(f"num_items is on {num_items.device}, student on {device}")


def _scale(
    reduction: str,
    num_items: Union[int, float, Tensor, None],
    labels: Optional[Tensor],
    weights: Tensor,
    leading: torch.Size,
    classes: Optional[Tensor],
) -> Union[Tensor, float]:
    """What a token's loss is multiplied by in the reduction."""
    if num_items is not None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"num_items divides the sum; it contradicts reduction={reduction!r}")
        if isinstance(num_items, Tensor):
            _check_items(num_items, weights.device)
            return 1.0 / autograd.checked_items(num_items.reshape(()), weights)
        return 1.0 / num_items
    if reduction == "mean":
        if classes is not None:
            total = classes.sum(dtype=torch.float64)
            return 1.0 / torch.where(total == 0, 1.0, total)
        if labels is None:
            return 1.0 / max(math.prod(leading), 1)
        return 1.0 / (labels >= 0).sum().clamp(min=1).double()
    if reduction == "batchmean":
        return 1.0 / max(leading[0] if leading else 1, 1)
    return 1.0


def _check_spec(spec: Spec, labels: Optional[Tensor]) -> None:
    if spec.hard_weight and labels is None:
        raise ValueError(f"hard_weight={spec.hard_weight} needs labels")
    if (spec.label_smoothing or spec.z_loss) and not spec.hard_weight:
        raise ValueError(
            f"label_smoothing={spec.label_smoothing} and z_loss={spec.z_loss} belong to the hard "
            "term, but hard_weight=0"
        )


def prepare(
    student: Logits,
    teacher: Optional[Teacher],
    labels: Optional[Tensor],
    spec: Spec,
    *,
    mask: Optional[Tensor],
    token_weights: Optional[Tensor],
    class_weights: Optional[Tensor] = None,
    reduction: str,
    num_items: Union[int, float, Tensor, None],
    ignore_index: int,
    vocab_size: Optional[int],
    chunk_bytes: Optional[int],
) -> Call:
    """The call that these arguments describe; an error where they describe none."""
    given = checked(
        reduction=reduction,
        num_items=num_items,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        chunk_bytes=DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes,
    )
    _check_spec(spec, labels)
    s = side("student", student)
    t = None if teacher is None or isinstance(teacher, SparseTarget) else side("teacher", teacher)
    _refuse_transforms(s.tensors if t is None else s.tensors + t.tensors)
    vocab = common_vocab(s, t, given["vocab_size"])
    if t is not None:
        _check_sides(s, t)
        spec = spec._replace(teacher_map=t.logit_map)
    spec = spec._replace(student_map=s.logit_map)
    live = _live_labels(labels, mask, s, vocab, given["ignore_index"])
    if isinstance(teacher, SparseTarget):
        check_divergence(teacher.tail, spec.divergence)
        spec = spec._replace(tail=teacher.tail, linear=teacher.logprobs is None)
        t = _target_side(teacher, s, live, vocab, spec)
    dtype = torch.float64 if s.tensors[0].dtype == torch.float64 else torch.float32
    weights = _token_weights(token_weights, s, dtype)
    if live is not None:
        weights = torch.where(live >= 0, weights, 0.0)
    classes: Optional[Tensor] = None
    if class_weights is not None and live is not None:
        classes = _class_weights(class_weights, live, spec, vocab, dtype)
        weights = weights * classes
    scale = _scale(given["reduction"], given["num_items"], live, weights, s.leading, classes)
    return Call(s, t, live, weights, scale, spec, vocab, given["chunk_bytes"], given["reduction"])
