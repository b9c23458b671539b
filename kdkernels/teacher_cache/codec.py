"""Sparse targets <-> the columns that are stored: sorted ids as gaps, log-probabilities in few bits.

A target of T tokens becomes ragged: ``counts[T]`` (the column "kept") says how many ids each token stores; ids
and values are flat, token after token, ids ascending. Ids are stored as gaps to the id before (the first as it
is), in byte planes. The low plane is noise; the high ones compress, and zstd comes close to the entropy.
Parquet's DELTA_BINARY_PACKED sizes every 32 gaps by the largest of them, which costs more
(benchmarks/teacher_cache.py).

Values in 8 bits are the distance d below the token's largest log-probability, on a square scale:
``d = span (code / 255)^2``, so steps are fine where the mass is and coarse where it is not. What rounding
does to the sum is then undone: the token's ``log_mass`` = log sum t is stored in fp32, and decoded
values are shifted to it. Without that, a stored mass of 0.999 would come back as 1.002, and the tail
that "bucket" needs would be lost. The error of a log-probability is at most :func:`error_bound`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..targets import SparseTarget, Tail

#: How values are stored -> the numpy dtype of the column. "count" is for plain samples: t = count / draws.
DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "uint8": np.uint8, "count": np.uint16}
LEVELS = 255

Columns = dict[str, NDArray]


def error_bound(span: float | NDArray) -> float | NDArray:
    """Largest error, in nats, of a log-probability stored in 8 bits by a token whose log-probabilities span ``span``.

    With d = span (c / 255)^2 and c rounded by at most 1/2, d is off by at most span (c + 1/4) / 255^2,
    and the shift that restores the mass is a mean of such errors: 2 span (255 + 1/4) / 255^2.

    >>> round(error_bound(10.0), 4)
    0.0785
    """
    return 2 * span * (LEVELS + 0.25) / LEVELS**2


def flatten(target: SparseTarget) -> tuple[NDArray, NDArray, NDArray]:
    """(counts [T], ids [M], values [M]) of a target [T, K] without its empty slots, ids ascending in a token."""
    values = target.values.detach().float()
    empty = target.ids < 0
    empty |= (values == -torch.inf) if target.weights is None else (values == 0)
    if target.mask is not None:
        empty |= ~target.mask
    ids, order = target.ids.masked_fill(empty, torch.iinfo(torch.int64).max).sort(dim=-1, stable=True)
    full = ~empty.gather(-1, order)
    counts = full.sum(-1)
    return counts.cpu().numpy(), ids[full].cpu().numpy(), values.gather(-1, order)[full].cpu().numpy()


def pad(counts: NDArray, ids: NDArray, values: NDArray, *, kind: str, tail: Tail, slots: int) -> SparseTarget:
    """The target [T, max(slots, 1)] of flat slots; what is left of a row is empty."""
    slots = max(slots, 1)
    full = np.arange(slots) < counts[:, None]
    all_ids = np.full(full.shape, -1, np.int64)
    all_values = np.full(full.shape, -np.inf if kind == "logprobs" else 0.0, np.float32)
    all_ids[full], all_values[full] = ids, values
    tensors = {"ids": torch.from_numpy(all_ids), kind: torch.from_numpy(all_values)}
    return SparseTarget(**tensors, tail=tail)  # type: ignore[arg-type]


def encode(
    counts: NDArray, ids: NDArray, values: NDArray, *, kind: str, dtype: str, vocab_size: int, draws: int = 0
) -> Columns:
    """Columns of one sequence: counts, gaps, values, and what the dtype needs per token."""
    _check(counts, ids, values, kind, vocab_size)
    first = _first(counts)
    gaps = np.diff(ids, prepend=0)
    gaps[first] = ids[first]
    columns = {"kept": counts.astype(np.int32), "gaps": gaps.astype(np.int32)}
    if dtype == "float32":
        return columns | {"values": values.astype(np.float32)}
    if dtype == "count":
        return columns | {"values": _drawn(counts, ids, values, kind, draws)}

    logs = values.astype(np.float64) if kind == "logprobs" else np.log(values.astype(np.float64))
    slots = counts[counts > 0]
    columns["log_mass"] = _per_token(counts, _logsumexp(logs, first, slots))
    if dtype == "bfloat16":
        bits = torch.from_numpy(logs.astype(np.float32)).bfloat16().view(torch.uint16).numpy()
        return columns | {"values": bits}
    top = np.maximum.reduceat(logs, first) if len(logs) else logs
    span = (top - np.minimum.reduceat(logs, first)).astype(np.float32) if len(logs) else logs
    columns["span"] = _per_token(counts, span)
    scale = np.repeat(np.where(span > 0, span, 1), slots).astype(np.float64)
    codes = LEVELS * np.sqrt((np.repeat(top, slots) - logs) / scale)
    return columns | {"values": np.rint(codes).clip(0, LEVELS).astype(np.uint8)}


def decode(columns: Columns, *, kind: str, dtype: str, draws: int = 0) -> tuple[NDArray, NDArray, NDArray]:
    """The inverse of :func:`encode`: (counts [T], ids [M] int64, values [M] fp32)."""
    counts, stored = columns["kept"].astype(np.int64), columns["values"]
    first, slots = _first(counts), counts[counts > 0]
    total = np.cumsum(columns["gaps"], dtype=np.int64)
    ids = total - np.repeat(total[first] - columns["gaps"][first], slots)
    if dtype == "float32":
        return counts, ids, stored
    if dtype == "count":
        return counts, ids, stored.astype(np.float32) / np.float32(draws)
    if dtype == "bfloat16":
        # Arrow's buffers are read-only, which torch does not have; hence the copy.
        logs = torch.from_numpy(stored.copy()).view(torch.bfloat16).double().numpy()
    else:
        square = (np.arange(LEVELS + 1) / LEVELS) ** 2
        logs = -square[stored] * np.repeat(columns["span"][counts > 0], slots)
    shift = columns["log_mass"][counts > 0] - _logsumexp(logs, first, slots)
    logs += np.repeat(shift, slots)
    return counts, ids, (logs if kind == "logprobs" else np.exp(logs)).astype(np.float32)


def _check(counts: NDArray, ids: NDArray, values: NDArray, kind: str, vocab_size: int) -> None:
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(bad):
        raise ValueError(
            f"token {_token(counts, bad[0])} has id {ids[bad[0]]} in a vocabulary of {vocab_size}"
        )
    bad = np.flatnonzero(~np.isfinite(values) | ((values < 0) & (kind == "weights")))
    if len(bad):
        raise ValueError(f"token {_token(counts, bad[0])} has {kind} {values[bad[0]]} for id {ids[bad[0]]}")


def _drawn(counts: NDArray, ids: NDArray, values: NDArray, kind: str, draws: int) -> NDArray:
    """How often each id was drawn. ValueError where that is no whole number, or does not fit."""
    times = values.astype(np.float64) * draws
    whole = np.rint(times)
    if kind != "weights" or np.abs(whole - times).max(initial=0) > 1e-3:
        raise ValueError(f"values 'count' need weights that are multiples of 1/{draws}; use another dtype")
    most = np.iinfo(np.uint16).max
    bad = np.flatnonzero(whole > most)
    if len(bad):
        raise ValueError(
            f"token {_token(counts, bad[0])} has weight {values[bad[0]]:g} for id {ids[bad[0]]}, which is "
            f"{whole[bad[0]]:.0f} of {draws} draws, and values 'count' hold at most {most}; "
            f"give weights that are count / {draws}, or use another dtype"
        )
    return whole.astype(np.uint16)


def _token(counts: NDArray, slot: int) -> int:
    return int(np.searchsorted(np.cumsum(counts), slot, side="right"))


def _first(counts: NDArray) -> NDArray:
    """Where the slots of each token that has any begin."""
    return (np.cumsum(counts) - counts)[counts > 0]


def _per_token(counts: NDArray, of_full: NDArray) -> NDArray:
    out = np.zeros(len(counts), np.float32)
    out[counts > 0] = of_full
    return out


def _logsumexp(logs: NDArray, first: NDArray, slots: NDArray) -> NDArray:
    if not len(logs):
        return logs
    top = np.maximum.reduceat(logs, first)
    return top + np.log(np.add.reduceat(np.exp(logs - np.repeat(top, slots)), first))
