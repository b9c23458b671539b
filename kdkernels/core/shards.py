"""Which part of the vocabulary each rank of a group has: asked once of the ranks, checked, and cut to one vocabulary."""

from __future__ import annotations

import functools
import hashlib
import operator
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..heads import Shard
from .layout import folds
from .sides import Side


class Place(NamedTuple):
    """Where a rank's columns lie, and how gradients for hidden states are summed: what crosses an operator."""

    group: str
    start: int
    width: int  # columns here, without what vocab_size cuts off
    widest: int  # of all ranks
    reduce_hidden: bool
    reduce_dtype: str
    own_tokens: bool  # each rank has tokens of its own
    averaged: bool  # then gradients of the shard are a mean over the ranks, and else a sum
    #: What is wrong on this rank alone. It becomes everybody's error in the first exchange.
    problem: str = ""

    def text(self) -> str:
        """A line for each field. A compiler follows it."""
        return "\n".join([str(field) for field in self])

    def options(self) -> dict[str, str]:
        """What :class:`Shard`'s options were, as ranks compare them."""
        return {
            "the shard's tokens": "sharded" if self.own_tokens else "replicated",
            "the shard's data_parallel": "mean" if self.averaged else "sum",
            "the shard's reduce_hidden": str(self.reduce_hidden),
            "the shard's reduce_dtype": self.reduce_dtype,
        }

    @staticmethod
    @functools.cache
    def from_text(text: str) -> Place | None:
        if not text:
            return None
        group, start, width, widest, reduced, dtype, own_tokens, averaged, problem = text.split("\n")
        return Place(
            group,
            int(start),
            int(width),
            int(widest),
            reduced == "True",
            dtype,
            own_tokens == "True",
            averaged == "True",
            problem,
        )


Range = tuple[int, int]


def group_of(shard: Shard) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("kd.Shard needs torch.distributed: call torch.distributed.init_process_group first")
    group = dist.group.WORLD if shard.group is None else shard.group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"Shard's group must be a torch.distributed process group that this rank is in, got {group!r}"
        )
    return group


class AnotherRanksError(ValueError):
    """What another rank has raised. Every rank has it already, so it is not sent again."""


def _all_gather_objects(group: Any, message: Any) -> list[Any]:
    """Every rank's message, in the order of the ranks. An exception that one of them sends is raised on all, and so is one
    where messages are of different kinds: then ranks are in different calls."""
    received: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(received, message, group=group)
    if isinstance(message, Exception):
        raise message
    for rank, theirs in enumerate(received):
        if isinstance(theirs, Exception):
            raise AnotherRanksError(f"rank {rank} of the shard's group: {theirs}")
        if type(theirs) is not type(message):
            raise AnotherRanksError(
                f"rank {rank} of the shard's group makes another call, or one with another kind of teacher"
            )
    return received


def agreed(shard: Shard, make: Callable[[], Any], signature: Callable[[Any], dict[str, Any]]) -> Any:
    """The result of ``make``. With KDKERNELS_CHECK_RANKS=1, an error on one rank, or a ``signature`` that differs between
    ranks, raises on all; otherwise the others would wait forever in the next collective."""
    if os.environ.get("KDKERNELS_CHECK_RANKS", "0") in ("", "0") or torch.compiler.is_compiling():
        return make()
    group = group_of(shard)
    try:
        made = make()
    except AnotherRanksError:
        raise
    except Exception as error:
        _all_gather_objects(group, error)
        raise
    first, *others = _all_gather_objects(group, signature(made))
    for rank, other in enumerate(others, 1):
        for name in first | other:
            here, there = first.get(name), other.get(name)
            if here != there:
                raise ValueError(f"ranks 0 and {rank} of the shard's group differ in {name}: {here}, {there}")
    return made


def fingerprint(t: Tensor | None) -> str:
    """What ranks compare of a tensor's values, which all of them should have alike."""
    if t is None:
        return "none"
    return hashlib.sha256(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:8]


def ranges(shard: Shard, width: int) -> tuple[Range, ...]:
    """The first id of every rank's part and the one after its last. Ranks are asked once for each Shard."""
    if "ranges" not in shard.known:
        if not shard.key:
            raise ValueError(
                "kd.Shard was made inside of compiled code, where ranks cannot ask each other each time; make it "
                "outside, once for each lm_head"
            )
        width = operator.index(width)  # a compiler's symbol is a number from here on
        found = _asked(group_of(shard).group_name, shard.start, width, shard.key)
        shard.known.update(width=width, ranges=found)
    return shard.known["ranges"]


def _asked(group: str, start: int | None, width: int, key: str) -> tuple[Range, ...]:
    """A collective, which runs while code is compiled. ``key`` is not looked at: another Shard has another one, so that
    every rank compiles again and asks."""
    return _joined(_all_gather_objects(named(group), (start, width)))


_asked._dynamo_marked_constant = True  # type: ignore[attr-defined]


def named(group: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]


def _joined(parts: list[tuple[int | None, int]]) -> tuple[Range, ...]:
    starts = [start for start, _ in parts]
    if None in starts:
        if any(start is not None for start in starts):
            raise ValueError(
                f"Shard's start must be given on all ranks of the group or on none, got {starts}"
            )
        starts = [sum(width for _, width in parts[:rank]) for rank in range(len(parts))]
    found = tuple((start, start + width) for start, (_, width) in zip(starts, parts) if start is not None)
    end = 0
    for start, stop in sorted(part for part in found if part[0] < part[1]):
        if start != end:
            raise ValueError(
                f"the shards {list(found)} do not cover a vocabulary: {end} is followed by {start}"
            )
        end = stop
    if end == 0:
        raise ValueError(f"the shards {list(found)} have an empty vocabulary")
    return found


def even_shard(group: Any, vocab: int, **options: Any) -> Shard:
    """The Shard of torch.chunk's parts, which all ranks know without asking. ``options``: :class:`Shard`'s."""
    ranks = dist.get_world_size(group)
    each = -(-vocab // ranks)
    ranges = tuple((min(rank * each, vocab), min(rank * each + each, vocab)) for rank in range(ranks))
    start, stop = ranges[dist.get_rank(group)]
    shard = Shard(group, **options)
    shard.known.update(width=stop - start, ranges=ranges)
    return shard


def placed(student: Side, teacher: Side | None) -> tuple[Side, Side | None]:
    """Both sides with the size of the whole vocabulary, where they have shards of it."""
    if teacher is not None and (student.shard is None) != (teacher.shard is None):
        whole, part = ("student", "teacher") if student.shard is None else ("teacher", "student")
        raise ValueError(
            f"the {part} is sharded over the vocabulary, the {whole} is not; give this rank's part of both, as "
            "kd.ShardedLogits or kd.LinearHead(..., shard=...)"
        )
    if student.shard is None:
        return student, teacher
    sides = [student] if teacher is None else [student, teacher]
    _check_options([side.shard for side in sides if side.shard is not None])
    if student.shard.tokens == "sharded" and not all(side.is_head for side in sides):
        raise ValueError("tokens='sharded' needs hidden states and a shard of the lm_head, got logits")
    return _whole(student), None if teacher is None else _whole(teacher)


def _check_options(shards: list[Shard]) -> None:
    if len({group_of(shard).group_name for shard in shards}) > 1:
        raise ValueError("student and teacher are sharded over two different groups")
    for name in ("tokens", "reduce_hidden", "reduce_dtype", "data_parallel"):
        if len({getattr(shard, name) for shard in shards}) > 1:
            raise ValueError(f"student's and teacher's shard have two different {name}")


def _whole(side: Side) -> Side:
    assert side.shard is not None
    tensors, vocab = side.tensors, max(stop for _, stop in ranges(side.shard, side.vocab))
    # Every rank must cut its tokens alike, whatever its strides.
    if not side.is_head and not folds(tensors[0]):
        tensors = [tensors[0].contiguous()]
    return replace(side, tensors=tensors, vocab=vocab)


def place(student: Side, teacher: Side | None, vocab: int) -> Place | None:
    """Where this rank's columns lie, once the vocabulary is cut to ``vocab``."""
    if student.shard is None:
        return None
    cut = [_cut(student.shard, vocab)] + (
        [] if teacher is None or teacher.shard is None else [_cut(teacher.shard, vocab)]
    )
    for rank, parts in enumerate(zip(*cut)):
        if len(set(parts)) > 1:
            raise ValueError(
                f"rank {rank} has the ids {_shown(parts[0])} of the student and {_shown(parts[1])} of the teacher; "
                "kd.distributed.reshard_head moves a teacher's rows"
            )
    group = group_of(student.shard)
    start, stop = cut[0][dist.get_rank(group)]
    return Place(
        group.group_name,
        start,
        stop - start,
        max(end - begin for begin, end in cut[0]),
        student.shard.reduce_hidden,
        str(student.shard.reduce_dtype).removeprefix("torch."),
        student.shard.tokens == "sharded",
        student.shard.data_parallel == "mean",
        _problem("student", student) or ("" if teacher is None else _problem("teacher", teacher)),
    )


def _cut(shard: Shard, vocab: int) -> list[Range]:
    cut = [(start, min(stop, vocab)) for start, stop in shard.known["ranges"]]
    return [(start, stop) if start < stop else (0, 0) for start, stop in cut]


def _shown(part: Range) -> str:
    return f"{part[0]}..{part[1] - 1}" if part[0] < part[1] else "none"


def _problem(role: str, side: Side) -> str:
    assert side.shard is not None
    width, known = side.tensors[-1].shape[0 if side.is_head else -1], side.shard.known["width"]
    return (
        ""
        if width == known
        else (
            f"the {role}'s shard has {width} ids here, but its kd.Shard was first used for {known}; "
            "make one kd.Shard for each lm_head"
        )
    )
