"""One call, checked once: what the public losses are given, as the record that everything below them reads."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..backends import chosen_backend, native, reference_asked
from ..backends.outcomes import check_divergence
from ..backends.spec import OUTPUTS, Asked, Output, Spec, Tail, specs_of, text_of
from ..checks import DTYPES, check_plain
from ..divergences import Divergence, NoDivergence
from ..targets import SparseTarget
from . import shards, tokens
from .checked import checked_items, checked_target
from .dtensors import unwrapped
from .option_checks import Number, checked
from .schedule import default_chunk_bytes
from .sides import Logits, Side, Teacher, check_together, common_vocab, refuse_transforms, side


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
        return _may_count(self.hard_weight)

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
        if self.divergences[0].kind and (_may_count(self.soft_weight) or self.return_stats):
            asked |= Asked.SOFT
        if self.has_hard_term:
            asked |= Asked.LABEL
            asked |= Asked.SMOOTH if self.label_smoothing else 0
            asked |= Asked.LSE_SQUARED if self.z_loss else 0
        asked |= Asked.ENTROPY if _may_count(self.entropy_weight) else 0
        return asked | (Asked.TEACHER_LABEL if self.teacher_learns else 0)


def _may_count(weight: Number) -> bool:
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


def loss_dtype(tensors: list[Tensor]) -> torch.dtype:
    """The dtype of a loss of these tensors: fp64 if one of them is, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


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


def make(
    student: Logits,
    teacher: Teacher | None,
    terms: Terms,
    tokens_given: Tokens,
    *,
    vocab_size: int | None,
    chunk_bytes: int | None,
    gradient_tolerance: float = 0.0,
) -> Call:
    """The call that these arguments describe; an error where they describe none."""
    student, teacher = unwrapped("student", student), unwrapped("teacher", teacher)
    limits = dict(vocab_size=vocab_size, chunk_bytes=chunk_bytes, gradient_tolerance=gradient_tolerance)
    checked_call = functools.partial(_checked_call, student, teacher, terms, tokens_given, limits)
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


def _checked_call(
    student: Logits,
    teacher: Teacher | None,
    terms: Terms,
    tokens_given: Tokens,
    limits: dict[str, Any],
) -> Call:
    terms, given, limits = terms.checked(), tokens_given.checked(), checked(**limits)
    terms.check_labels(given.labels)
    s = side("student", student)
    t = None if teacher is None or isinstance(teacher, SparseTarget) else side("teacher", teacher)
    refuse_transforms(s.tensors if t is None else s.tensors + t.tensors)
    s, t = shards.placed(s, t)
    vocab = common_vocab(s, t, limits["vocab_size"])
    place = shards.place(s, t, vocab)
    if t is not None:
        check_together(s, t)
    live = tokens.live_labels(given.labels, given.mask, s, vocab, given.ignore_index)
    spec = _spec(terms, s, t)
    if isinstance(teacher, SparseTarget):
        spec, t = _sparse(teacher, s, live, vocab, spec, terms.divergences[0])
    if not spec.asked & (Asked.SOFT | Asked.TEACHER_LABEL):  # nobody looks at the teacher
        spec, t = spec._replace(kind=NoDivergence.code, tail=Tail.DENSE), None
    temperature = tokens.per_row("temperature", terms.temperature, s, live)
    weights, scale = _token_weights(given, s, live, terms, vocab)
    learning = s.tensors + (t.tensors if t is not None and terms.teacher_learns else [])
    per_row = given.reduction == "none" or any(tensor.dtype == torch.float16 for tensor in learning)
    reducer = Reducer(given.reduction, scale if per_row else None, s.leading, loss_dtype(s.tensors), per_row)
    request = Request(
        student=s.tensors,
        teacher=[] if t is None else t.tensors,
        labels=live,
        temperature=temperature,
        parameters=tokens.parameters(terms.divergences, s.device),
        weights=_weights(terms, weights if per_row else weights * scale, temperature, s, live),
        specs=(spec, *(spec._replace(kind=other.kind) for other in terms.divergences[1:])),
        vocab=vocab,
        shard="" if place is None else place.text(),
        chunk_bytes=limits["chunk_bytes"] or default_chunk_bytes(s.device, vocab),
        needs_grad=_needs_grad(s, t, terms),
        gradient_tolerance=limits["gradient_tolerance"],
    )
    return Call(request, reducer, terms)


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


def _token_weights(
    given: Tokens, student: Side, live: Tensor | None, terms: Terms, vocab: int
) -> tuple[Tensor | float, Tensor | float]:
    """(each token's weight, fp64 ``[N]``, or 1.0 for all; what the reduction multiplies it by)."""
    part = None if live is None else live >= 0
    weights = tokens.token_weights(given.token_weights, student, live, part)
    classes = None
    if given.class_weights is not None:
        assert live is not None
        classes = tokens.class_weights(given.class_weights, live, terms.label_smoothing, vocab)
        weights = weights * classes
    return weights, _scale(given, part, weights, student, classes)


def _scale(
    given: Tokens, part: Tensor | None, weights: Tensor | float, student: Side, classes: Tensor | None
) -> Tensor | float:
    """``part`` is which tokens take part; None: all."""
    leading, device = student.leading, student.device
    if isinstance(given.num_items, Tensor):
        if given.num_items.device.type != "cpu" and given.num_items.device != device:
            raise ValueError(f"num_items is on {given.num_items.device}, student on {device}")
        if not isinstance(weights, Tensor):
            weights = torch.full((math.prod(leading),), weights, dtype=torch.float64, device=device)
        return checked_items(given.num_items.reshape(()), weights).reciprocal()
    if given.num_items is not None:
        return 1.0 / given.num_items
    if given.reduction == "mean":
        if classes is not None:
            total = classes.sum()
            return 1.0 / torch.where(total == 0, 1.0, total)
        if part is None:
            return _one_over(math.prod(leading), device)
        return part.sum(dtype=torch.float64).clamp(min=1).reciprocal()
    if given.reduction == "batchmean":
        return _one_over(leading[0] if leading else 1, device)
    return 1.0


def _one_over(count: int, device: torch.device) -> Tensor | float:
    """1 / count, and 1 of nothing."""
    if torch.compiler.is_exporting():  # which takes a size for 2 or more, and max() for the size
        return torch.full((), count, dtype=torch.float64, device=device).clamp(min=1).reciprocal()
    return 1.0 / max(count, 1)


def _weights(
    terms: Terms, each: Tensor | float, temperature: Tensor, student: Side, live: Tensor | None
) -> Tensor:
    """fp64 ``[N, D * OUTPUTS]``: what each token's outputs are multiplied by, whose own weight is ``each`` (``[N]`` or a number).
    Python's numbers stay such, and cost nothing, until a column is made of them."""
    columns: list[Tensor | float | None] = [None] * OUTPUTS
    if terms.asked & Asked.SOFT and _may_count(terms.soft_weight):
        soft = tokens.factor("soft_weight", terms.soft_weight, student, live)
        columns[Output.SOFT] = each * (soft * temperature.square() if terms.temperature_squared else soft)
    if terms.has_hard_term:
        hard = each * tokens.factor("hard_weight", terms.hard_weight, student, live)
        columns[Output.LABEL] = hard
        if terms.label_smoothing:
            columns[Output.LABEL] = hard * (1 - terms.label_smoothing)
            columns[Output.SMOOTH] = hard * terms.label_smoothing
        if terms.z_loss:
            columns[Output.LSE_SQUARED] = hard * terms.z_loss
    if terms.asked & Asked.ENTROPY:
        entropy = tokens.factor("entropy_weight", terms.entropy_weight, student, live)
        columns[Output.ENTROPY] = each * entropy
    if terms.teacher_learns:
        columns[Output.TEACHER_LABEL] = each
    size = math.prod(student.leading), OUTPUTS
    weights = torch.zeros(size, dtype=torch.float64, device=student.device)
    for at, column in enumerate(columns):
        if column is not None:
            weights[:, at].add_(column)  # a number stays a symbol in compiled code, as in tokens.constants
    return weights if len(terms.divergences) == 1 else weights.repeat(1, len(terms.divergences))
