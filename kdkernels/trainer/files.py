"""Files that a killed process leaves whole and that several processes share, and errors that all of these raise."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any, Iterator

from accelerate.utils import gather_object

from .errors import UserError, one_line


@contextlib.contextmanager
def locked(path: Path, problem: str) -> Iterator[None]:
    """A file or folder for this process alone, until it leaves or is killed. UserError if another one has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(problem) from None
        except OSError:
            pass  # a file system that has no locks
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # of forked processes too
        os.close(handle)


@contextlib.contextmanager
def raised_by_all(processes: int) -> Iterator[None]:
    """What one process finds wrong, all of them raise: one that went on would wait for it in vain."""
    found: list[str | None] = [None]
    try:
        yield
    except UserError as error:
        found = [str(error)]
    if processes > 1:
        found = gather_object(found)
    for problem in found:
        if problem is not None:
            raise UserError(problem)


def write_whole(path: Path, text: str) -> None:
    """A file that is either old or new, whenever the process is killed."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def save_whole(folder: Path, *parts: Any) -> None:
    """A folder of what each part's ``save_pretrained`` writes, renamed when complete: a killed process leaves no half."""
    unfinished = folder.with_name(folder.name + ".part")
    with one_line(f"cannot write {folder}"):
        for part in parts:
            part.save_pretrained(unfinished)
    unfinished.rename(folder)


def only_steps(path: Path) -> bool:
    """Whether every line is one that a run writes, with the step that it is of."""
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            return False
        if not isinstance(row, dict) or "step" not in row:
            return False
    return True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off is not one."""
    lines = path.read_text().splitlines() if path.exists() else []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return metrics
