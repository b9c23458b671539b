"""What losses on many devices need beside the losses: counts of tokens over ranks, and rows of an lm_head moved."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_tensor, integer
from .core.moved_shards import move_rows
from .heads import Shard

__all__ = ["global_tokens", "reshard_head"]


def global_tokens(labels: Tensor, group: Any = None, *, ignore_index: int = -100) -> Tensor:
    """How many labels of all ranks of ``group`` count: ``num_items`` of a batch over data and context parallel ranks.

    Each rank's loss with ``num_items`` is then its share of the mean over all of these tokens. A wrapper that averages
    gradients over the ranks (DDP, FSDP) divides them by the number of ranks once more: multiply the loss by it.
    Packed sequences and context parallelism need nothing else.

    Args:
        labels: int64 ``[...]`` of this rank, shifted already; the shapes may differ.
        group: a process group; None: all ranks. Not the ranks of a shard, whose labels are the same.
        ignore_index: what does not count.

    Returns:
        An int64 scalar on the labels' device, the same on all ranks. It waits for nothing on a GPU.

    >>> import torch, kdkernels as kd
    >>> labels = torch.tensor([1, 2, -100])
    >>> items = kd.distributed.global_tokens(labels) if torch.distributed.is_initialized() else 2
    """
    check_tensor("labels", labels)
    integer("ignore_index", ignore_index)
    count = (labels != ignore_index).sum()
    dist.all_reduce(count, group=group)
    return count


def reshard_head(weight: Tensor, shard: Shard, like: Tensor, like_shard: Shard) -> Tensor:
    """A frozen lm_head's rows, moved once, so that each rank has those that ``like`` has.

    For a teacher whose vocabulary is padded or cut otherwise than the student's. Rows beyond the end of the shorter
    vocabulary are left out; give ``vocab_size`` to the loss.

    Args:
        weight: ``[V_rank, H]`` (or a bias ``[V_rank]``), this rank's rows. shard: where they lie.
        like: ``[W_rank, ...]``, this rank's rows of the other lm_head. like_shard: where these lie.

    Returns:
        A new tensor ``[at most W_rank, H]`` without a gradient, to be used with ``like_shard`` where no rank is short
        of rows, and with a new Shard else.

    Raises:
        ValueError: the two are sharded over different groups.

    >>> import torch, kdkernels as kd
    >>> shard = kd.Shard()  # teacher_weight = kd.distributed.reshard_head(weight, shard, student_weight, student_shard)
    """
    check_tensor("weight", weight)
    check_tensor("like", like)
    with torch.no_grad():
        return move_rows(weight.detach(), shard, like.shape[0], like_shard)
