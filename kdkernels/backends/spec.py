"""Everything about a loss that is a number: what operators and kernels are told beside the tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import Divergence, from_code
from ..targets import TAILS

_TAIL_CODES = ("", *TAILS)


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
    """soft_weight * divergence(at temperature) + hard_weight * cross entropy, per row.

    ``teacher_hard_weight`` is the weight of the teacher's own cross entropy in co-distillation.
    T^2, where asked for, is already in ``soft_weight``. ``tail`` is that of a sparse target, "" where
    the teacher is dense; ``linear`` says that the target holds weights and not log-probabilities.
    """

    divergence: Divergence
    temperature: float = 1.0
    soft_weight: float = 1.0
    hard_weight: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    student_map: LogitMap = LogitMap()
    teacher_map: LogitMap = LogitMap()
    teacher_hard_weight: float = 0.0
    tail: str = ""
    linear: bool = False

    def to_floats(self) -> list[float]:
        """The flat form that crosses the operator boundary; ``csrc/spec.h`` reads the same order."""
        first, second, *others = self.divergence.parameters
        return [
            float(self.divergence.code),
            first,
            second,
            self.temperature,
            self.soft_weight,
            self.hard_weight,
            self.label_smoothing,
            self.z_loss,
            self.student_map.scale,
            self.student_map.softcap,
            self.teacher_map.scale,
            self.teacher_map.softcap,
            self.teacher_hard_weight,
            float(_TAIL_CODES.index(self.tail)),
            float(self.linear),
            *others,  # of a divergence that no kernel knows
        ]

    @staticmethod
    def from_floats(values: list[float]) -> Spec:
        code, first, second, temperature, soft, hard, smoothing, z_loss = values[:8]
        student_scale, student_cap, teacher_scale, teacher_cap, teacher_hard, tail, linear = values[8:15]
        return Spec(
            divergence=from_code(int(code), [first, second, *values[15:]]),
            temperature=temperature,
            soft_weight=soft,
            hard_weight=hard,
            label_smoothing=smoothing,
            z_loss=z_loss,
            student_map=LogitMap(student_scale, student_cap),
            teacher_map=LogitMap(teacher_scale, teacher_cap),
            teacher_hard_weight=teacher_hard,
            tail=_TAIL_CODES[int(tail)],
            linear=bool(linear),
        )
