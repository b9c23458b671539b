"""``transformers.Trainer`` with a teacher: full logits of neither model are ever held.

The loss is computed inside the lm_head's own forward (:mod:`.model_head` says how), so that whatever gathers
weights around a module's forward (FSDP, FSDP2, ZeRO-3) works.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any, Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

import kdkernels as kd

from ..targets import Tail
from .model_head import TakesOtherInputs, call_through_head, check_head, is_measured, weights_are_here
from .whole_evaluation import every_row, repeat_whole_batches, rows_that_count

__all__ = ["DistillationTrainer", "call_through_head", "check_head"]

#: What a batch holds beside the arguments of a model's forward.
_TARGET_KEYS = ("target_ids", "target_logprobs", "target_weights")
_LOSS_KEYS = ("labels", "shift_labels", "num_items_in_batch", *_TARGET_KEYS)


class DistillationTrainer(Trainer):
    """Trains ``model`` on :func:`kdkernels.distillation_loss` against a frozen ``teacher``.

    Batches are those of causal language models: ``labels [B, L]`` is aligned with ``input_ids`` and
    shifted by one here (``shift_labels`` is taken as it is); -100 masks a token from both terms.
    The loss is the sum over tokens divided by ``num_items_in_batch``, the tokens of the whole
    accumulated batch over all processes, so it does not depend on how that batch is cut. Logs gain
    the soft and hard terms, entropies and top-1 agreement, means over the tokens since the last log, and ``kl``,
    the forward KL at temperature 1. Where that is the soft term it costs nothing; else it is a second
    loss without a gradient, on the steps that logging_steps logs only, and the mean over that step's tokens.
    ``evaluate`` gives, exact over the tokens of the set whatever the batches and the number of processes, ``eval_loss``
    (the training loss), ``eval_hard`` (cross entropy), ``eval_kl``, entropies and agreement.

    Instead of a teacher, batches may hold what it said: ``target_ids [B, L, K]`` with ``target_logprobs`` or
    ``target_weights``, of which row i is about what the model says at i (see :class:`kdkernels.SparseTarget`).
    KL, entropies and agreement are then those of the outcomes that the target has, smaller than over the vocabulary,
    and named so: ``target_kl``, ``target_student_entropy``, ``target_teacher_entropy``, ``target_agreement``.

    The student may carry LoRA (peft) anywhere, its lm_head included.

    The model's own forward runs, images and all. With ``output_router_logits=True`` in its config a mixture of experts'
    load balancing loss is added in training as the model adds it, the mean over micro-batches by tokens; logs have it as
    ``router``. ``torch_compile=True`` compiles the part before the lm_head. docs/transformers.md has the rest.

    Args:
        model: as of ``transformers.Trainer``, as are args and further keyword arguments.
        teacher: a causal LM with the student's vocabulary. Frozen and set to eval mode. None means no
            teacher: the hard term alone, as fused linear cross entropy.
        divergence: as of :func:`kdkernels.distillation_loss`, which gives the defaults, as are temperature,
            temperature_squared, soft_weight, hard_weight, label_smoothing, z_loss, vocab_size, chunk_bytes and
            gradient_tolerance.
        tail: of the sparse targets in a batch, as of :class:`kdkernels.SparseTarget`.
        keep_sharded: under FSDP2 leave the lm_heads in their shards. No process holds a whole one; the hidden states of
            all processes travel instead. It pays where all processes' tokens of a micro-batch are fewer than the
            lm_head's rows. Of plain lm_heads of one size, with embeddings of their own.

    Raises:
        ValueError: an option of Trainer that needs logits, DataParallel, keep_sharded where it cannot be, a model whose logits are
            not those of a linear head (:func:`check_head`; without its weights here, at its first batch),
            a batch without labels or with an input that a model's forward does not name, an evaluation in which
            processes would repeat rows that cannot be told from others.

    >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    >>> trainer = DistillationTrainer(
    ...     LlamaForCausalLM(config),
    ...     TrainingArguments(getfixture("tmp_path"), use_cpu=True, report_to="none"),
    ...     teacher=LlamaForCausalLM(config), divergence=kd.JSD(0.5), eval_dataset=rows)
    >>> sorted(name for name in trainer.evaluate() if name.startswith("eval_"))[:3]
    ['eval_agreement', 'eval_hard', 'eval_kl']
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *,
        teacher: PreTrainedModel | None,
        divergence: kd.Divergence = kd.ForwardKL(),
        temperature: float = 1.0,
        temperature_squared: bool = False,
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        vocab_size: int | None = None,
        chunk_bytes: int | None = None,
        gradient_tolerance: float = 0.0,
        tail: Tail = "bucket",
        keep_sharded: bool = False,
        **trainer: Any,
    ) -> None:
        for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
            if trainer.get(name) is not None:
                raise ValueError(f"{name} needs logits, which are never held; see evaluate()'s metrics")
        super().__init__(model, args, **trainer)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs, and DataParallel cannot run this loss; launch with "
                f"torchrun --nproc_per_node {self.args.n_gpu}, or show it one by CUDA_VISIBLE_DEVICES=0"
            )
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor needs logits; pass label_smoothing= to the trainer")
        # Trainer then counts num_items_in_batch, over shifted labels, whatever the model's forward takes.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.divergence = divergence
        self.soft_options: dict[str, Any] = {
            "temperature": temperature,
            "temperature_squared": temperature_squared,
        }
        self.soft_weight, self.hard_weight = soft_weight, hard_weight
        self.hard_options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        self.cut: dict[str, Any] = {
            "vocab_size": vocab_size,
            "chunk_bytes": chunk_bytes,
            "gradient_tolerance": gradient_tolerance,
        }
        self.tail = tail
        self.keep_sharded = keep_sharded
        if keep_sharded:
            self._check_lm_heads_can_stay_sharded(teacher)
        self.teacher = None if teacher is None else self._placed(teacher)
        self._check_head_if_here(self.teacher)
        self._make_ready(self.model)
        self._sums = _Sums()
        self._kl_sum = _Sums()  #: has its own token count: not every step computes it

    # -- the loss -------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        # Trainer counts where there are labels; a padding-free collator may give shift_labels alone.
        return super()._get_num_items_in_batch([{"labels": None, **batch} for batch in batch_samples], device)

    def _set_signature_columns_if_needed(self) -> None:
        # Columns that the model's forward does not take are removed from data sets; the loss takes more.
        super()._set_signature_columns_if_needed()
        names: Any = self._signature_columns
        self._signature_columns = list(dict.fromkeys([*names, *_LOSS_KEYS]))  # type: ignore[assignment]

    def teacher_target(self, inputs: dict[str, Any]) -> kd.LinearHead | kd.SparseTarget | None:
        """What the teacher says about a batch, in any form that distillation_loss takes."""
        if "target_ids" in inputs:
            if self.teacher is not None:
                warnings.warn(
                    "the batch holds target_ids, which are taken; the teacher is not asked", stacklevel=2
                )
            return kd.SparseTarget(*(inputs.get(name) for name in _TARGET_KEYS), tail=self.tail)  # type: ignore[arg-type]
        if self.teacher is None:
            return None
        with torch.no_grad():
            return call_through_head(
                self.teacher, model_inputs(inputs), outliving, keep_sharded=self.keep_sharded
            )

    def student_call(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        function: Callable[..., Any],
        with_router: Callable[[Any, Tensor], Any] | None = None,
    ) -> Any:
        """``function(student's LinearHead, teacher's target)``, run inside the wrapped model's forward."""
        target = self.teacher_target(inputs)
        model = getattr(model, "_orig_mod", model)  # see _compile_below_the_head
        return call_through_head(
            model,
            model_inputs(inputs),
            lambda head: function(head, target),
            with_router,
            keep_sharded=self.keep_sharded,
        )

    @property
    def _loss_options(self) -> dict[str, Any]:
        """What the loss against a target is asked for, but for its reduction."""
        return {
            "divergence": self.divergence,
            "soft_weight": self.soft_weight,
            "hard_weight": self.hard_weight,
            **self.soft_options,
            **self.hard_options,
            **self.cut,
        }

    def batch_loss(self, student: kd.LinearHead, target: Any, labels: Tensor, num_items: Any) -> Tensor:
        """The loss of one micro-batch, divided by the items of the whole batch; feeds the logs."""
        if target is None:
            if not self.hard_weight:
                raise ValueError(
                    "no teacher and no target_ids in the batch, and hard_weight=0: nothing to learn; "
                    "give teacher=, batches with targets, or hard_weight=1.0"
                )
            hard = kd.cross_entropy(student, labels, num_items=num_items, **self.hard_options, **self.cut)
            tokens = (labels >= 0).sum()
            self._sums.add({"hard": hard.detach() * (tokens if num_items is None else num_items)}, tokens)
            return self.hard_weight * hard
        loss, stats = kd.distillation_loss(
            student, target, labels, num_items=num_items, return_stats=True, **self._loss_options
        )
        self.log_stats(stats, student, target, labels)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if return_outputs:
            raise ValueError("return_outputs=True needs logits, which are never held")
        labels = shifted_labels(inputs)

        def with_router(loss: Tensor, router: Tensor) -> Tensor:
            tokens = (labels >= 0).sum()
            self._sums.add({"router": router * tokens})
            # Micro-batches are weighted by their tokens. For a batch in one piece this is the model's own value.
            return loss + router * (1 if num_items_in_batch is None else tokens / num_items_in_batch)

        with self.accelerator.autocast():
            loss = self.student_call(
                model,
                inputs,
                lambda student, target: self.batch_loss(student, target, labels, num_items_in_batch),
                with_router,
            )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # Gradients are averaged over processes, but num_items already counts the tokens of all of them.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    # -- logs and evaluation --------------------------------------------------------------------

    def log_stats(self, stats: kd.Stats, student: kd.LinearHead, target: Any, labels: Tensor) -> None:
        """Adds a micro-batch's statistics to what the next log reports."""
        means = stats._asdict()
        tokens = means.pop("tokens")
        if not self.hard_weight:
            del means["hard"]  # not computed
        self._sums.add(_named({name: mean * tokens for name, mean in means.items()}, target), tokens)
        if self.divergence == kd.ForwardKL() and self.soft_options["temperature"] == 1:
            self._kl_sum.add(_named({"kl": stats.soft * tokens}, target), tokens)
        elif self._step_is_logged():
            with torch.no_grad():
                kl = kd.distillation_loss(student, target, labels, reduction="sum", **self.cut)
            self._kl_sum.add(_named({"kl": kl}, target), tokens)

    def _step_is_logged(self) -> bool:
        step, args = self.state.global_step + 1, self.args
        return (args.logging_strategy == "steps" and step % self.state.logging_steps == 0) or (
            args.logging_first_step and step == 1
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._sums.means(self.accelerator))
            logs.update(self._kl_sum.means(self.accelerator))
        super().log(logs, start_time)

    def row_statistics(self, student: kd.LinearHead, target: Any, labels: Tensor) -> dict[str, Tensor]:
        """The token-summed statistics of a batch's rows, for evaluation."""
        tokens = (labels >= 0).sum()
        if target is None:
            loss = hard = kd.cross_entropy(student, labels, reduction="sum", **self.cut)
            if any(self.hard_options.values()):
                loss = kd.cross_entropy(student, labels, reduction="sum", **self.hard_options, **self.cut)
            return {"loss": self.hard_weight * loss, "hard": hard, "tokens": tokens}
        _, stats = kd.distillation_loss(
            student, target, labels, hard_weight=1.0, return_stats=True, **self.cut
        )
        loss = kd.distillation_loss(student, target, labels, reduction="sum", **self._loss_options)
        means = stats._asdict()
        del means["tokens"]
        means = {"kl": means.pop("soft"), **means}
        sums = _named({name: mean * tokens for name, mean in means.items()}, target)
        return {"loss": loss, **sums, "tokens": tokens}

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *ignored: Any, **options: Any
    ) -> tuple:
        """Adds a batch to the sums of this process. evaluation_loop makes the means of them, the loss included."""
        inputs = self._prepare_inputs(inputs)
        labels = shifted_labels(inputs).clone()
        labels[rows_that_count(self._eval_dataloader, len(labels), self.args.process_index) :] = -100
        with torch.no_grad(), self.accelerator.autocast():
            sums = self.student_call(
                model, inputs, lambda student, target: self.row_statistics(student, target, labels)
            )
        tokens = sums.pop("tokens")
        self._eval_sums.add(sums, tokens)
        return (None, None, None)

    def get_eval_dataloader(self, *given: Any, **named: Any) -> Any:
        with every_row(self.args):
            return super().get_eval_dataloader(*given, **named)

    def get_test_dataloader(self, *given: Any, **named: Any) -> Any:
        with every_row(self.args):
            return super().get_test_dataloader(*given, **named)

    def evaluation_loop(self, dataloader: Any, *arguments: Any, **options: Any) -> Any:
        repeat_whole_batches(dataloader)
        self._eval_dataloader, self._eval_sums = dataloader, _Sums()
        output: Any = super().evaluation_loop(dataloader, *arguments, **options)
        prefix = options.get("metric_key_prefix", "eval")
        means = self._eval_sums.means(self.accelerator, nothing=math.nan)
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    # -- placing the models ---------------------------------------------------------------------

    def call_model_init(self, trial: Any = None) -> Any:
        """``model_init``'s model. Trainer calls this at construction, before all else here, and again for each run."""
        model = super().call_model_init(trial)
        if hasattr(self, "teacher"):
            if self.teacher is not None:
                _check_own_weights(model, self.teacher)
            if self.keep_sharded:
                _own_lm_head("model", model)
            self._make_ready(model)
        return model

    def _make_ready(self, model: Any) -> None:
        """What is done to each model that is trained, before accelerate wraps it."""
        self._check_head_if_here(model)
        if self.keep_sharded:
            self._shard_lm_head(model)
        if self.args.torch_compile:
            self._compile_below_the_head(model)

    def _check_head_if_here(self, model: Any) -> None:
        """As it will be called: its body and its lm_head may be of two dtypes. Else its first forward does."""
        if isinstance(model, PreTrainedModel) and weights_are_here(model):
            try:
                with self.accelerator.autocast():
                    check_head(model)
            except TakesOtherInputs:
                if not is_measured(model):
                    raise

    def _compile_below_the_head(self, model: Any) -> None:
        """torch_compile=True: the part before the lm_head is compiled in place; the loss is a kernel already.

        accelerate wraps the whole model in torch.compile, but its lm_head is replaced at every call. The wrapper compiles
        when it is first called; student_call never calls it, but the model inside.
        """
        own: Any = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        causal_lm = own.get_base_model() if hasattr(own, "get_base_model") else own
        if causal_lm.base_model is causal_lm:
            raise ValueError(
                f"torch_compile compiles a model's base_model, and {type(causal_lm).__name__} has none; leave it out"
            )
        causal_lm.base_model.compile(**self.accelerator.state.dynamo_plugin.to_kwargs())

    def _check_lm_heads_can_stay_sharded(self, teacher: Any) -> None:
        """ValueError where the lm_heads cannot stay sharded."""
        if not (self.is_fsdp_enabled and self.accelerator.is_fsdp2):
            raise ValueError(
                "keep_sharded=True is of FSDP2: give fsdp=True with fsdp_version 2, or leave it out"
            )
        plugin = self.accelerator.state.fsdp_plugin
        for name, given in (
            ("cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading),
            ("offload_params", type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"),
            ("a mesh of several dimensions", self.accelerator.torch_device_mesh is not None),
        ):
            if given:
                raise ValueError(f"keep_sharded=True goes without {name}; leave one of them out")
        models = {"model": self.model} if teacher is None else {"model": self.model, "teacher": teacher}
        rows = {name: _own_lm_head(name, each).weight.shape[0] for name, each in models.items()}
        if len({*rows.values()}) > 1:
            raise ValueError(f"keep_sharded=True needs lm_heads of as many rows, got {rows}; leave it out")

    def _shard_lm_head(self, model: Any) -> None:
        """Shards the lm_head by itself, before accelerate shards it together with the last norm."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        head = model.get_output_embeddings()
        policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy
        if self.accelerator.mixed_precision != "no" and head.weight.requires_grad:
            head.float()  # as accelerate does with what learns
        # FSDP2 never meets the head in the model's own forward (see model_head). A plain forward between two steps would
        # make it a root, whose weight stays gathered unless told otherwise.
        fully_shard(head, reshard_after_forward=True, mp_policy=policy or MixedPrecisionPolicy())

    def _placed(self, teacher: Any) -> nn.Module:
        _check_own_weights(self.model, teacher)
        teacher.requires_grad_(False).eval()
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            if self.keep_sharded:
                self._shard_lm_head(teacher)
            return fsdp2_prepare_model(self.accelerator, teacher)
        if _is_partitioned(teacher):
            return _inference_engine(teacher, self.accelerator.state.deepspeed_plugin.deepspeed_config)
        if getattr(teacher, "hf_device_map", None) is None and not getattr(teacher, "is_quantized", False):
            teacher.to(self.args.device)
        return teacher


# -- small parts ---------------------------------------------------------------------------------


def _check_own_weights(model: Any, teacher: nn.Module) -> None:
    """ValueError where the teacher, which is frozen, has parameters that the model would learn."""
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    if shared := [name for name, p in teacher.named_parameters() if id(p) in learning]:
        raise ValueError(
            f"the teacher shares {len(shared)} parameter(s) with the model, which would be frozen with it "
            f"({shared[0]}, ...); give it a copy, copy.deepcopy(teacher), or freeze them in the model"
        )


def outliving(head: kd.LinearHead) -> kd.LinearHead:
    """A head that can be used after its module's forward has ended.

    ZeRO-3 empties parameters then, but not a detached tensor of the same storage. A parameter itself must not be
    returned: DeepSpeed would leave it gathered from then on.
    """
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, weight=head.weight.detach(), bias=bias)


def _own_lm_head(name: str, model: Any) -> nn.Linear:
    """The lm_head, which FSDP2 can shard by itself. ValueError if it is adapted or tied to embeddings."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) is not nn.Linear:
        what = f"{type(model).__name__} has none" if head is None else f"it is a {type(head).__name__}"
        raise ValueError(f"keep_sharded=True needs a plain lm_head of the {name}, and {what}; leave it out")
    if head.weight is getattr(model.get_input_embeddings(), "weight", None):
        raise ValueError(f"keep_sharded=True: the {name}'s lm_head is tied to its embeddings; leave it out")
    return head


class _Sums:
    """Named sums over tokens. They stay on their device until they are read."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.tokens: Any = 0

    def add(self, sums: dict[str, Tensor], tokens: Any = 0) -> None:
        self.tokens = self.tokens + tokens
        for name, value in sums.items():
            self.values[name] = self.values.get(name, 0.0) + value.detach().double()

    def means(self, accelerator: Any, *, nothing: float = 0.0) -> dict[str, float]:
        """The means over all processes, ``nothing`` of no tokens; starts again from zero."""
        values, self.values = self.values, {}
        tokens, self.tokens = self.tokens, 0
        if not values:
            return {}
        flat = torch.stack([*values.values(), torch.as_tensor(tokens).double()])
        *sums, tokens = accelerator.reduce(flat, "sum").tolist()
        return {name: value / tokens if tokens else nothing for name, value in zip(values, sums)}


def _named(statistics: dict[str, Tensor], target: Any) -> dict[str, Tensor]:
    """The names for the logs. Against a sparse target they are ``target_kl``, ...: about its outcomes, not the vocabulary."""
    if not isinstance(target, kd.SparseTarget):
        return statistics
    return {
        name if name in ("soft", "hard") else f"target_{name}": value for name, value in statistics.items()
    }


def model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in _LOSS_KEYS}


def shifted_labels(inputs: dict[str, Any]) -> Tensor:
    """Labels ``[B, L]`` where position i holds the token that the model says at i; the last has none."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    if inputs.get("labels") is None:
        raise ValueError(f"a batch needs labels (-100 masks a token), got {sorted(inputs)}")
    return nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)


def _is_partitioned(model: nn.Module) -> bool:
    """Whether deepspeed.zero.Init, as from_pretrained runs it under ZeRO-3, left only shards of the weights here."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def _inference_engine(teacher: PreTrainedModel, student_config: dict[str, Any]) -> nn.Module:
    """The student's ZeRO-3 for a frozen model: an engine without an optimizer, whose hooks gather each layer as it runs."""
    import deepspeed

    zero = {
        name: value
        for name, value in student_config["zero_optimization"].items()
        if value != "auto" and name != "offload_optimizer"
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": teacher.dtype == torch.bfloat16},
        "fp16": {"enabled": teacher.dtype == torch.float16},
    }
    return deepspeed.initialize(model=teacher, config=config)[0]
