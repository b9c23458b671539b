"""Whose a folder is: a run or a comparison overwrites nothing of another's, and goes on only as it was begun."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, Iterator

import yaml

from .errors import UserError, one_line
from .files import locked, only_steps, raised_by_all, write_whole
from .on_policy import WRITTEN
from .progress import say
from .reliable import checkpoints
from .report import PICTURE
from .settings import WAYS, Settings, for_mode, without_secrets

RESULT, CONFIG, METRICS = "result.json", "config.yaml", "metrics.jsonl"
#: The folder of a tokenizer that is trained on --data.
TOKENIZER = "tokenizer"
#: The text and the number of processes that a run began with; of a comparison, its mode and whether it trains a tokenizer.
BEGUN = "begun.json"
_LINES = re.compile(rf"{re.escape(METRICS)}|(\d+-)?{re.escape(WRITTEN)}")
#: What a comparison writes beside its stages, METRICS among it.
COMPARISON, REPORT = "comparison.json", "report.md"


# -- a run's folder ---------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(settings: Settings) -> Iterator[bool]:
    """The run's folder for this run alone; whether the run is new. What the first process finds wrong, all of them raise."""
    folder, fresh = settings.output_dir, False
    with contextlib.ExitStack() as held:
        with raised_by_all(settings.run.world_size):
            if not settings.run.process_index:
                with one_line(f"cannot use --output_dir {folder}"):
                    folder.mkdir(parents=True, exist_ok=True)
                    held.enter_context(
                        locked(folder, f"another process is training in {folder}; wait for it")
                    )
                    fresh = claim_folder(settings)
        yield fresh


def claim_folder(settings: Settings) -> bool:
    """Writes the run's config.yaml; True if there was none."""
    path = settings.output_dir / CONFIG
    if path.exists():
        check_same_settings(settings)
        if not begun(settings.output_dir):
            discard_tokenizer(settings)
        return False
    names = [path.name for path in checkpoints(settings.output_dir)] + [RESULT, "model", COMPARISON]
    names += [TOKENIZER] if settings.model.trains_tokenizer else []
    others = [name for name in names if (settings.output_dir / name).exists()]
    others += [path.name for path in _lines_of(settings.output_dir) if _is_anothers(path)]
    others += [BEGUN] if begun_comparison(settings.output_dir) else []
    if others:
        raise UserError(
            f"--output_dir {settings.output_dir} holds {others[0]}, but no {CONFIG} of a run: it is not overwritten, "
            "choose another folder"
        )
    if settings.run.resume:
        say(f"nothing to resume in {settings.output_dir}: a new run begins")
    (settings.output_dir / BEGUN).unlink(missing_ok=True)  # of a run that could not begin
    write_whole(path, yaml.safe_dump(settings.to_dict(), sort_keys=False))
    return True


def _lines_of(folder: Path) -> list[Path]:
    """The files to which a run adds a line at a time; on-policy each process has one."""
    return [path for path in sorted(folder.glob("*.jsonl")) if _LINES.fullmatch(path.name)]


def _is_anothers(lines: Path) -> bool:
    """Whether ``lines`` may be a file that is not to be lost. A run that could not begin has removed its own, but its other
    processes may have added to theirs after that: those hold nothing but steps."""
    if lines.name in (METRICS, WRITTEN):
        return bool(lines.stat().st_size)
    return not only_steps(lines)


def begun(folder: Path) -> bool:
    """Whether the run in a folder has come as far as its text."""
    return any((folder / name).exists() for name in (BEGUN, RESULT)) or bool(checkpoints(folder))


def leave_free(settings: Settings) -> None:
    """A run that could not begin leaves its folder free for another. config.yaml says whose the others are."""
    folder = settings.output_dir
    if not checkpoints(folder):
        for path in (*_lines_of(folder), folder / BEGUN, folder / CONFIG):
            path.unlink(missing_ok=True)
        discard_tokenizer(settings)


def discard_tokenizer(settings: Settings) -> None:
    """Removes a tokenizer that no run has begun with: the next one may be of another size, or of other text."""
    if settings.model.trains_tokenizer:
        shutil.rmtree(settings.output_dir / TOKENIZER, ignore_errors=True)


def check_same_settings(settings: Settings) -> None:
    """A run is never overwritten, and only goes on under its own settings."""
    folder = settings.output_dir
    if not settings.run.resume:
        raise UserError(
            f"{folder} already holds a run: --resume goes on with it; or choose another --output_dir"
        )
    with one_line(f"cannot read {folder / CONFIG}"):
        before = for_mode(settings.mode, without_secrets(yaml.safe_load((folder / CONFIG).read_text())))
    now = settings.to_dict()
    changed = sorted(
        n for n in before.keys() | now.keys() if before.get(n) != now.get(n) and n != "output_dir"
    )
    if changed:
        raise UserError(
            f"{folder} was made with other settings ("
            + ", ".join(f"{n} {before.get(n)}, now {now.get(n)}" for n in changed)
            + "); choose another --output_dir"
        )


def check_begun(settings: Settings, text: str) -> None:
    """A run goes on with the text (its fingerprint) and the processes that it began with: its batches would not be the
    same ones."""
    folder, run = settings.output_dir, settings.run
    now = {"text": text, "processes": run.world_size}
    path = folder / BEGUN
    if not path.exists():
        if not run.process_index:
            write_whole(path, json.dumps(now))
        return
    before = begun_with(path)
    if before["text"] != now["text"]:
        raise UserError(
            f"{folder} was begun on other text than --data {' '.join(settings.data.data)} holds now; "
            "choose another --output_dir"
        )
    if before["processes"] != now["processes"]:
        raise UserError(
            f"{folder} was begun by {before['processes']} of torchrun's processes, and now there are "
            f"{now['processes']}: torchrun --nproc_per_node {before['processes']}"
        )


def begun_with(path: Path) -> dict[str, Any]:
    """What a begun.json says of a run. UserError if it is not as a run writes it."""
    with one_line(f"cannot read {path}"):
        before = json.loads(path.read_text())
    if not isinstance(before, dict) or not {"text", "processes"} <= before.keys():
        raise UserError(
            f"{path} is damaged: it does not say what the run began with; delete it if --data is what it was"
        )
    return before


# -- a comparison's ---------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed_comparison(settings: Settings) -> Iterator[None]:
    """The folder for a comparison: a new one, or one that a command before this one began."""
    claim_comparison(settings)
    folder = settings.output_dir
    try:
        yield
    except UserError:
        if not any_stage_begun(folder) and not (folder / COMPARISON).exists():
            # What could not begin leaves its folder free for another.
            (folder / BEGUN).unlink(missing_ok=True)
            discard_tokenizer(settings)
        raise


def claim_comparison(settings: Settings) -> None:
    """Writes whose the folder is to begun.json. UserError if something else would be overwritten there."""
    folder, trains = settings.output_dir, settings.model.trains_tokenizer
    before, anew = begun_comparison(folder), not any_stage_begun(folder)
    if anew and before.get("trains_tokenizer"):
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)  # of a command that was killed
    names = [
        *(() if before else (REPORT, PICTURE, METRICS, COMPARISON)),
        *([TOKENIZER] if anew and trains else ()),
    ]
    if others := [name for name in names if (folder / name).exists()]:
        raise UserError(
            f"--output_dir {folder} holds {others[0]}, but no comparison: it is not overwritten, choose another folder"
        )
    with one_line(f"cannot use --output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / BEGUN, json.dumps({"mode": "compare", "trains_tokenizer": trains}))


def begun_comparison(folder: Path) -> dict[str, Any]:
    """What begun.json says of a comparison; {} if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # nothing of ours
        values = json.loads((folder / BEGUN).read_text())
        if values["mode"] == "compare":
            return values
    return {}


def any_stage_begun(folder: Path) -> bool:
    return any(begun(folder / name) for name in ("teacher", *WAYS))
