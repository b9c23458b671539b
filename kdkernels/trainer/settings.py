"""Everything that can be set: dataclasses, read from the command line or from YAML."""

from __future__ import annotations

import dataclasses
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Sequence

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

import kdkernels as kd

MODES = {
    "soft": "the student learns the teacher's distribution (live teacher, no logits held)",
    "hard": "the teacher writes, or wrote, text; the student imitates it with fused linear cross entropy",
    "co": "teacher and student train together, one codistillation_loss per step",
    "compare": "the three and a student without a teacher, at the same token budget: a table and a picture",
}
DIVERGENCES = {
    "forward_kl": kd.ForwardKL, "reverse_kl": kd.ReverseKL, "jsd": kd.JSD, "skew_kl": kd.SkewKL,
    "skew_reverse_kl": kd.SkewReverseKL, "total_variation": kd.TotalVariation, "alpha_beta": kd.AlphaBeta,
    "mixed": kd.Mixed,
}  # fmt: skip
#: Llama-style models made from scratch: hidden_size, intermediate_size, layers, heads.
SCRATCH = {"micro": (32, 64, 1, 2), "tiny": (128, 320, 2, 4), "small": (192, 512, 4, 4)}


class Problem(Exception):
    """Something that the user can put right: the command prints this one line and exits with 1."""


def option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelSettings:
    student: str = option(
        "tiny", f"a transformers causal LM (folder or name), or {', '.join(SCRATCH)}: from scratch"
    )
    teacher: Optional[str] = option(
        None, "the same for the teacher; hard needs none if --data holds its completions"
    )
    targets: Optional[str] = option(
        None, "soft: what `python -m kdkernels cache` wrote, instead of a teacher"
    )
    tokenizer: Optional[str] = option(
        None, "folder or name; default: the student's, else the teacher's, else trained"
    )
    tokenizer_size: int = option(8192, "vocabulary of a BPE tokenizer that is trained on --data")
    dtype: str = option("float32", "of both models: float32 or bfloat16")
    lora_rank: int = option(0, "train LoRA adapters of this rank on the student; 0 trains all of it")
    lora_modules: list[str] = option(["all-linear"], "what LoRA is put on, such as q_proj v_proj lm_head")

    @property
    def pretrained(self) -> list[str]:
        """The models that are loaded and not made from scratch."""
        return [name for name in (self.student, self.teacher) if name is not None and name not in SCRATCH]


@dataclass
class DataSettings:
    data: list[str] = option(
        ["stdlib"], ".txt, .jsonl, .parquet, a folder of sources, or stdlib: Python's own"
    )
    text_field: str = option("text", "column of .jsonl and .parquet that holds text")
    max_length: int = option(512, "tokens per sequence; text is packed into sequences of this length")
    validation_share: float = option(0.05, "share of the documents (of a single text: of its end) that is held out")
    validation_sequences: int = option(256, "at most this many sequences are evaluated")


@dataclass
class LossSettings:
    divergence: str = option("forward_kl", f"{', '.join(DIVERGENCES)}; parameters follow a colon: jsd:0.5")
    temperature: float = option(1.0, "of the soft term")
    temperature_squared: bool = option(False, "multiply the soft term by temperature^2")
    soft_weight: float = option(1.0, "of the divergence; in co the value that --soft_schedule comes to")
    hard_weight: Optional[float] = option(None, "of the student's cross entropy; default 0 in soft, 1 in co")
    soft_schedule: str = option("linear", "co: constant, linear, cosine, warmup_stable_decay or teacher_loss")
    soft_weight_start: float = option(0.0, "co: where linear, cosine and warmup_stable_decay begin")
    soft_warmup: float = option(0.1, "co: share of the steps that warmup_stable_decay rises (and falls) in")
    teacher_learning_rate: float = option(0.0, "co and compare; 0: learning_rate")


@dataclass
class GenerationSettings:
    completions: Optional[str] = option(
        None, "hard: the .jsonl to write; default OUTPUT_DIR/completions.jsonl"
    )
    prompts: int = option(1024, "hard: how many prompts the teacher completes")
    prompt_tokens: int = option(16, "hard: prompts are the first tokens of so many training sequences")
    sampling_temperature: float = option(1.0, "hard: 0 is greedy")
    generation_batch_size: int = option(256, "hard: prompts completed at a time")


@dataclass
class RunSettings(TrainingArguments):
    """transformers.TrainingArguments with the defaults of this trainer."""

    output_dir: Optional[str] = option(None, "where the run is kept [required]")
    resume: bool = option(False, "go on from the last whole checkpoint in OUTPUT_DIR")
    max_steps: int = option(-1, "optimizer steps; overrides num_train_epochs if > 0")
    teacher_steps: int = option(0, "compare: steps of a teacher made from scratch; 0: max_steps")
    learning_rate: float = option(5e-5, "of AdamW")
    lr_scheduler_type: str = option("cosine", "any of transformers' schedulers")
    warmup_steps: float = option(0.05, "steps, or a share of them if below 1")
    logging_steps: float = option(10, "steps between two lines of metrics.jsonl")
    eval_strategy: str = option("steps", "no, steps or epoch")
    eval_steps: Optional[float] = option(500, "steps between two evaluations")
    save_steps: float = option(500, "steps between two checkpoints")
    save_total_limit: Optional[int] = option(2, "checkpoints that are kept")
    report_to: Optional[list[str]] = option(
        ["none"], "tensorboard, wandb, ...; metrics.jsonl is always written"
    )
    fsdp: Optional[bool] = option(
        None, "shard models, optimizer and gradients (under torchrun); details in fsdp_config"
    )  # type: ignore[assignment]
    ddp_find_unused_parameters: Optional[bool] = option(False, "every parameter takes part in every step")
    average_tokens_across_devices: bool = option(True, "the loss is per token of the whole batch")


#: What --help shows of TrainingArguments, beside what RunSettings sets; --help_all shows the rest.
_SHOWN = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay",
          "max_grad_norm", "seed", "bf16", "fsdp", "use_cpu", *RunSettings.__annotations__)  # fmt: skip


@dataclass
class Settings:
    """One run, resolved."""

    mode: str
    model: ModelSettings
    data: DataSettings
    loss: LossSettings
    generation: GenerationSettings
    run: RunSettings
    asked: dict[str, Any]  #: the options as they were given, before TrainingArguments resolves its own

    @property
    def output_dir(self) -> Path:
        return Path(str(self.run.output_dir))

    def to_dict(self) -> dict[str, Any]:
        """What --config reads back: every option of ours, and of TrainingArguments what is shown or was set."""
        values: dict[str, Any] = {}
        for part in (self.model, self.data, self.loss, self.generation):
            values.update(dataclasses.asdict(part))
        for each in dataclasses.fields(RunSettings):
            if each.name in self.asked and (each.name in _SHOWN or self.asked[each.name] != _default(each)):
                values[each.name] = self.asked[each.name]
        del values["resume"]
        return {"mode": self.mode, **values}


def _default(each: dataclasses.Field) -> Any:
    return each.default if each.default_factory is dataclasses.MISSING else each.default_factory()


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Long options once, without their metavar in capitals twice."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: Any) -> str:
        names = [n for n in action.option_strings if "-" not in n[2:]] or action.option_strings
        return ", ".join(names) if names else super()._format_action_invocation(action)


_PARTS = {"models": ModelSettings, "data": DataSettings, "loss": LossSettings,
          "hard mode: the teacher writes": GenerationSettings,
          "training (all of transformers.TrainingArguments; the rest under --help_all)": RunSettings}  # fmt: skip


def parser_for(mode: str, *, show_all: bool = False) -> HfArgumentParser:
    parts: Any = list(_PARTS.values())
    for title, part in _PARTS.items():
        part._argument_group_name = title  # type: ignore[attr-defined]
    parser = HfArgumentParser(
        parts, prog=f"python -m kdkernels train {mode}", formatter_class=HelpFormatter,
        usage="%(prog)s --output_dir DIR [--config FILE.yaml] [options]", description=f"{mode}: {MODES[mode]}.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", help="YAML of options; those on the command line go before it")
    parser.add_argument("--help_all", action="store_true", help="every option of TrainingArguments too")
    ours = {f.name for part in parts if part is not RunSettings for f in dataclasses.fields(part)}
    shown = {*ours, *_SHOWN, "help", "config", "help_all"}
    for action in parser._actions:
        if not show_all and (action.dest not in shown or action.option_strings[0].startswith("--no_")):
            action.help = SUPPRESS
    return parser


def parse(mode: str, arguments: list[str]) -> Settings:
    """Settings from the command line, over those of ``--config``, over the defaults."""
    parser = parser_for(mode, show_all="--help_all" in arguments)
    if "--help_all" in arguments:
        parser.print_help()
        sys.exit(0)
    config = _flag_value(arguments, "--config")
    return resolve(mode, {} if config is None else _yaml(Path(config), mode, parser), arguments, parser)


def resolve(mode: str, values: dict[str, Any], arguments: Sequence[str] = (),
            parser: Optional[HfArgumentParser] = None) -> Settings:  # fmt: skip
    """Settings from ``values`` (as a config.yaml holds them), under those of the command line."""
    parser = parser or parser_for(mode)
    parser.set_defaults(**values)
    try:
        parts = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    except (ValueError, ImportError) as error:  # TrainingArguments' own checks
        raise Problem(" ".join(str(error).split())) from error
    model, data, loss, generation, run = parts[:5]
    asked = vars(parser.parse_args(list(arguments)))
    settings = Settings(mode, model, data, loss, generation, run, asked)
    if not settings.asked["output_dir"]:
        raise Problem("no --output_dir: where shall the run be kept?")
    if settings.loss.hard_weight is None:
        settings.loss.hard_weight = 1.0 if mode == "co" else 0.0
    run.dataloader_pin_memory = run.dataloader_pin_memory and torch.cuda.is_available()
    settings.loss.teacher_learning_rate = settings.loss.teacher_learning_rate or settings.run.learning_rate
    if settings.data.max_length < 2:
        raise Problem(
            f"max_length={settings.data.max_length}: a sequence needs 2 tokens or more to predict one"
        )
    if not 0 <= settings.data.validation_share < 1:
        raise Problem(f"validation_share={settings.data.validation_share:g}: a share is from 0 to below 1")
    if not settings.loss.temperature > 0:
        raise Problem(f"temperature={settings.loss.temperature:g} must be above 0")
    if settings.model.dtype not in ("float32", "bfloat16"):
        raise Problem(f"dtype={settings.model.dtype}: there are float32 and bfloat16")
    return settings


def _flag_value(arguments: list[str], flag: str) -> Optional[str]:
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None


def _yaml(path: Path, mode: str, parser: HfArgumentParser) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise Problem(f"cannot read --config {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise Problem(f"--config {path} must map options to values, got {type(values).__name__}")
    if values.pop("mode", mode) != mode:
        raise Problem(f"--config {path} is of another mode than {mode}")
    unknown = sorted(set(values) - {action.dest for action in parser._actions})
    if unknown:
        raise Problem(f"--config {path} has unknown options {', '.join(unknown)}; see --help_all")
    return values


def divergence_of(text: str) -> kd.Divergence:
    """``jsd:0.5`` -> ``kd.JSD(0.5)``.

    >>> divergence_of("jsd:0.25").beta
    0.25
    """
    name, _, numbers = text.partition(":")
    if name not in DIVERGENCES:
        raise Problem(f"unknown divergence {name!r}; there are {', '.join(DIVERGENCES)}")
    try:
        return DIVERGENCES[name](*[float(number) for number in numbers.split(",") if number])
    except (TypeError, ValueError) as error:
        raise Problem(f"divergence {text!r}: {error}") from error
