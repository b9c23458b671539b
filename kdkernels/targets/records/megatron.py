"""Megatron-LM's cached logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .arrays import Pair, array_of, emptied
from .shape import check, check_fields

#: What top-p dropped; older shards have -1e4.
EMPTY = -1e3


def megatron(payload: Mapping[str, Any]) -> Pair:
    """An iteration's payload in Megatron-LM's cached logits: ``values``, ``indices_low`` (uint16) and ``bit_17``
    (bool), sequence-first ``[S, B, K]`` (format 2) or a list of them, one per micro-batch (format 1).

    The result is ``[B, S, K]``, micro-batches one after the other. Ids are ``bit_17 << 16 | indices_low``.
    An entry that top-p dropped has the value -1e3 (older: -1e4) and is empty. Megatron's ghost token is the
    tail "bucket"; its loss without one is "truncate".

    Source: NVIDIA/Megatron-LM, megatron/training/distillation/utils.py, logits_saver.py, cached_logits_loss.py.
    """
    names = ("values", "indices_low", "bit_17")
    check_fields(payload, names, "Megatron's payload")
    parts = [payload[name] for name in names]
    listed = [isinstance(part, (list, tuple)) for part in parts]
    check(len(set(listed)) == 1, "Megatron's payload has lists of micro-batches beside single tensors")
    if not listed[0]:
        parts = [[part] for part in parts]
    counts = [len(part) for part in parts]
    check(
        len(set(counts)) == 1,
        f"Megatron's payload has {counts} micro-batches of values, indices_low and bit_17",
    )
    check(parts[0], "Megatron's payload has no micro-batch")
    batches: list[Pair] = []
    for i, each in enumerate(zip(*parts)):
        where = f"Megatron's micro-batch {i}"
        values, low, high = (array_of(part, where) for part in each)
        check(
            values.shape == low.shape == high.shape and values.dim() == 3,
            f"{where} has shapes {tuple(values.shape)}, "
            f"{tuple(low.shape)} and {tuple(high.shape)}, not one [S, B, K]",
        )
        check(
            low.dtype == torch.uint16 and high.dtype == torch.bool,
            f"{where} has ids in {low.dtype} and {high.dtype}, not in uint16 and bool",
        )
        ids, full = (high.long() << 16) | low.long(), ~(values <= EMPTY)
        batches.append(emptied(ids, values, full, f"{where}: indices", f"{where}: values"))
        check(
            len(ids) == len(batches[0][0]),
            f"{where} has {len(ids)} tokens a sequence, the first {len(batches[0][0])}",
        )
    slots = max(ids.shape[-1] for ids, _ in batches)
    wide = [(_wider(ids, slots, -1), _wider(logprobs, slots, -math.inf)) for ids, logprobs in batches]
    return (
        torch.cat([ids.transpose(0, 1) for ids, _ in wide]),
        torch.cat([logprobs.transpose(0, 1) for _, logprobs in wide]),
    )


def _wider(values: Tensor, slots: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, slots - values.shape[-1]), value=fill)
