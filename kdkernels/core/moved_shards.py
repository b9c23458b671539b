"""Rows and columns of shards, moved between ranks outside of a walk."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..heads import Shard
from . import exchange
from .shards import Range, group_of, ranges


def top_k_of_shards(logits: Tensor, shard: Shard, k: int) -> tuple[Tensor, Tensor]:
    """(ids, values) ``[..., k]`` of the largest logits of the whole vocabulary, of which ``logits`` is a shard: the
    same on all ranks. Each rank gives its own largest."""
    parts, group = ranges(shard, logits.shape[-1]), group_of(shard)
    vocab, widest = max(stop for _, stop in parts), max(stop - start for start, stop in parts)
    if k > vocab:
        raise ValueError(f"top_k={k} is larger than the vocabulary, {vocab}")
    most = min(k, widest)
    values, ids = logits.topk(min(most, logits.shape[-1]), -1)
    missing = (0, most - values.shape[-1])
    values = torch.nn.functional.pad(values, missing, value=-torch.inf)
    ids = torch.nn.functional.pad(ids + parts[dist.get_rank(group)][0], missing, value=-1)
    every_value, every_id = (_side_by_side(t, group) for t in (values, ids))
    values, at = every_value.topk(k, -1)
    return every_id.gather(-1, at), values


def _side_by_side(here: Tensor, group: Any) -> Tensor:
    """``[..., n]`` of each rank as ``[..., ranks * n]``."""
    received = here.new_empty((dist.get_world_size(group) * math.prod(here.shape[:-1]), here.shape[-1]))
    exchange.all_gather(received, here.reshape(-1, here.shape[-1]).contiguous(), group=group)
    parts = received.view(-1, *here.shape)
    return torch.cat(list(parts), -1)


def move_rows(rows: Tensor, source: Shard, width: int, target: Shard) -> Tensor:
    """``rows`` of ``source``, to where the ``target``'s parts lie, of which this rank's is ``width`` wide."""
    group = group_of(source)
    if group_of(target) != group:
        raise ValueError("the two shards are of two different groups")
    have, want = ranges(source, rows.shape[0]), ranges(target, width)
    mine = dist.get_rank(group)
    sent = [_common(have[mine], part) for part in want]
    received = [_common(part, want[mine]) for part in have]
    first = have[mine][0]
    given = torch.cat([rows[start - first : stop - first] for start, stop in sent]).contiguous()
    lengths = [stop - start for start, stop in received]
    out = rows.new_empty((sum(lengths), *rows.shape[1:]))
    each = math.prod(rows.shape[1:]) * rows.element_size()
    dist.all_to_all_single(
        out.view(torch.uint8).view(-1),
        given.view(torch.uint8).view(-1),
        [n * each for n in lengths],
        [(stop - start) * each for start, stop in sent],
        group=group,
    )
    pieces = zip(received, out.split(lengths))
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])])


def _common(a: Range, b: Range) -> Range:
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else (a[0], a[0])
