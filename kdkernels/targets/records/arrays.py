"""Arrays of ids and log-probabilities: what is refused of them, and how slots and rows are emptied."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .shape import what

Pair = tuple[Tensor, Tensor]  #: ids and log-probabilities


def array_of(given: Any, whose: str) -> Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{whose} has {what(given)}, not an array of numbers") from None


def signed(numbers: Tensor) -> Tensor:
    """Integers as int64: of unsigned ones torch compares no more than bytes."""
    return numbers if numbers.is_floating_point() else numbers.long()


def refuse(bad: Tensor, values: Tensor, whose: str, wanted: str) -> None:
    """ValueError that names the first of ``values`` that is ``bad``."""
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{whose}{at} is {values[tuple(at)].item()}, not {wanted}")


def earlier(ids: Tensor, logprobs: Tensor) -> Pair:
    """Rows [..., T, K] about token t become rows about token t + 1; the last is empty."""
    ids, logprobs = ids.roll(-1, -2), logprobs.roll(-1, -2)
    ids[..., -1, :], logprobs[..., -1, :] = -1, -math.inf
    return ids, logprobs


def emptied(ids: Tensor, logprobs: Tensor, full: Tensor, ids_name: str, logprobs_name: str) -> Pair:
    """The same, with empty slots where it is not ``full``.

    What is no log-probability is refused everywhere, what is no id where it is ``full``.
    """
    ids = signed(ids)
    refuse(full & ((ids < 0) | (ids != ids.floor())), ids, ids_name, "a token id")
    refuse(~(logprobs < 1e-2), logprobs, logprobs_name, "a log-probability")
    return ids.long().masked_fill(~full, -1), logprobs.float().masked_fill(~full, -math.inf)
