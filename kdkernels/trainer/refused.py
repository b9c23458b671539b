"""Settings that cannot be, and those that would be passed over: refused before anything is read."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any, Callable

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .data import check_apart
from .errors import UserError
from .settings import FIELDS, SCRATCH, WAYS, Settings, default_of, divergence_of, modes_of

_Range = tuple[str, Callable[[Any], bool]]
_COUNT: _Range = ("must be 1 or more", lambda value: value >= 1)
_SIZE: _Range = ("must be 0 or more, and finite", lambda value: 0 <= value < math.inf)
_ABOVE_0: _Range = ("must be above 0, and finite", lambda value: 0 < value < math.inf)
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "validation_sequences",
            "prompts",
            "prompt_tokens",
            "generation_batch_size",
            "judged_prompts",
            "tensor_parallel",
            "batch_size",
            "shard_tokens",
            "sequences",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "learning_rate",
            "teacher_learning_rate",
            "soft_weight",
            "hard_weight",
            "soft_weight_start",
            "weight_decay",
            "max_grad_norm",
            "sampling_temperature",
            "lora_rank",
            "teacher_steps",
            "new_tokens",
            "save_total_limit",
            "dataloader_num_workers",
            "neftune_noise_alpha",
            "top_k",
            "max_k",
            "samples",
        ),
        _SIZE,
    ),
    **dict.fromkeys(("num_train_epochs", "temperature", "proposal_temperature"), _ABOVE_0),
    "max_length": (
        "is too short: a sequence needs 2 tokens or more to predict one",
        lambda value: value >= 2,
    ),
    "tokenizer_size": (
        "is too small: 256 bytes and the end of text are 257 tokens",
        lambda value: value >= 257,
    ),
    **dict.fromkeys(
        ("validation_share", "gradient_tolerance", "co_teacher_at"),
        ("is no share from 0 to below 1", lambda value: 0 <= value < 1),
    ),
    "top_p": ("is no share from 0 to 1", lambda value: 0 <= value <= 1),
    "student_share": ("is no share above 0, up to 1", lambda value: 0 < value <= 1),
    "soft_warmup": (
        "is no share from 0 to 0.5 (it rises in one and falls in another)",
        lambda value: 0 <= value <= 0.5,
    ),
    "max_steps": ("must be 1 or more, or -1 for num_train_epochs", lambda value: value == -1 or value >= 1),
    **{
        f"{what}_steps": (f"must be above 0; --{what}_strategy no for never", _ABOVE_0[1])
        for what in ("logging", "eval", "save")
    },
}

#: Options of TrainingArguments that would be passed over, and what to do instead.
_REFUSED = {
    "resume_from_checkpoint": "--resume goes on from the last whole checkpoint in OUTPUT_DIR",
    "label_smoothing_factor": "it needs logits, which are never held; leave it out",
    "use_cache": "the loss needs no cache, and the saved config says what the model's own does; leave it out",
    "batch_eval_metrics": "it needs logits, which are never held; leave it out",
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict"),
        "every run trains, and evaluates by --eval_strategy; leave it out",
    ),
}


def _checkpointing() -> set[str]:
    """What torch and transformers can be asked of activation checkpointing."""
    old = PreTrainedModel.gradient_checkpointing_enable  # all that the last transformers for Python 3.10 has
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", old)
    names = {*inspect.signature(checkpoint).parameters, *inspect.signature(enable).parameters}
    given = {"self", "function", "args", "kwargs"}
    return {*names, "preserve_rng_state"} - given  # preserve_rng_state is among torch's **kwargs


def check(settings: Settings) -> None:
    """Raises :class:`UserError` for what cannot be, and for what would be passed over without a word."""
    _check_asked(settings)
    _check_compiled(settings)
    _check_tensor_parallel(settings)
    _check_checkpoints(settings)
    _check_libraries(settings)
    _check_loss_weights(settings)
    _check_teacher(settings)
    _check_precision(settings)
    _check_lora(settings)
    _check_completions(settings)
    if settings.loss.divergence is not None:
        divergence_of(settings.loss.divergence)
    _check_ways(settings)


def check_dtype(name: str) -> None:
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype={name}: there are float32 and bfloat16")


def check_ranges(asked: dict[str, Any]) -> None:
    """Raises :class:`UserError` for a number that its option cannot have. Other commands' options are here too."""
    for name, value in asked.items():
        what, holds = _RANGES.get(name, ("", bool))
        if what and value is not None and not holds(value):
            raise UserError(f"{name}={value} {what}")


def _check_asked(settings: Settings) -> None:
    """Each option by itself: whether the mode has it, and the command, and whether its number can be."""
    mode, asked = settings.mode, settings.asked
    if not asked["output_dir"]:
        raise UserError("no --output_dir: where shall the run be written?")
    check_apart(asked["data"], asked["output_dir"], "--output_dir")
    changed = {name: value for name, value in asked.items() if value != default_of(FIELDS[name])}
    for name, value in changed.items():
        if mode not in modes_of(name):
            raise UserError(
                f"{name}={value}: {mode} has none, it is of {', '.join(modes_of(name))}; leave it out"
            )
        if name in _REFUSED:
            raise UserError(f"{name}={value}: {_REFUSED[name]}")
    check_ranges(changed)


def _check_compiled(settings: Settings) -> None:
    mode, run = settings.mode, settings.run
    if run.torch_compile:  # its backend and mode turn it on
        raise UserError(
            "torch_compile: the command compiles nothing; leave it out, or take DistillationTrainer in a script of "
            "your own, which compiles what comes before the lm_head"
        )
    if run.use_liger_kernel and (mode in ("co", "compare") or run.device.type == "cpu"):
        where = "a GPU, and this run has none" if run.device.type == "cpu" else "one model, and co trains two"
        raise UserError(
            f"use_liger_kernel={run.use_liger_kernel}: Liger's kernels need {where}; leave it out "
            "(the loss is fused without them)"
        )


def _check_tensor_parallel(settings: Settings) -> None:
    """What transformers cannot do, or nobody has tried, where layers are shared out."""
    run, model = settings.run, settings.model
    if model.tensor_parallel == 1:
        return
    wanted = f"tensor_parallel={model.tensor_parallel}"
    for name in (model.student, model.teacher):
        if name in SCRATCH:
            raise UserError(
                f"{wanted}: {name} is made from scratch, and models are shared out as they are loaded; "
                "give a folder or a name"
            )
    if model.lora_rank or model.targets is not None:
        raise UserError(f"{wanted} is of whole models, student and teacher; leave out LoRA and --targets")
    if run.fsdp or run.deepspeed:
        raise UserError(f"{wanted} has all processes; leave --fsdp and --deepspeed out")
    if run.resume or not (run.save_only_model or run.save_strategy == "no"):
        raise UserError(
            f"{wanted}: transformers keeps no optimizer of such a run, so none can be resumed; leave --resume out, "
            "and give --save_only_model or --save_strategy no"
        )
    if run.world_size != model.tensor_parallel:
        raise UserError(
            f"{wanted}, but there are {run.world_size} processes, and all of them share the models: "
            f"torchrun --nproc_per_node {model.tensor_parallel}"
        )


def _check_checkpoints(settings: Settings) -> None:
    mode, run = settings.mode, settings.run
    if run.save_only_model and (run.resume or mode == "compare"):
        way_out = (
            "compare's stages go on from theirs; leave it out"
            if mode == "compare"
            else "leave --resume out, and choose another --output_dir"
        )
        raise UserError(
            f"save_only_model={run.save_only_model}: such checkpoints hold neither optimizer nor schedule, and no run "
            f"goes on from them; {way_out}"
        )


def _check_libraries(settings: Settings) -> None:
    """What torch refuses only when the first step is under way."""
    run = settings.run
    if run.dataloader_persistent_workers and not run.dataloader_num_workers:
        raise UserError(
            f"dataloader_persistent_workers={run.dataloader_persistent_workers}: there are no workers; give "
            "--dataloader_num_workers too, or leave it out"
        )
    given: Any = run.gradient_checkpointing_kwargs or {}  # the same as activation_checkpointing_kwargs
    if not isinstance(given, dict):
        raise UserError(f"activation_checkpointing_kwargs={given}: it must be a mapping, in JSON")
    if unknown := sorted(given.keys() - _checkpointing()):
        raise UserError(
            f"activation_checkpointing_kwargs={given}: torch.utils.checkpoint has no {', '.join(unknown)}; leave it out"
        )


def _check_loss_weights(settings: Settings) -> None:
    mode, loss = settings.mode, settings.loss
    weights = (
        loss.soft_weight,
        1.0 if mode == "co" and loss.hard_weight is None else loss.hard_weight,
        loss.soft_weight_start if mode == "co" else 0.0,
    )
    if not any(weights):
        raise UserError("soft_weight=0 and hard_weight=0: the student would learn nothing; set one above 0")


def _check_teacher(settings: Settings) -> None:
    mode, model = settings.mode, settings.model
    if mode != "hard" and model.teacher is None and model.targets is None:
        cached = ", or --targets that `python -m kdkernels cache` wrote" if mode == "soft" else ""
        raise UserError(f"{mode} needs a --teacher{cached}")
    if model.teacher is not None and model.targets is not None:
        raise UserError("give --teacher or --targets, not both: the targets are the teacher")


def _check_precision(settings: Settings) -> None:
    check_dtype(settings.model.dtype)
    if settings.run.fp16 and settings.run.device.type == "cpu":
        raise UserError("fp16=True has no effect on a CPU; give --bf16, or leave it out")


def _check_lora(settings: Settings) -> None:
    model = settings.model
    if model.lora_rank and model.student in SCRATCH:
        raise UserError(
            f"lora_rank={model.lora_rank}: {model.student} is made from scratch, and a run saves the "
            "adapter alone; give a trained model as --student, or leave LoRA out"
        )
    if model.lora_modules != ["all-linear"] and not model.lora_rank:
        raise UserError(f"lora_modules={' '.join(model.lora_modules)} without LoRA: give --lora_rank too")


def _check_completions(settings: Settings) -> None:
    completions = settings.generation.completions
    if completions is None:
        return
    if settings.model.teacher is None:
        raise UserError(
            f"completions={completions}, but no --teacher writes them; text that is there already is --data"
        )
    if Path(completions).suffix != ".jsonl":
        raise UserError(f"completions={completions}: the name must end in .jsonl")
    check_apart(settings.data.data, completions, "--completions")


def _check_ways(settings: Settings) -> None:
    for way in settings.compare.ways:
        if way not in WAYS:
            raise UserError(f"ways={way}: there are {', '.join(WAYS)}")
    if not {"plain", "soft"} <= set(settings.compare.ways):
        raise UserError(
            f"ways={' '.join(settings.compare.ways)}: plain and soft are what all are compared with"
        )
