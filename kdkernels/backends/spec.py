"""What of a loss is static: what kernels are specialised on and compiled code may hold as constants.

Numbers that change while training (temperatures, weights, a divergence's parameters) are tensors beside it.
"""

from __future__ import annotations

import functools
import struct
from enum import IntEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..divergences import Divergence, class_of
from ..targets import TAILS


# Not enums, which torch.compile cannot follow as an index.
class Output:
    """The outputs of a row, of which the loss is a weighted sum (docs/design.md); columns of weights and results."""

    SOFT = 0  # the divergence, at the temperature
    LABEL = 1  # lse - label's logit: this and the next two at temperature 1
    SMOOTH = 2  # lse - mean logit
    LSE_SQUARED = 3
    ENTROPY = 4  # the student's, over the whole vocabulary, at the temperature
    TEACHER_LABEL = 5  # the teacher's own lse - label's logit at 1, whose gradient is the teacher's


OUTPUTS = 6


class Result:
    """The statistics of a finished row: the columns of its results, ``[rows, RESULTS]`` fp64, that come
    after those of the outputs."""

    STUDENT_ENTROPY = 6
    TEACHER_ENTROPY = 7
    AGREEMENT = 8


RESULTS = 9


class Asked:
    """Which outputs are asked for: bit ``1 << output``."""

    SOFT = 1 << Output.SOFT
    LABEL = 1 << Output.LABEL
    SMOOTH = 1 << Output.SMOOTH
    LSE_SQUARED = 1 << Output.LSE_SQUARED
    ENTROPY = 1 << Output.ENTROPY
    TEACHER_LABEL = 1 << Output.TEACHER_LABEL
    HARD = LABEL | SMOOTH | LSE_SQUARED


class Tail(IntEnum):
    """What a sparse target says of the ids that it does not store; DENSE is no sparse target."""

    DENSE = 0
    BUCKET = 1
    CONDITIONAL = 2
    RENORMALIZE = 3
    TRUNCATE = 4

    @property
    def word(self) -> Literal["bucket", "conditional", "renormalize", "truncate"]:
        """The tail's name in a :class:`SparseTarget`."""
        return TAILS[self - 1]

    @property
    def tempers_student(self) -> bool:
        """Whether the student's own logits are taken at the temperature, and the outcomes at 1."""
        return self in (Tail.RENORMALIZE, Tail.TRUNCATE)


assert tuple(tail.name.lower() for tail in Tail)[1:] == TAILS


class LogitMap(NamedTuple):
    """raw -> softcap * tanh(scale * raw / softcap); softcap 0 means none."""

    scale: float = 1.0
    softcap: float = 0.0

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.softcap == 0.0

    def logits(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        z = raw.to(dtype)
        if self.scale != 1.0:
            z = z * self.scale
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient for the raw values, from that for the ``logits`` made of them."""
        if self.softcap:
            grad = grad * (1 - (logits / self.softcap).square())
        return grad * self.scale if self.scale != 1.0 else grad


class Spec(NamedTuple):
    """The static part of a loss. ``csrc/spec.h`` has the same fields in the same order, but for ``linear``.

    ``kind`` is :attr:`Divergence.kind`. ``asked`` is the outputs that are computed. ``tempered`` is 0 where every
    temperature is exactly 1: then one normaliser serves both terms. ``stats`` asks for entropies and agreement.
    ``linear`` says that a sparse target holds weights and not log-probabilities.
    """

    kind: int = 0
    tail: int = Tail.DENSE
    asked: int = 0
    tempered: int = 0
    stats: int = 0
    student_scale: float = 1.0
    student_softcap: float = 0.0
    teacher_scale: float = 1.0
    teacher_softcap: float = 0.0
    linear: int = 0

    @property
    def student_map(self) -> LogitMap:
        return LogitMap(self.student_scale, self.student_softcap)

    @property
    def teacher_map(self) -> LogitMap:
        return LogitMap(self.teacher_scale, self.teacher_softcap)

    @property
    def sums_shifts(self) -> bool:
        """Whether the state holds ``sum_exp_shift``, which entropies are made of."""
        return bool(self.stats or self.asked & Asked.ENTROPY)

    @property
    def closed_form(self) -> str | None:
        """Whether value and gradient follow from the first pass alone: "forward", "reverse", or None if they do not."""
        return class_of(self.kind).closed_form

    def divergence(self, parameters: Tensor) -> Divergence:
        """The divergence with its numbers: Python's on the CPU, 0-dim tensors elsewhere, where looking would wait."""
        numbers = parameters.tolist() if parameters.device.type == "cpu" else parameters.unbind()
        return class_of(self.kind).with_parameters(self.kind, numbers)

    def why_no_kernel(self) -> str | None:
        """None if the kernels have this divergence, else the reason they do not."""
        return (
            None
            if self.kind >= 0
            else f"it knows kdkernels' own divergences, not {class_of(self.kind).__name__}"
        )

    def text(self) -> str:
        """The form that crosses an operator: a constant of the graph that it is compiled into. A float is a ratio of
        integers, which is exact. Compiled code may hold a float as a symbol (dynamic=True): it cannot print one, but knows
        its ratio."""
        return " ".join(
            "{}/{}".format(*field.as_integer_ratio()) if isinstance(field, float) else f"{int(field)}"
            for field in self
        )

    @staticmethod
    @functools.cache
    def from_text(text: str) -> Spec:
        return Spec._make(map(_number, text.split()))


def _number(word: str) -> int | float:
    if "/" not in word:
        return int(word)
    numerator, denominator = map(int, word.split("/"))
    return numerator / denominator


def text_of(specs: tuple[Spec, ...]) -> str:
    return ";".join(spec.text() for spec in specs)


@functools.cache
def specs_of(text: str) -> tuple[Spec, ...]:
    return tuple(Spec.from_text(each) for each in text.split(";"))


@functools.cache
def packed(spec: Spec) -> Tensor:
    """The bytes of csrc's ``struct Spec``."""
    form = "".join("d" if isinstance(default, float) else "q" for default in Spec._field_defaults.values())
    return torch.frombuffer(bytearray(struct.pack(f"={form[:-1]}", *spec[:-1])), dtype=torch.uint8)
