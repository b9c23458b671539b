"""What the ranks of a vocabulary's shards send each other during a walk.

Between the passes over a chunk of rows there is one exchange: an all_gather of those columns of the row states that
the loss needs. Every rank merges them in the order of the ranks, so all have the same bits. A sum of dH over the
group runs beside the product for dW. Every rank walks the same chunks, so that the exchanges meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.row_state import Pass
from ..checks import require
from .shards import Place, named

# torch.distributed.nn.functional binds the default process group as a default argument when it is imported. torch's
# compiler imports it late, when there is a group, and that reference would outlive destroy_process_group; the group's
# threads can then abort the process at its end. Imported here, it mostly finds no group.
if dist.is_available():
    import torch.distributed.nn.functional

# torch 2.13 has renamed both.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
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
        self.group: Any = named(place.group)
        self.ranks = dist.get_world_size(self.group)
        self.pending: list[Any] = []
        self.own_tokens: OwnTokens | None = None
        self.merged: Merged | None = None

    def gather_tokens(self, tokens: int, slots: int, device: torch.device) -> OwnTokens | None:
        """Where each rank has its own tokens, what makes them those of all ranks. ``slots``: K of its ids ``[tokens, K]``."""
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

    def logits_at(self, here: Callable[[], Tensor], ids: Tensor, dtype: torch.dtype, rows: slice) -> Tensor:
        """The logits at the ids ``[n, K]``, of which ``here`` gives this rank's; -inf where there is no id. The
        others' enter the sum as zeros, so it is exact in any order, and NaN stays."""
        if self.merged is not None and self.merged.ready:
            here()
            return self.merged.stored[rows]
        tokens, slots = ids.shape
        total = torch.zeros(tokens + 1, max(slots, 1), dtype=dtype, device=ids.device)

        def fill() -> None:
            total[:tokens, :slots] = torch.where(self.local(ids) >= 0, here(), 0.0)

        failure = self._failure(fill)
        if failure is not None:
            total[tokens] = 1
        dist.all_reduce(total, group=self.group)
        if failure is not None:
            raise failure
        require(
            total[tokens] != 0, total[tokens], "a rank of the shard's group failed; its own error says why"
        )
        whole = torch.where(ids >= 0, total[:tokens, :slots], -torch.inf)
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
        """``[ranks, rows, columns]``. An error on one rank is sent to all in a row of its own, and raised on all."""
        rows, failure = state.shape[0], self._failure(here)
        sent = state.new_zeros(rows + 1, len(columns))
        if failure is None:
            sent[:rows] = state[:, columns]
        else:
            sent[rows] = 1
        received = sent.new_empty(self.ranks * (rows + 1), len(columns))
        all_gather(received, sent, group=self.group)
        if failure is not None:
            raise failure
        received = received.view(self.ranks, rows + 1, len(columns))
        require(
            received[:, rows, 0] != 0,
            received[:, rows, 0],
            "rank {1} of the shard's group failed; its own error says why",
        )
        return received[:, :rows]

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
        sizes: list[list[int]] = self._gathered(torch.tensor([[tokens, slots]], device=device)).T.tolist()
        self.counts, self.slots = sizes[0], max(sizes[1])
        self.most, self.rank = max(self.counts), dist.get_rank(self.group)
        self.averaged_over = self.ranks if exchange.place.averaged else 1

    def _gathered(self, here: Tensor) -> Tensor:
        received = here.new_empty((self.ranks * here.shape[0], *here.shape[1:]))
        all_gather(received, here.contiguous(), group=self.group)
        return received

    def gather(self, here: Tensor) -> Tensor:
        """``[tokens, ...]`` of this rank, as that of all ranks, in their order."""
        missing = self.most - here.shape[0]
        if missing:
            here = torch.cat([here, here.new_zeros(missing, *here.shape[1:])])
        received = self._gathered(here)
        if min(self.counts) == self.most:
            return received
        return torch.cat(
            [part[:count] for part, count in zip(received.split(max(self.most, 1)), self.counts)]
        )

    def padded(self, here: Tensor, empty: float) -> Tensor:
        """``[tokens, K]`` with the largest K of all ranks. Empty slots come last, as they do among distinct ids."""
        return torch.nn.functional.pad(here, (0, self.slots - here.shape[1]), value=empty)

    @property
    def rows(self) -> slice:
        """Where this rank's tokens are among those of all ranks."""
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
        reduce_scatter(total, parts.contiguous(), group=self.group)
        return total[: self.counts[self.rank]]
