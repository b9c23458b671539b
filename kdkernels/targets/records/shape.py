"""What a record must look like, and the line that says where it does not."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, Sequence


def check(fine: Any, message: str) -> None:
    if not fine:
        raise ValueError(message)


def what(value: Any) -> str:
    """A few of its entries. To print all of them takes longer than to read the record, and even these are only made
    where they are needed."""
    return reprlib.repr(value)


def check_fields(record: Any, names: Sequence[str], whose: str) -> None:
    if not isinstance(record, Mapping):
        raise ValueError(f"{whose} is {what(record)}, not a dict")
    for name in names:
        check(name in record, f"{whose} has no {name}, only {', '.join(map(str, record))}")


def entries_of(given: Any, whose: str, wanted: str) -> Sequence[Any]:
    """A list, or what has a length as lists have."""
    try:
        len(given)
    except TypeError:
        raise ValueError(f"{whose} is {what(given)}, not {wanted}") from None
    return given
