"""What the public losses are given, and the record of one checked call that everything below them reads."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..backends.spec import OUTPUTS, Asked, Output, Spec, specs_of, text_of
from ..divergences import Divergence, NoDivergence
from ..dtypes import widest
from . import shards
from .option_checks import Number, checked


@dataclass(frozen=True)
class Terms:
    """What of a row the loss is made of; the options' meaning is that of :func:`kdkernels.distillation_loss`."""

    divergences: tuple[Divergence, ...]  # checked, in their simplest form; a loss of the same models for each
    temperature: Number = 1.0
    temperature_squared: bool = False
    soft_weight: Number = 0.0
    hard_weight: Number = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    return_stats: bool = False
    entropy_weight: Number = 0.0
    teacher_learns: bool = False  # co-distillation: the teacher's own cross entropy, with its gradient

    def checked(self) -> Terms:
        """The same with its options checked."""
        return replace(self, **checked(**{name: getattr(self, name) for name in _CHECKED}))

    @property
    def has_hard_term(self) -> bool:
        return may_count(self.hard_weight)

    def check_labels(self, labels: Any) -> None:
        if self.has_hard_term and labels is None:
            weight = "a tensor" if isinstance(self.hard_weight, Tensor) else self.hard_weight
            raise ValueError(f"hard_weight={weight} needs labels")
        if (self.label_smoothing or self.z_loss) and not self.has_hard_term:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} and z_loss={self.z_loss} belong to the hard "
                "term, but hard_weight=0; to anneal the weight to 0, give it as a tensor"
            )

    @property
    def asked(self) -> int:
        """The outputs that the loss or its statistics are made of."""
        asked = 0
        if self.divergences[0].kind and (may_count(self.soft_weight) or self.return_stats):
            asked |= Asked.SOFT
        if self.has_hard_term:
            asked |= Asked.LABEL
            asked |= Asked.SMOOTH if self.label_smoothing else 0
            asked |= Asked.LSE_SQUARED if self.z_loss else 0
        asked |= Asked.ENTROPY if may_count(self.entropy_weight) else 0
        return asked | (Asked.TEACHER_LABEL if self.teacher_learns else 0)


def may_count(weight: Number) -> bool:
    """A tensor may: what it holds is not looked at."""
    return isinstance(weight, Tensor) or weight != 0


#: What option_checks knows by these names.
_CHECKED = tuple(field.name for field in fields(Terms) if field.name not in ("divergences", "teacher_learns"))


@dataclass(frozen=True)
class Tokens:
    """What is given for each token; ``reduction`` and ``num_items`` say how their losses become one."""

    labels: Tensor | None = None
    mask: Tensor | None = None
    token_weights: Tensor | None = None
    class_weights: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    num_items: int | float | Tensor | None = None

    def checked(self) -> Tokens:
        if self.num_items is not None and self.reduction not in ("sum", "mean"):
            checked(reduction=self.reduction)
            raise ValueError(f"num_items divides the sum; it contradicts reduction={self.reduction!r}")
        names = ("ignore_index", "reduction", "num_items")
        return replace(self, **checked(**{name: getattr(self, name) for name in names}))


@dataclass(frozen=True)
class Limits:
    """How much of the vocabulary, of memory and of exactness a call takes."""

    vocab_size: int | None = None
    chunk_bytes: int | None = None
    gradient_tolerance: float = 0.0

    def checked(self) -> Limits:
        names = ("vocab_size", "chunk_bytes", "gradient_tolerance")
        return replace(self, **checked(**{name: getattr(self, name) for name in names}))


def loss_dtype(tensors: list[Tensor]) -> torch.dtype:
    """The dtype of a loss of these tensors: fp64 if one of them is, else fp32."""
    return widest(t.dtype for t in tensors)


@dataclass(frozen=True)
class Reducer:
    """How the rows' losses become what the caller gets."""

    name: str
    scale: Tensor | float | None  # what each is multiplied by in the sum; None where its weights already are
    leading: torch.Size
    dtype: torch.dtype
    #: Whether tokens' losses meet autograd one by one: asked for, or fp16, whose gradients of a mean would
    #: underflow before a GradScaler's factor arrives in the backward.
    per_row: bool

    def of(self, tensors: list[Tensor]) -> Reducer:
        """The same for the loss of another model, whose ``tensors`` these are."""
        return replace(self, dtype=loss_dtype(tensors))

    def apply(self, rows: Tensor) -> Tensor:
        """The rows' losses ``[N]`` as one, or as ``[...]``."""
        if self.name == "none":
            return rows.reshape(self.leading).to(self.dtype)
        return (rows if self.scale is None else rows * self.scale).sum().to(self.dtype)


@dataclass(frozen=True)
class Request:
    """A checked call: the operators' arguments, in their order.

    ``weights`` ``[N, OUTPUTS]`` fp64 are what each row's outputs are multiplied by: token weights, the terms'
    weights, T^2 and, unless token losses meet autograd, the reduction's scale. ``labels`` are -1 where a token
    takes no part. A teacher with ``spec.tail`` is a sparse target's ids and values. The ``specs`` of D losses of the
    same models differ in the divergence alone; their weights stand side by side, ``[N, D * OUTPUTS]``.
    """

    student: list[Tensor]
    teacher: list[Tensor]
    labels: Tensor | None
    temperature: Tensor  # fp64 [N], or [1] for all
    parameters: Tensor  # fp64 [D, P], each divergence's numbers
    weights: Tensor
    specs: tuple[Spec, ...]
    vocab: int
    shard: str  # :class:`shards.Place` as text; "": the whole vocabulary is here
    chunk_bytes: int
    needs_grad: list[bool]  # of the student's tensors, then the teacher's
    gradient_tolerance: float = 0.0  # of an lm_head's products; see core/tolerance.py
    backend: str = "auto"

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of ``kdkernels::rows``. Specs go as text, which compiled code holds as a constant."""
        return (
            self.student,
            self.teacher,
            self.labels,
            self.temperature,
            self.parameters,
            self.weights,
            text_of(self.specs),
            self.vocab,
            self.shard,
            self.chunk_bytes,
            self.needs_grad,
            self.gradient_tolerance,
        )

    @staticmethod
    def from_arguments(
        student, teacher, labels, temperature, parameters, weights, specs: str, *static, backend: str = "auto"
    ) -> Request:
        """The inverse of :meth:`arguments`."""
        # AOTInductor has None for an empty list.
        tensors = student, teacher or [], labels, temperature, parameters, weights
        return replace(Request(*tensors, specs_of(specs), *static), backend=backend)

    @property
    def spec(self) -> Spec:
        """The first, and what all of them say but for the divergence."""
        return self.specs[0]

    def each(self) -> list[Request]:
        """One for each loss."""
        given = zip(self.specs, self.parameters.split(1), self.weights.split(OUTPUTS, 1))
        return [replace(self, specs=(spec,), parameters=p, weights=w) for spec, p, w in given]

    @property
    def place(self) -> shards.Place | None:
        return shards.Place.from_text(self.shard)

    @property
    def has_all_tokens(self) -> bool:
        """Whether this rank of a shard's group has the tokens that all others have."""
        return self.place is not None and not self.place.own_tokens

    @property
    def columns_here(self) -> int:
        """How many of the vocabulary's columns are on this rank."""
        return self.vocab if self.place is None else self.place.width

    @property
    def has_head(self) -> bool:
        """Whether the student is hidden states and an lm_head."""
        return len(self.student) > 1

    @property
    def only_hidden_learns(self) -> bool:
        """Whether dH is all that is wanted of a student's lm_head. A token's dH is linear in what arrives for it, so
        it can be made in the forward. Not in fp16, where a softmax would underflow without what arrives, and not of
        shards, whose ranks sum it."""
        learns, half = self.needs_grad[: len(self.student)], self.student[0].dtype == torch.float16
        return self.has_head and learns[0] and not any(learns[1:]) and not half and not self.shard

    @property
    def tensors(self) -> list[Tensor]:
        return self.student + self.teacher

    def wanted(self) -> list[Tensor]:
        """The tensors that need a gradient."""
        return [t for t, needed in zip(self.tensors, self.needs_grad) if needed]


@dataclass(frozen=True)
class Call:
    """A request, and what of the call the operators do not see."""

    request: Request
    reducer: Reducer
    terms: Terms
    inplace: bool = False  # whether the gradient is written over the student's logits

    @property
    def student_alone(self) -> Call:
        """Co-distillation's loss of the student alone."""
        request, count = self.request, len(self.request.student)
        spec = request.spec._replace(asked=request.spec.asked & ~Asked.TEACHER_LABEL)
        teacher = request.teacher
        if not spec.asked & Asked.SOFT:
            spec, teacher = spec._replace(kind=NoDivergence.code), []
        needs_grad = request.needs_grad[:count] + [False] * len(teacher)
        return replace(self, request=replace(request, teacher=teacher, specs=(spec,), needs_grad=needs_grad))

    @property
    def teacher_alone(self) -> Call:
        """Co-distillation's loss of the teacher alone: it is a student without a teacher."""
        request, count = self.request, len(self.request.student)
        columns = [torch.zeros_like(request.weights[:, 0])] * OUTPUTS
        columns[Output.LABEL] = request.weights[:, Output.TEACHER_LABEL]
        own = replace(
            request,
            student=request.teacher,
            teacher=[],
            temperature=torch.ones_like(request.temperature),
            weights=torch.stack(columns, 1),
            specs=(
                Spec(
                    asked=Asked.LABEL,
                    student_scale=request.spec.teacher_scale,
                    student_softcap=request.spec.teacher_softcap,
                ),
            ),
            needs_grad=request.needs_grad[count:],
        )
        return replace(self, request=own, reducer=self.reducer.of(request.teacher))
