"""Errors that the user can put right, each in one line."""

from __future__ import annotations

import contextlib
from typing import Iterator


class UserError(Exception):
    """Something that the user can put right: the command prints this one line and exits with 1."""


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Errors that libraries raise over files and options become one :class:`UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower when the disk is full
        raise UserError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says first; its next line too where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
