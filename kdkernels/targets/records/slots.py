"""Lists of a token's slots -> [T, K] tensors.

A token's slots are read at once where all is well, and one by one to say what is not.
"""

from __future__ import annotations

import math
from array import array
from typing import Any, Sequence

import torch
from torch import Tensor

from .arrays import Pair, array_of
from .shape import check, what

Slots = list[tuple[int, float]]  #: a token's
Columns = tuple[array, array]  #: the same as an array of ids and one of log-probabilities


def token_id(token: Any, where: str) -> int:
    try:
        value = int(token)
    except (TypeError, ValueError, OverflowError):
        value = -1
    check(0 <= value < 2**63 and not isinstance(token, float), f"{where} has {token!r} for a token id")
    return value


def logprob_of(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    check(number < 1e-2, f"{where} has {value!r} for a log-probability")  # nan too
    return number


def columns_of(ids: Any, logprobs: Any) -> Columns | None:
    """A token's slots as arrays, checked at once as :func:`token_id` and :func:`logprob_of` check them one by one.

    None where one of them would refuse, or convert.
    """
    try:
        columns = array("q", ids), array("d", logprobs)
    except (TypeError, OverflowError, ValueError):
        return None
    return columns if _fine(*columns) else None


def _fine(ids: array, logprobs: array) -> bool:
    if len(ids) != len(logprobs):
        return False
    return not ids or (min(ids) >= 0 and max(logprobs) < 1e-2 and sum(logprobs) < math.inf)  # the sum: no NaN


def padded(rows: Sequence[Slots | Columns]) -> Pair:
    """[T, K] of rows of (id, logprob). K is the longest row; shorter ones end in empty slots."""
    columns = [row if isinstance(row, tuple) else tuple(zip(*row)) or ((), ()) for row in rows]
    slots = max([1, *(len(ids) for ids, _ in columns)])
    if not rows:
        return torch.empty(0, slots, dtype=torch.int64), torch.empty(0, slots)
    all_ids, all_values = array("q"), array("d")
    for ids, values in columns:
        missing = slots - len(ids)
        all_ids.extend(ids)
        all_ids.extend([-1] * missing)
        all_values.extend(values)
        all_values.extend([-math.inf] * missing)
    found = torch.frombuffer(all_ids, dtype=torch.int64).clone()
    logprobs = torch.frombuffer(all_values, dtype=torch.float64).float()
    return found.view(-1, slots), logprobs.view(-1, slots)


def nested(row: Any) -> bool:
    """Whether these are the tokens of a sequence, each a list of slots, and not the slots of a token."""
    return isinstance(row, (list, tuple)) and len(row) > 0 and isinstance(row[0], (list, tuple))


def rectangle(rows: Sequence[Any], whose: str, pad: float) -> Tensor:
    """[T, K] of T lists, K the longest, or [B, T, K] of B lists of T; short ones are padded. An array is taken as it is."""
    if isinstance(rows, Tensor) or hasattr(rows, "__array__"):
        return array_of(rows, whose)
    check(isinstance(rows, (list, tuple)), f"{whose} is {what(rows)}, not a list of lists")
    check(len(rows), f"{whose} is empty")
    for t, row in enumerate(rows):
        if not isinstance(row, (list, tuple)):
            raise ValueError(f"{whose}[{t}] is {what(row)}, not a list")
    if any(map(nested, rows)):
        return _batch(rows, whose, pad)
    slots = max(1, *(len(row) for row in rows))
    for code, dtype in (("q", torch.int64), ("d", torch.float64)):
        try:
            flat = array(code)
            for row in rows:
                flat.extend(array(code, row))
                flat.extend([pad] * (slots - len(row)))  # type: ignore[list-item]
            return torch.frombuffer(flat, dtype=dtype).clone().view(-1, slots)
        except (TypeError, OverflowError, ValueError):
            pass  # other numbers, or none
    try:
        return torch.tensor(rows, dtype=torch.float64)  # lists of arrays of one length
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{whose} has something else than numbers") from None


def _batch(sequences: Sequence[Any], whose: str, pad: float) -> Tensor:
    """[B, T, K] of B sequences of one length: which end of a shorter one to fill up, nobody has said."""
    lengths = sorted({len(tokens) for tokens in sequences})
    check(
        len(lengths) == 1,
        f"{whose} has sequences of {lengths} tokens; fill them up to one length, or read one after the other",
    )
    for b, tokens in enumerate(sequences):
        for t, slots in enumerate(tokens):
            if not isinstance(slots, (list, tuple)):
                raise ValueError(f"{whose}[{b}][{t}] is {what(slots)}, not a list")
    return rectangle([slots for tokens in sequences for slots in tokens], whose, pad).unflatten(
        0, (len(sequences), lengths[0])
    )
