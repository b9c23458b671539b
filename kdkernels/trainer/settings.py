"""Everything that can be set: dataclasses, read from the command line or from YAML."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

import kdkernels as kd

MODES = {
    "soft": "the student learns the teacher's distribution (live teacher, no logits held)",
    "hard": "the teacher writes, or wrote, text; the student imitates it with fused linear cross entropy",
    "co": "teacher and student train together, one codistillation_loss per step",
    "compare": "the three and a student without a teacher, at the same token budget: a table and a picture",
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
#: Llama-style models made from scratch: hidden_size, intermediate_size, layers, heads.
SCRATCH = {"micro": (32, 64, 1, 2), "tiny": (128, 320, 2, 4), "small": (192, 512, 4, 4)}


class Problem(Exception):
    """Something that the user can put right: the command prints this one line and exits with 1."""


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Errors that libraries raise over files and options become one :class:`Problem` of one line."""
    try:
        yield
    except Problem:
        raise
    except Exception as error:  # tokenizers raises nothing narrower when the disk is full
        raise Problem(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says first; its next line too where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelSettings:
    student: str = option(
        "tiny", f"a transformers causal LM (folder or name), or {', '.join(SCRATCH)}: from scratch"
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
    validation_share: float = option(
        0.05, "share of the documents (of a single text: of its end) that is held out"
    )
    validation_sequences: int = option(256, "at most this many sequences are evaluated")


@dataclass
class LossSettings:
    divergence: str = option("forward_kl", f"{', '.join(DIVERGENCES)}; parameters follow a colon: jsd:0.5")
    temperature: float = option(1.0, "of the soft term")
    temperature_squared: bool = option(False, "multiply the soft term by temperature^2")
    soft_weight: float = option(1.0, "of the divergence; in co the value that --soft_schedule comes to")
    hard_weight: float | None = option(None, "of the student's cross entropy; default 0 in soft, 1 in co")
    soft_schedule: str = option("linear", "constant, linear, cosine, warmup_stable_decay or teacher_loss")
    soft_weight_start: float = option(0.0, "where linear, cosine and warmup_stable_decay begin")
    soft_warmup: float = option(0.1, "share of the steps that warmup_stable_decay rises (and falls) in")
    teacher_learning_rate: float = option(0.0, "0: learning_rate")


@dataclass
class GenerationSettings:
    completions: str | None = option(None, "the .jsonl to write; default OUTPUT_DIR/completions.jsonl")
    prompts: int = option(1024, "how many prompts the teacher completes")
    prompt_tokens: int = option(16, "prompts are the first tokens of so many training sequences")
    sampling_temperature: float = option(1.0, "0 is greedy")
    generation_batch_size: int = option(256, "prompts completed at a time")


@dataclass
class RunSettings(TrainingArguments):
    """transformers.TrainingArguments with the defaults of this trainer."""

    output_dir: str | None = option(None, "where the run is kept [required]")
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
    save_total_limit: int | None = option(2, "checkpoints that are kept; 0: all")
    report_to: list[str] | None = option(["none"], "tensorboard, wandb, ...; metrics.jsonl is always written")
    fsdp: bool | None = option(
        None, "shard models, optimizer and gradients (under torchrun); details in fsdp_config"
    )  # type: ignore[assignment]
    ddp_find_unused_parameters: bool | None = option(False, "every parameter takes part in every step")
    average_tokens_across_devices: bool = option(True, "the loss is per token of the whole batch")

    def __post_init__(self) -> None:
        # Where there is only a CPU, accelerate takes each process of torchrun for the only one unless it is told.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


#: What --help shows of TrainingArguments, beside what RunSettings sets; --help_all shows the rest.
_SHOWN = (
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
    run: RunSettings
    asked: dict[str, Any]  #: the options as they were given, before TrainingArguments resolves its own

    @property
    def output_dir(self) -> Path:
        return Path(str(self.run.output_dir))

    def to_dict(self) -> dict[str, Any]:
        """What --config reads back: every option of the mode's, and of TrainingArguments what is shown or was set."""
        values: dict[str, Any] = {}
        for part in (self.model, self.data, self.loss, self.generation):
            values.update(dataclasses.asdict(part))
        for each in dataclasses.fields(RunSettings):
            if each.name in self.asked and (each.name in _SHOWN or self.asked[each.name] != _default(each)):
                values[each.name] = self.asked[each.name]
        del values["resume"]
        return {"mode": self.mode, **for_mode(self.mode, values)}


def for_mode(mode: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that have a meaning in ``mode``."""
    return {name: value for name, value in values.items() if mode in modes_of(name)}


def modes_of(name: str) -> tuple[str, ...]:
    return _MODES_OF.get(name, tuple(MODES))


def _default(each: dataclasses.Field) -> Any:
    return each.default if each.default_factory is dataclasses.MISSING else each.default_factory()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Long options once, without their metavar in capitals twice."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: Any) -> str:
        names = [n for n in action.option_strings if "-" not in n[2:]] or action.option_strings
        return ", ".join(names) if names else super()._format_action_invocation(action)


_PARTS = {
    "models": ModelSettings,
    "data": DataSettings,
    "loss": LossSettings,
    "what the teacher writes": GenerationSettings,
    "training (all of transformers.TrainingArguments; the rest under --help_all)": RunSettings,
}
_FIELDS = {each.name: each for part in _PARTS.values() for each in dataclasses.fields(part)}
_HINTS = {name: hint for part in _PARTS.values() for name, hint in typing.get_type_hints(part).items()}
#: Options that some modes alone have: a soft term, a teacher that trains, a teacher that writes.
_MODES_OF: dict[str, tuple[str, ...]] = {
    "targets": ("soft",),
    **dict.fromkeys(
        ("divergence", "temperature", "temperature_squared", "soft_weight", "hard_weight"),
        ("soft", "co", "compare"),
    ),
    **dict.fromkeys(
        ("soft_schedule", "soft_weight_start", "soft_warmup", "teacher_learning_rate"), ("co", "compare")
    ),
    **{each.name: ("hard", "compare") for each in dataclasses.fields(GenerationSettings)},
    "teacher_steps": ("compare",),
}


def parser_for(mode: str, *, show_all: bool = False) -> HfArgumentParser:
    parts: Any = list(_PARTS.values())
    for title, part in _PARTS.items():
        part._argument_group_name = title  # type: ignore[attr-defined]
    parser = HfArgumentParser(
        parts,
        prog=f"python -m kdkernels train {mode}",
        formatter_class=HelpFormatter,
        usage="%(prog)s --output_dir DIR [--config FILE.yaml] [options]",
        description=f"{mode}: {MODES[mode]}.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML of options; those on the command line go before it")
    parser.add_argument("--help_all", action="store_true", help="every option of TrainingArguments too")
    ours = {f.name for part in parts if part is not RunSettings for f in dataclasses.fields(part)}
    shown = {*ours, *_SHOWN}
    for action in parser._actions:
        if action.type is string_to_bool:  # also those whose default is None: `--fsdp` is `--fsdp true`
            action.nargs, action.const = "?", True
        if action.dest in _FIELDS and (
            mode not in modes_of(action.dest)
            or not show_all
            and (action.dest not in shown or action.option_strings[0].startswith("--no_"))
        ):
            action.help = argparse.SUPPRESS
    return parser


def parse(mode: str, arguments: list[str]) -> Settings:
    """Settings from the command line, over those of ``--config``, over the defaults."""
    parser = parser_for(mode, show_all="--help_all" in arguments)
    if "--help_all" in arguments:
        parser.print_help()
        sys.exit(0)
    config = argparse.ArgumentParser(prog=parser.prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(arguments)[0].config
    return resolve(mode, {} if path is None else _yaml(Path(path), mode), arguments, parser)


def resolve(
    mode: str,
    values: dict[str, Any],
    arguments: Sequence[str] = (),
    parser: HfArgumentParser | None = None,
) -> Settings:
    """Settings from ``values`` (as a config.yaml holds them), under those of the command line."""
    parser = parser or parser_for(mode)
    line = [*_as_arguments(values, parser), *arguments]
    try:
        given, unknown = parser.parse_known_args(line)
        if unknown:
            raise Problem(f"unknown options {' '.join(unknown)}; see --help_all")
        model, data, loss, generation, run, _ = parser.parse_args_into_dataclasses(
            line, look_for_args_file=False
        )
    except (ValueError, ImportError, OSError) as error:  # TrainingArguments' own checks
        raise Problem(" ".join(str(error).split())) from error
    asked = {name: value for name, value in vars(given).items() if name in _FIELDS}
    settings = Settings(mode, model, data, loss, generation, run, asked)
    check(settings)
    if settings.loss.hard_weight is None:
        settings.loss.hard_weight = 1.0 if mode == "co" else 0.0
    run.dataloader_pin_memory = run.dataloader_pin_memory and torch.cuda.is_available()
    settings.loss.teacher_learning_rate = settings.loss.teacher_learning_rate or run.learning_rate
    return settings


def _as_arguments(values: dict[str, Any], parser: HfArgumentParser) -> list[str]:
    """``values`` as a command line, so that they meet the same checks of their types."""
    takes_list = {action.dest for action in parser._actions if action.nargs == "+"}
    line = []
    for name, value in values.items():
        if value == parser.get_default(name) and type(value) is type(parser.get_default(name)):
            continue
        if value is None:
            if type(None) not in typing.get_args(_HINTS[name]):
                raise Problem(f"{name} is null; leave it out for its default, {parser.get_default(name)}")
            parser.set_defaults(**{name: None})
        elif isinstance(value, list) and name in takes_list:
            line += [f"--{name}", *map(str, value)]
        elif isinstance(value, list):
            raise Problem(f"{name}={value}: one value, not a list")
        else:
            line.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return line


def _yaml(path: Path, mode: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Problem(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise Problem(f"--config {path} must map options to values, got {type(values).__name__}")
    if values.pop("mode", mode) != mode:
        raise Problem(f"--config {path} is of another mode than {mode}")
    unknown = sorted(str(name) for name in values if name not in _FIELDS)
    if unknown:
        raise Problem(f"--config {path} has unknown options {', '.join(unknown)}; see --help_all")
    return values


# -- what cannot be, before anything is read --------------------------------------------------------

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
            "save_total_limit",
            "dataloader_num_workers",
            "neftune_noise_alpha",
        ),
        _SIZE,
    ),
    **dict.fromkeys(("num_train_epochs", "temperature"), _ABOVE_0),
    "max_length": (
        "is too short: a sequence needs 2 tokens or more to predict one",
        lambda value: value >= 2,
    ),
    "tokenizer_size": (
        "is too small: 256 bytes and the end of text are 257 tokens",
        lambda value: value >= 257,
    ),
    "validation_share": ("is no share from 0 to below 1", lambda value: 0 <= value < 1),
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
    "use_cache": "the loss needs no cache, and the saved config keeps what the model's own says; leave it out",
    "batch_eval_metrics": "it needs logits, which are never held; leave it out",
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict"),
        "every run trains, and evaluates by --eval_strategy; leave it out",
    ),
}


def check(settings: Settings) -> None:
    """Raises :class:`Problem` for what cannot be, and for what would be passed over without a word."""
    mode, asked, loss, run = settings.mode, settings.asked, settings.loss, settings.run
    if not asked["output_dir"]:
        raise Problem("no --output_dir: where shall the run be kept?")
    for name, value in asked.items():
        if value == _default(_FIELDS[name]):
            continue
        if mode not in modes_of(name):
            raise Problem(
                f"{name}={value}: {mode} has none, it is of {', '.join(modes_of(name))}; leave it out"
            )
        if name in _REFUSED:
            raise Problem(f"{name}={value}: {_REFUSED[name]}")
        what, holds = _RANGES.get(name, ("", bool))
        if what and value is not None and not holds(value):
            raise Problem(f"{name}={value} {what}")
    if run.torch_compile:  # its backend and mode turn it on
        raise Problem(
            "torch_compile: the loss runs inside the lm_head's forward, which torch.compile cannot follow; "
            "leave it out"
        )
    if run.use_liger_kernel and (mode in ("co", "compare") or run.device.type == "cpu"):
        where = "a GPU, and this run has none" if run.device.type == "cpu" else "one model, and co trains two"
        raise Problem(
            f"use_liger_kernel={run.use_liger_kernel}: Liger's kernels need {where}; leave it out "
            "(the loss is fused without them)"
        )
    weights = (
        loss.soft_weight,
        1.0 if mode == "co" and loss.hard_weight is None else loss.hard_weight,
        loss.soft_weight_start if mode == "co" else 0.0,
    )
    if not any(weights):
        raise Problem("soft_weight=0 and hard_weight=0: the student would learn nothing; set one above 0")
    if mode != "hard" and settings.model.teacher is None and settings.model.targets is None:
        cached = ", or --targets that `python -m kdkernels cache` wrote" if mode == "soft" else ""
        raise Problem(f"{mode} needs a --teacher{cached}")
    if settings.model.teacher is not None and settings.model.targets is not None:
        raise Problem("give --teacher or --targets, not both: the targets are the teacher")
    if settings.model.dtype not in ("float32", "bfloat16"):
        raise Problem(f"dtype={settings.model.dtype}: there are float32 and bfloat16")
    if settings.model.lora_modules != ["all-linear"] and not settings.model.lora_rank:
        raise Problem(
            f"lora_modules={' '.join(settings.model.lora_modules)} without LoRA: give --lora_rank too"
        )
    completions = settings.generation.completions
    if completions is not None and settings.model.teacher is None:
        raise Problem(
            f"completions={completions}, but no --teacher writes them; text that is there already is --data"
        )
    if completions is not None and Path(completions).suffix != ".jsonl":
        raise Problem(f"completions={completions}: the name must end in .jsonl")
    divergence_of(loss.divergence)


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
