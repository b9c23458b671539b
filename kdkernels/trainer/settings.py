"""Everything that can be set, as dataclasses, and which mode has which of it."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import kdkernels as kd

from .errors import UserError

MODES = {
    "soft": "the student learns the teacher's distribution (live teacher, no logits held)",
    "hard": "the teacher writes, or wrote, text; the student imitates it with fused linear cross entropy",
    "co": "teacher and student train together, one codistillation_loss per step",
    "on_policy": "the student writes, the teacher judges every token of it, the student follows",
    "compare": "these and a student without a teacher, at the same token budget: a table and a picture",
}
DIVERGENCES = {
    "forward_kl": kd.ForwardKL,
    "reverse_kl": kd.ReverseKL,
    "jsd": kd.JSD,
    "skew_kl": kd.SkewKL,
    "skew_reverse_kl": kd.SkewReverseKL,
    "total_variation": kd.TotalVariation,
    "alpha_beta": kd.AlphaBeta,
    "mixed": kd.Mixed,
}
#: The students of compare.
WAYS = ("plain", "longer", "soft", "hard", "co", "on_policy")
#: Llama-style models made from scratch: hidden_size, intermediate_size, layers, heads.
SCRATCH = {"micro": (32, 64, 1, 2), "tiny": (128, 320, 2, 4), "small": (192, 512, 4, 4)}


def option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelSettings:
    student: str = option(
        "tiny",
        f"a transformers causal LM (folder, name, .gguf file, smollm2), or {', '.join(SCRATCH)}: from scratch",
    )
    teacher: str | None = option(
        None, "the same for the teacher; hard needs none if --data holds its completions"
    )
    targets: str | None = option(None, "what `python -m kdkernels cache` wrote, instead of a teacher")
    tokenizer: str | None = option(
        None, "folder or name; default: the student's, else the teacher's, else trained"
    )
    tokenizer_size: int = option(8192, "vocabulary of a BPE tokenizer that is trained on --data")
    dtype: str = option("float32", "of both models: float32 or bfloat16")
    lora_rank: int = option(0, "train LoRA adapters of this rank on the student; 0 trains all of it")
    lora_modules: list[str] = option(["all-linear"], "what LoRA is put on, such as q_proj v_proj lm_head")
    tensor_parallel: int = option(
        1, "processes of torchrun that share every layer and both lm_heads, by transformers' tp_plan"
    )
    keep_sharded: bool = option(
        False,
        "with --fsdp: lm_heads stay in shards; pays if all processes' tokens of a step are fewer than their rows",
    )

    @property
    def pretrained(self) -> list[str]:
        """The models that are loaded and not made from scratch."""
        return [name for name in (self.student, self.teacher) if name is not None and name not in SCRATCH]

    @property
    def trains_tokenizer(self) -> bool:
        """Whether the run makes a tokenizer of its own."""
        return not (self.tokenizer or self.pretrained)


@dataclass
class DataSettings:
    data: list[str] = option(
        ["stdlib"],
        ".txt, .jsonl or .parquet (rows of text, prompt and completion, or messages), a folder of sources, or stdlib: Python's own",
    )
    text_field: str = option("text", "column of .jsonl and .parquet that holds text")
    max_length: int = option(512, "tokens per sequence; text is packed into sequences of this length")
    validation_share: float = option(
        0.05, "share of the documents (of a single text: of its end) that is held out"
    )
    validation_sequences: int = option(256, "at most this many sequences are evaluated")


@dataclass
class LossSettings:
    divergence: str | None = option(
        None,
        f"{', '.join(DIVERGENCES)}; numbers follow a colon: jsd:0.5, alpha_beta:0.2,0.7; default forward_kl, in on_policy reverse_kl",
    )
    temperature: float = option(1.0, "of the soft term")
    temperature_squared: bool = option(False, "multiply the soft term by temperature^2")
    soft_weight: float = option(1.0, "of the divergence; in co the value that --soft_schedule comes to")
    hard_weight: float | None = option(None, "of the student's cross entropy; default 1 in co, else 0")
    gradient_tolerance: float = option(
        0.0, "share of the lm_head's gradient that may be left out for speed; 0 is exact"
    )
    soft_schedule: str = option("linear", "constant, linear, cosine, warmup_stable_decay or teacher_loss")
    soft_weight_start: float = option(0.0, "where linear, cosine and warmup_stable_decay begin")
    soft_warmup: float = option(0.1, "share of the steps that warmup_stable_decay rises (and falls) in")
    teacher_learning_rate: float = option(0.0, "0: learning_rate")


@dataclass
class GenerationSettings:
    completions: str | None = option(None, "the .jsonl to write; default OUTPUT_DIR/completions.jsonl")
    prompts: int = option(1024, "how many prompts the teacher completes")
    prompt_tokens: int = option(16, "how many of a training sequence's first tokens are its prompt")
    sampling_temperature: float = option(1.0, "0 is greedy")
    generation_batch_size: int = option(256, "prompts completed at a time")


@dataclass
class OnPolicySettings:
    student_share: float = option(
        1.0, "share of the micro-batches that the student writes; the others are --data itself"
    )
    new_tokens: int = option(0, "tokens that the student writes at most after a prompt; 0: up to max_length")
    judge: str = option(
        "full", "what the teacher tells of a token: full (the whole vocabulary), top_k:K or sampled (its own)"
    )


@dataclass
class CompareSettings:
    ways: list[str] = option(list(WAYS), f"the students that are compared: {', '.join(WAYS)}")
    co_teacher_at: float = option(
        0.0,
        "share of its training after which co goes on with a teacher made from scratch; 0: from the start",
    )
    judged_prompts: int = option(
        64, "held-out beginnings that every student continues, to judge what it writes"
    )


@dataclass
class RunSettings(TrainingArguments):
    """transformers.TrainingArguments with the defaults of this trainer."""

    output_dir: str | None = option(None, "folder of the run: its model, checkpoints and logs [required]")
    resume: bool = option(False, "go on from the last whole checkpoint in OUTPUT_DIR")
    max_steps: int = option(-1, "optimizer steps; overrides num_train_epochs if > 0")
    teacher_steps: int = option(0, "steps of a teacher made from scratch; 0: max_steps")
    learning_rate: float = option(5e-5, "of AdamW")
    lr_scheduler_type: str = option("cosine", "any of transformers' schedulers")
    warmup_steps: float = option(0.05, "steps, or a share of them if below 1")
    logging_steps: float = option(10, "steps between two lines of metrics.jsonl")
    eval_strategy: str = option("steps", "no, steps or epoch")
    eval_steps: float | None = option(500, "steps between two evaluations")
    save_steps: float = option(500, "steps between two checkpoints")
    save_total_limit: int | None = option(2, "the newest checkpoints that stay on disk; 0: all")
    report_to: list[str] | None = option(["none"], "tensorboard, wandb, ...; metrics.jsonl is always written")
    fsdp: bool | None = option(
        None, "shard models, optimizer and gradients (under torchrun); details in fsdp_config"
    )  # type: ignore[assignment]
    ddp_find_unused_parameters: bool | None = option(False, "every parameter takes part in every step")
    average_tokens_across_devices: bool = option(True, "the loss is per token of the whole batch")

    def __post_init__(self) -> None:
        # Where there is only a CPU, accelerate takes each process of torchrun for the only one unless it is told.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # transformers takes all but losses for better when larger.
            self.greater_is_better = self.metric_for_best_model.endswith("agreement")
        super().__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        """What Trainer writes to training_args.bin, and uploads: no token."""
        return {name: None if is_secret(name) else value for name, value in vars(self).items()}


#: What --help shows of TrainingArguments, beside what RunSettings sets; --help_all shows the rest.
SHOWN = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "bf16",
    "fsdp",
    "use_cpu",
    *RunSettings.__annotations__,
)


@dataclass
class Settings:
    """One run, resolved."""

    mode: str
    model: ModelSettings
    data: DataSettings
    loss: LossSettings
    generation: GenerationSettings
    policy: OnPolicySettings
    compare: CompareSettings
    run: RunSettings
    asked: dict[str, Any]  #: the options as they were given, before TrainingArguments resolves its own

    @property
    def output_dir(self) -> Path:
        return Path(str(self.run.output_dir))

    @property
    def replicas(self) -> int:
        """How many processes, or groups of them that share a model, have batches of their own."""
        return self.run.world_size // self.model.tensor_parallel

    def to_dict(self) -> dict[str, Any]:
        """What --config reads back: every option of the mode's, and of TrainingArguments what is shown or was set, but for
        tokens of the hub: it is written to files, and uploaded."""
        values: dict[str, Any] = {}
        for part in (self.model, self.data, self.loss, self.generation, self.policy, self.compare):
            values.update(dataclasses.asdict(part))
        for each in dataclasses.fields(RunSettings):
            if each.name in self.asked and (each.name in SHOWN or self.asked[each.name] != default_of(each)):
                values[each.name] = self.asked[each.name]
        del values["resume"]
        return {"mode": self.mode, **without_secrets(for_mode(self.mode, values))}


def is_secret(name: str) -> bool:
    """As transformers names what no file may show, hub_token."""
    return name.endswith("_token")


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not is_secret(name)}


def for_mode(mode: str, values: dict[str, Any]) -> dict[str, Any]:
    """The options that have a meaning in ``mode``."""
    return {name: value for name, value in values.items() if mode in modes_of(name)}


def modes_of(name: str) -> tuple[str, ...]:
    return _MODES_OF.get(name, tuple(MODES))


def default_of(each: dataclasses.Field) -> Any:
    return each.default if each.default_factory is dataclasses.MISSING else each.default_factory()


#: The title in --help -> its options.
PARTS = {
    "models": ModelSettings,
    "data": DataSettings,
    "loss": LossSettings,
    "what a model writes": GenerationSettings,
    "on_policy": OnPolicySettings,
    "compare": CompareSettings,
    "training (all of transformers.TrainingArguments; the rest under --help_all)": RunSettings,
}
#: Every option by its name.
FIELDS = {each.name: each for part in PARTS.values() for each in dataclasses.fields(part)}
#: Options that some modes alone have: a soft term, a teacher that trains, a teacher that writes.
_MODES_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("targets", "tensor_parallel", "keep_sharded"), ("soft",)),
    **dict.fromkeys(
        ("divergence", "temperature", "temperature_squared", "soft_weight", "hard_weight"),
        ("soft", "co", "on_policy", "compare"),
    ),
    **dict.fromkeys(
        ("soft_schedule", "soft_weight_start", "soft_warmup", "teacher_learning_rate"), ("co", "compare")
    ),
    **{each.name: ("hard", "compare") for each in dataclasses.fields(GenerationSettings)},
    **dict.fromkeys(("prompt_tokens", "sampling_temperature"), ("hard", "on_policy", "compare")),
    **{each.name: ("on_policy", "compare") for each in dataclasses.fields(OnPolicySettings)},
    **{each.name: ("compare",) for each in dataclasses.fields(CompareSettings)},
    "teacher_steps": ("compare",),
}


def divergence_of(text: str) -> kd.Divergence:
    """``jsd:0.5`` -> ``kd.JSD(0.5)``.

    >>> divergence_of("jsd:0.25").beta
    0.25
    """
    name, _, numbers = text.partition(":")
    if name not in DIVERGENCES:
        raise UserError(f"unknown divergence {name!r}; there are {', '.join(DIVERGENCES)}")
    try:
        given = [float(number) for number in numbers.split(",") if number]
        if len(given) > (most := len(inspect.signature(DIVERGENCES[name]).parameters)):
            raise ValueError(f"it has {most or 'no'} number{'s' * (most != 1)}, got {len(given)}")
        return DIVERGENCES[name](*given)
    except (TypeError, ValueError) as error:
        raise UserError(f"divergence {text!r}: {error}") from error
