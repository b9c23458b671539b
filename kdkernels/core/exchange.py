"""Vocabulary shards: which part of the vocabulary each rank of a group has, and what ranks tell each other.

Between the passes over a chunk of rows there is one exchange: an all_gather of those columns of the row states that
the loss needs. Every rank merges them in the order of the ranks, so all have the same bits. A sum of dH over the
group runs beside the product for dW. Every rank walks the same chunks, so that the exchanges meet.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.row_state import Pass
from ..checks import require
from ..heads import Shard
from .layout import folds
from .sides import Side

# Its functions have a default argument: the process group of the moment in which the module is imported. torch imports
# it late, with its compiler, when there is a group. That group would outlive destroy_process_group, and its threads can
# abort the process when Python ends. Imported here, it most often finds none.
if dist.is_available():
    import torch.distributed.nn.functional

# torch 2.13 has renamed them.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


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


def _group(shard: Shard) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("kd.Shard needs torch.distributed: call torch.distributed.init_process_group first")
    group = dist.group.WORLD if shard.group is None else shard.group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"Shard's group must be a torch.distributed process group that this rank is in, got {group!r}"
        )
    return group


class AnotherRanksError(ValueError):
    """Every rank has heard of it."""


def _tell(group: Any, message: Any) -> list[Any]:
    """Every rank's message, in the order of the ranks. An exception that one of them tells is raised on all."""
    heard: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(heard, message, group=group)
    if isinstance(message, Exception):
        raise message
    for rank, said in enumerate(heard):
        if isinstance(said, Exception):
            raise AnotherRanksError(f"rank {rank} of the shard's group: {said}")
    return heard


def agreed(shard: Shard, make: Callable[[], Any], signature: Callable[[Any], dict[str, Any]]) -> Any:
    """What ``make`` makes. With KDKERNELS_CHECK_RANKS=1 an error of one rank, or a ``signature`` that is not the same
    on all, is an error of all, where they would wait for each other else."""
    if os.environ.get("KDKERNELS_CHECK_RANKS", "0") in ("", "0") or torch.compiler.is_compiling():
        return make()
    group = _group(shard)
    try:
        made = make()
    except AnotherRanksError:
        raise
    except Exception as error:
        _tell(group, error)
        raise
    first, *others = _tell(group, signature(made))
    for rank, other in enumerate(others, 1):
        for name, here in first.items():
            if other[name] != here:
                raise ValueError(
                    f"ranks 0 and {rank} of the shard's group differ in {name}: {here}, {other[name]}"
                )
    return made


def fingerprint(t: Tensor | None) -> str:
    """What ranks compare of a tensor's values, which all of them should have alike."""
    if t is None:
        return "none"
    return hashlib.sha256(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:8]


def ranges(shard: Shard, width: int) -> tuple[Range, ...]:
    """The first id of every rank's part and the one after its last. It is asked once of each Shard."""
    if "ranges" not in shard.known:
        if not shard.key:
            raise ValueError(
                "kd.Shard was made inside of compiled code, where ranks cannot ask each other each time; make it "
                "outside, once for each lm_head"
            )
        width = operator.index(width)  # a compiler's symbol is a number from here on
        found = _asked(_group(shard).group_name, shard.start, width, shard.key)
        shard.known.update(width=width, ranges=found)
    return shard.known["ranges"]


def _asked(group: str, start: int | None, width: int, key: str) -> tuple[Range, ...]:
    return _joined(_tell(_named(group), (start, width)))


# Ranks ask while code is compiled, which depends on the ``key``: another Shard makes all of them compile and ask again.
_asked._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _named(group: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]


def _joined(told: list[tuple[int | None, int]]) -> tuple[Range, ...]:
    starts = [start for start, _ in told]
    if None in starts:
        if any(start is not None for start in starts):
            raise ValueError(
                f"Shard's start must be given on all ranks of the group or on none, got {starts}"
            )
        starts = [sum(width for _, width in told[:rank]) for rank in range(len(told))]
    found = tuple((start, start + width) for start, (_, width) in zip(starts, told) if start is not None)
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
    if len({_group(shard).group_name for shard in shards}) > 1:
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
    group = _group(student.shard)
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


class Merged(NamedTuple):
    """What a forward leaves to its backward, which then exchanges nothing but dH: for the tokens that take part, from
    the first row on, the merged states and a sparse target's gathered logits."""

    state: Tensor  # [N, D, COLUMNS], of each of D losses
    stored: Tensor  # [N, K]
    ready: bool = False


class Exchange:
    """The exchanges of one walk."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.group: Any = _named(place.group)
        self.ranks = dist.get_world_size(self.group)
        self.pending: list[Any] = []
        self.own_tokens: OwnTokens | None = None
        self.merged: Merged | None = None

    def gather_tokens(self, tokens: int, slots: int, device: torch.device) -> OwnTokens | None:
        """Where each rank has its own tokens, what makes them everybody's. ``slots``: K of its ids ``[tokens, K]``."""
        if self.place.own_tokens:
            self.own_tokens = OwnTokens(self, tokens, slots, device)
        return self.own_tokens

    def merge(self, here: Callable[[], None], of: Pass, state: Tensor) -> None:
        """``here`` makes a pass over this rank's columns into ``state``, which then is that of all columns."""
        of.merge(self._gathered(here, state, of.columns), state)

    def local(self, ids: Tensor) -> Tensor:
        """Which of this rank's columns the ids are; -1 for those of other ranks and for no id."""
        at = ids - self.place.start
        return torch.where((ids >= 0) & (at >= 0) & (at < self.place.width), at, -1)

    def stored(
        self, here: Callable[[], Tensor], ids: Tensor, dtype: torch.dtype, rows: slice | None = None
    ) -> Tensor:
        """The logits at the ids ``[n, K]``, of which ``here`` gives this rank's; -inf where there is no id. The
        others' enter the sum as zeros, so it is exact in any order, and NaN stays."""
        if self.merged is not None and self.merged.ready:
            here()
            return self.merged.stored[rows]
        tokens, slots = ids.shape
        told = torch.zeros(tokens + 1, max(slots, 1), dtype=dtype, device=ids.device)

        def give() -> None:
            told[:tokens, :slots] = torch.where(self.local(ids) >= 0, here(), 0.0)

        failure = self._failure(give)
        if failure is not None:
            told[tokens] = 1
        dist.all_reduce(told, group=self.group)
        if failure is not None:
            raise failure
        require(told[tokens] != 0, told[tokens], "a rank of the shard's group failed; its own error says why")
        whole = torch.where(ids >= 0, told[:tokens, :slots], -torch.inf)
        if self.merged is not None:
            self.merged.stored[rows] = whole
        return whole

    def _failure(self, here: Callable[[], None]) -> Exception | None:
        try:
            if self.place.problem:
                raise ValueError(self.place.problem)
            here()
        except Exception as error:
            return error
        return None

    def _gathered(self, here: Callable[[], None], state: Tensor, columns: list[int]) -> Tensor:
        """``[ranks, rows, columns]``. An error on one rank is told to all in a row of its own, and raised on all."""
        rows, failure = state.shape[0], self._failure(here)
        told = state.new_zeros(rows + 1, len(columns))
        if failure is None:
            told[:rows] = state[:, columns]
        else:
            told[rows] = 1
        heard = told.new_empty(self.ranks * (rows + 1), len(columns))
        _all_gather(heard, told, group=self.group)
        if failure is not None:
            raise failure
        heard = heard.view(self.ranks, rows + 1, len(columns))
        require(
            heard[:, rows, 0] != 0,
            heard[:, rows, 0],
            "rank {1} of the shard's group failed; its own error says why",
        )
        return heard[:, :rows]

    def hidden_dtype(self, given: torch.dtype) -> torch.dtype | None:
        """What a gradient for hidden states is summed in over the group; None where it is not."""
        if not self.place.reduce_hidden:
            return None
        return given if given == torch.float64 else getattr(torch, self.place.reduce_dtype)

    def start_sum(self, total: Tensor) -> None:
        """Sum ``total`` over the group, in place and beside what is computed meanwhile. With own tokens it is only
        taken apart at the end."""
        if self.own_tokens is None:
            self.pending.append(dist.all_reduce(total, group=self.group, async_op=True))

    def wait(self) -> None:
        for work in self.pending:
            work.wait()
        self.pending.clear()


class OwnTokens:
    """Ranks that have tokens of their own: theirs are gathered, and what is made of each goes back to its rank."""

    def __init__(self, exchange: Exchange, tokens: int, slots: int, device: torch.device) -> None:
        self.group, self.ranks = exchange.group, exchange.ranks
        told: list[list[int]] = self._gathered(torch.tensor([[tokens, slots]], device=device)).T.tolist()
        self.counts, self.slots = told[0], max(told[1])
        self.most, self.rank = max(self.counts), dist.get_rank(self.group)
        self.averaged_over = self.ranks if exchange.place.averaged else 1

    def _gathered(self, here: Tensor) -> Tensor:
        heard = here.new_empty((self.ranks * here.shape[0], *here.shape[1:]))
        _all_gather(heard, here.contiguous(), group=self.group)
        return heard

    def gather(self, here: Tensor) -> Tensor:
        """``[tokens, ...]`` of this rank, as that of all ranks, in their order."""
        missing = self.most - here.shape[0]
        if missing:
            here = torch.cat([here, here.new_zeros(missing, *here.shape[1:])])
        heard = self._gathered(here)
        if min(self.counts) == self.most:
            return heard
        return torch.cat([part[:count] for part, count in zip(heard.split(max(self.most, 1)), self.counts)])

    def padded(self, here: Tensor, empty: float) -> Tensor:
        """``[tokens, K]`` with the largest K of all ranks. Empty slots come last, as they do among distinct ids."""
        return torch.nn.functional.pad(here, (0, self.slots - here.shape[1]), value=empty)

    @property
    def rows(self) -> slice:
        """Where this rank's tokens are among everybody's."""
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])

    def sum_own(self, parts: Tensor) -> Tensor:
        """This rank's tokens of the sum over all ranks of ``parts``."""
        if min(self.counts) < self.most:
            even = parts.new_zeros(self.ranks, self.most, *parts.shape[1:])
            for part, given, count in zip(even, parts.split(self.counts), self.counts):
                part[:count] = given
            parts = even.flatten(0, 1)
        total = parts.new_empty((self.most, *parts.shape[1:]))
        _reduce_scatter(total, parts.contiguous(), group=self.group)
        return total[: self.counts[self.rank]]


def top_k_of_shards(logits: Tensor, shard: Shard, k: int) -> tuple[Tensor, Tensor]:
    """(ids, values) ``[..., k]`` of the largest logits of the whole vocabulary, of which ``logits`` is a shard: the
    same on all ranks. Each rank gives its own largest."""
    parts, group = ranges(shard, logits.shape[-1]), _group(shard)
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
    heard = here.new_empty((dist.get_world_size(group) * math.prod(here.shape[:-1]), here.shape[-1]))
    _all_gather(heard, here.reshape(-1, here.shape[-1]).contiguous(), group=group)
    parts = heard.view(-1, *here.shape)
    return torch.cat(list(parts), -1)


def move_rows(rows: Tensor, source: Shard, width: int, target: Shard) -> Tensor:
    """``rows`` of ``source``, to where the ``target``'s parts lie, of which this rank's is ``width`` wide."""
    group = _group(source)
    if _group(target) != group:
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
