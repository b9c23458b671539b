"""Everything about a loss that is a number: what operators and kernels are told beside the tensors."""

from __future__ import annotations

from typing import NamedTuple

from .divergences import Divergence, from_code


class LogitMap(NamedTuple):
    """raw -> softcap * tanh(scale * raw / softcap); softcap 0 means none."""

    scale: float = 1.0
    softcap: float = 0.0

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.softcap == 0.0


class Spec(NamedTuple):
    """soft_weight * divergence(at temperature) + hard_weight * cross entropy, per row.

    ``teacher_hard_weight`` is the weight of the teacher's own cross entropy in co-distillation.
    T^2, where asked for, is already in ``soft_weight``.
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

    def to_floats(self) -> list[float]:
        """The flat form that crosses the operator boundary; ``csrc/spec.h`` reads the same order."""
        first, second = self.divergence.parameters
        return [
            float(self.divergence.code), first, second, self.temperature,
            self.soft_weight, self.hard_weight, self.label_smoothing, self.z_loss,
            self.student_map.scale, self.student_map.softcap,
            self.teacher_map.scale, self.teacher_map.softcap, self.teacher_hard_weight,
        ]  # fmt: skip

    @staticmethod
    def from_floats(values: list[float]) -> Spec:
        code, first, second, temperature, soft, hard, smoothing, z_loss = values[:8]
        student_scale, student_cap, teacher_scale, teacher_cap, teacher_hard = values[8:]
        return Spec(
            divergence=from_code(int(code), first, second),
            temperature=temperature,
            soft_weight=soft,
            hard_weight=hard,
            label_smoothing=smoothing,
            z_loss=z_loss,
            student_map=LogitMap(student_scale, student_cap),
            teacher_map=LogitMap(teacher_scale, teacher_cap),
            teacher_hard_weight=teacher_hard,
        )
