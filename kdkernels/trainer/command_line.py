"""From the command line and YAML to checked :class:`Settings`."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import sys
import typing
from pathlib import Path
from typing import Any, Sequence

import torch
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .errors import UserError
from .refused import check, check_ranges
from .settings import FIELDS, MODES, PARTS, SHOWN, RunSettings, Settings, modes_of

_HINTS = {name: hint for part in PARTS.values() for name, hint in typing.get_type_hints(part).items()}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Long options once, without their metavar in capitals twice."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: Any) -> str:
        names = [n for n in action.option_strings if "-" not in n[2:]] or action.option_strings
        return ", ".join(names) if names else super()._format_action_invocation(action)


def _parser(parts: dict[str, Any], **about: str) -> HfArgumentParser:
    """What reads the dataclasses of a command, by their titles in --help."""
    for title, part in parts.items():
        part._argument_group_name = title
    classes: Any = list(parts.values())
    return HfArgumentParser(classes, formatter_class=HelpFormatter, allow_abbrev=False, **about)  # type: ignore[arg-type]


def parse_parts(parts: dict[str, Any], arguments: list[str], **about: str) -> tuple[Any, ...]:
    """The dataclasses of a command, by their titles in --help, filled from its arguments."""
    parser = _parser(parts, **about)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(f"unknown options {' '.join(unknown)}; see --help")
    check_repeated(parser, arguments)
    check_ranges(vars(given))
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)


def check_repeated(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Raises :class:`UserError` for a list that is given twice: argparse keeps the last one alone."""
    named = [word.partition("=")[0] for word in arguments]
    for action in parser._actions:
        if action.nargs == "+" and sum(named.count(name) for name in action.option_strings) > 1:
            raise UserError(f"--{action.dest} is given twice; give all its values after one")


def parser_for(mode: str, *, show_all: bool = False) -> HfArgumentParser:
    parser = _parser(
        PARTS,
        prog=f"python -m kdkernels train {mode}",
        usage="%(prog)s --output_dir DIR [--config FILE.yaml] [options]",
        description=f"{mode}: {MODES[mode]}.",
    )
    parser.add_argument("--config", help="YAML of options; the command line overrides it")
    parser.add_argument("--help_all", action="store_true", help="every option of TrainingArguments too")
    ours = {f.name for part in PARTS.values() if part is not RunSettings for f in dataclasses.fields(part)}
    shown = {*ours, *SHOWN}
    for action in parser._actions:
        if action.type is string_to_bool:  # also those whose default is None: `--fsdp` is `--fsdp true`
            action.nargs, action.const = "?", True
        if action.dest in FIELDS and (
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
            raise UserError(f"unknown options {' '.join(unknown)}; see --help_all")
        check_repeated(parser, arguments)
        model, data, loss, generation, policy, compare, run, _ = parser.parse_args_into_dataclasses(
            line, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError, OSError) as error:  # TrainingArguments' own checks
        raise UserError(" ".join(str(error).split())) from error
    asked = {name: _plain(value) for name, value in vars(given).items() if name in FIELDS}
    settings = Settings(mode, model, data, loss, generation, policy, compare, run, asked)
    check(settings)
    if settings.loss.hard_weight is None:
        settings.loss.hard_weight = 1.0 if mode == "co" else 0.0
    if settings.loss.divergence is None:
        settings.loss.divergence = "reverse_kl" if mode == "on_policy" else "forward_kl"
    run.dataloader_pin_memory = run.dataloader_pin_memory and torch.cuda.is_available()
    settings.loss.teacher_learning_rate = settings.loss.teacher_learning_rate or run.learning_rate
    return settings


def _plain(value: Any) -> Any:
    """The value as YAML and the command line have it: enums by their names."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.value if isinstance(value, enum.Enum) else value


def _as_arguments(values: dict[str, Any], parser: HfArgumentParser) -> list[str]:
    """``values`` as a command line, so that they meet the same checks of their types."""
    takes_list = {action.dest for action in parser._actions if action.nargs == "+"}
    line = []
    for name, value in values.items():
        if value is False and name.endswith("_strategy"):
            value = "no"  # as YAML 1.1 reads it
        if value == parser.get_default(name) and type(value) is type(parser.get_default(name)):
            continue
        if value is None:
            if type(None) not in typing.get_args(_HINTS[name]):
                raise UserError(f"{name} is null; leave it out for its default, {parser.get_default(name)}")
            parser.set_defaults(**{name: None})
        elif isinstance(value, list) and name in takes_list:
            line += [f"--{name}", *map(str, value)]
        elif isinstance(value, list):
            raise UserError(f"{name}={value}: one value, not a list")
        else:
            line.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return line


def _yaml(path: Path, mode: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must map options to values, got {type(values).__name__}")
    if values.pop("mode", mode) != mode:
        raise UserError(f"--config {path} is of another mode than {mode}")
    unknown = sorted(str(name) for name in values if name not in FIELDS)
    if unknown:
        raise UserError(f"--config {path} has unknown options {', '.join(unknown)}; see --help_all")
    return values
