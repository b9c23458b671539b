"""Co-distillation: two models in one module, one loss, the weight of the soft term on a schedule."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

import kdkernels as kd

from ..integrations.common import is_dtensor
from ..integrations.transformers import call_through_head, check_head, model_inputs
from .errors import UserError, one_line
from .reliable import ReliableTrainer

TEACHER_LOSS = "teacher_loss.json"
SCHEDULES = ("constant", "linear", "cosine", "warmup_stable_decay", "teacher_loss")


class Pair(nn.Module):
    """Student and teacher as one module: Trainer's optimizer, checkpoints, DDP and FSDP then serve both."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.config = student.config
        self._no_split_modules = sorted({n for m in (student, teacher) for n in m._no_split_modules or ()})

    def forward(
        self,
        function: Callable[[kd.LinearHead, kd.LinearHead], Any],
        with_router: Callable[[Any, Tensor], Any] | None = None,
        **inputs: Any,
    ) -> Any:
        """``function(student's head, teacher's head)``, called inside both lm_heads' forwards."""
        return call_through_head(
            self.student,
            inputs,
            lambda student: call_through_head(
                self.teacher, inputs, lambda teacher: function(student, teacher), with_router
            ),
            with_router,
        )

    def activation_checkpointing_enable(self, **options: Any) -> None:
        for model in (self.student, self.teacher):
            model.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """activation_checkpointing_enable's name in the last transformers for Python 3.10."""
        for model in (self.student, self.teacher):
            model.gradient_checkpointing_enable(**options)


@dataclass(frozen=True)
class SoftWeight:
    """The weight of the soft term at a step, or given the teacher's own cross entropy.

    With x the share of the steps done, from ``start`` to ``peak``:

    * constant: peak.
    * linear: start + (peak - start) x. cosine: the same with (1 - cos(pi x)) / 2 for x.
    * warmup_stable_decay: linear to peak within ``warmup``, peak, back to start within the last ``warmup``.
    * teacher_loss: peak * max(0, 1 - loss / log(vocab)), the share of what a teacher that knows nothing
      would lose that this teacher, by its last step, no longer loses. 0 before its first step.

    >>> SoftWeight("linear", peak=1.0).at(50, 100)
    0.5
    >>> SoftWeight("teacher_loss", peak=1.0).at(0, 100, teacher_loss=2.0, vocab=math.exp(8))
    0.75
    """

    kind: str
    peak: float
    start: float = 0.0
    warmup: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UserError(f"unknown soft_schedule {self.kind!r}; there are {', '.join(SCHEDULES)}")

    def at(self, step: int, steps: int, *, teacher_loss: float | None = None, vocab: float = 0) -> float:
        if self.kind == "constant":
            return self.peak
        if self.kind == "teacher_loss":
            return 0.0 if teacher_loss is None else self.peak * max(0.0, 1 - teacher_loss / math.log(vocab))
        x = step / max(steps, 1)
        if self.kind == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        elif self.kind == "warmup_stable_decay":
            x = min(1.0, x / self.warmup, (1 - x) / self.warmup) if self.warmup else 1.0
        return self.start + (self.peak - self.start) * x


def clip(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scales gradients down to a norm of ``largest``, and returns the norm that they had, a plain tensor.

    Under FSDP they are shards over a mesh, but for those of modules that it was told to ignore, and torch sums up the
    squares of one mesh at a time.
    """
    meshes: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            meshes.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    norms: list[Any] = [get_total_norm([p.grad for p in group]) for group in meshes.values()]  # type: ignore[misc]
    norms = [norm.full_tensor() if is_dtensor(norm) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for group in meshes.values():
        clip_grads_with_norm_(group, largest, norm)
    return norm


class CodistillationTrainer(ReliableTrainer):
    """Trains both models of a :class:`Pair` on :func:`kdkernels.codistillation_loss`.

    The two have parameter groups and a learning rate of their own in one AdamW, which is what two
    optimizers would do, and gradients are clipped model by model. Checkpoints hold ``student/`` and
    ``teacher/``, each of which from_pretrained loads.
    """

    def __init__(
        self,
        pair: Pair,
        args: Any,
        *,
        soft_schedule: SoftWeight,
        teacher_learning_rate: float,
        **options: Any,
    ) -> None:
        super().__init__(pair, args, teacher=None, **options)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise UserError("co trains two models at once: use DDP, or FSDP with fsdp_version 2")
        if self.args.neftune_noise_alpha is not None:
            raise UserError("co has no neftune_noise_alpha: there are two embeddings; leave it out")
        with self.accelerator.autocast():
            for model in (pair.student, pair.teacher):
                check_head(model)
        self.soft_schedule, self.teacher_learning_rate = soft_schedule, teacher_learning_rate
        self.teacher_loss: float | None = None  #: over the last whole batch, if the schedule asks
        self._teacher_sum: Any = 0.0
        self._used_soft_weight = 0.0

    @property
    def models(self) -> tuple[Any, Any]:
        pair: Any = self.model
        return pair.student, pair.teacher

    # -- the loss -------------------------------------------------------------------------------

    def student_call(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        function: Callable[..., Any],
        with_router: Callable[[Any, Tensor], Any] | None = None,
    ) -> Any:
        return model(function, with_router, **model_inputs(inputs))

    def batch_loss(
        self, student: kd.LinearHead, target: kd.LinearHead, labels: Tensor, num_items: Any
    ) -> Tensor:
        self._used_soft_weight = self.soft_schedule.at(
            self.state.global_step,
            self.state.max_steps,
            teacher_loss=self.teacher_loss,
            vocab=self.cut["vocab_size"] or target.vocab_size,
        )
        losses, stats = kd.codistillation_loss(
            student,
            target,
            labels,
            num_items=num_items,
            return_stats=True,
            **self._loss_options | {"soft_weight": self._used_soft_weight},
        )
        self.log_stats(stats, student, target, labels)
        self._sums.add({"teacher_hard": losses.teacher.detach() * num_items})
        self._teacher_sum = self._teacher_sum + losses.teacher.detach()
        return losses.student + losses.teacher

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the batch is whole
            if self.soft_schedule.kind == "teacher_loss":
                self.teacher_loss = float(self.accelerator.reduce(self._teacher_sum, "sum"))
            self._teacher_sum = 0.0
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["soft_weight"] = self._used_soft_weight
        super().log(logs, start_time)

    def row_statistics(
        self, student: kd.LinearHead, target: kd.LinearHead, labels: Tensor
    ) -> dict[str, Tensor]:
        teacher_hard = kd.cross_entropy(target, labels, reduction="sum", **self.cut)
        return {**super().row_statistics(student, target, labels), "teacher_hard": teacher_hard}

    # -- two models where Trainer expects one ---------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.optimizer is None:
            pair: Any = self.model if model is None else model
            teacher_groups = super().create_optimizer(pair.teacher).param_groups
            self.optimizer = None
            optimizer = super().create_optimizer(pair.student)
            for group in teacher_groups:
                optimizer.add_param_group({**group, "lr": self.teacher_learning_rate})
            self.optimizer = optimizer
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        pair = self.accelerator.unwrap_model(model)
        # Once: accelerate's clip_grad_norm_ would do it for each model, and both have one optimizer.
        self.accelerator.unscale_gradients()
        return torch.stack(
            [clip(part.parameters(), self.args.max_grad_norm) for part in (pair.student, pair.teacher)]
        ).norm()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        pair = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        for name, part in (("student", pair.student), ("teacher", pair.teacher)):
            own = (
                None
                if state_dict is None
                else {
                    key.removeprefix(name + "."): value
                    for key, value in state_dict.items()
                    if key.startswith(name + ".")
                }
            )
            part.save_pretrained(folder / name, state_dict=own)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder / name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        pair = self.model
        try:
            for name in ("student", "teacher"):
                self.model = getattr(pair, name)
                super()._load_from_checkpoint(str(Path(resume_from_checkpoint, name)))
        finally:
            self.model = pair

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint), self.model_wrapped)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            Path(output_dir, TEACHER_LOSS).write_text(json.dumps(self.teacher_loss))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint, TEACHER_LOSS)
            with one_line(f"cannot read {path}"):
                self.teacher_loss = json.loads(path.read_text())
