"""torchtitan's ``cross_entropy_loss`` (``torchtitan.components.loss``) by its name and signature.

One exchange instead of three where the vocabulary is split over tensor-parallel ranks, and no fp32 copy of the logits
or of their log-softmax is kept.
"""

from __future__ import annotations

from torch import Tensor

from ..losses import cross_entropy
from .common import is_dtensor

#: torchtitan's.
IGNORE_INDEX = -100


def cross_entropy_loss(pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None) -> Tensor:
    """The sum of the tokens' cross entropies in nats, fp32; torchtitan divides it by the tokens of all ranks.

    Args:
        pred: logits ``[..., V]`` of any floating dtype; a DTensor that is ``Shard(-1)`` is this rank's part of the
            vocabulary, and the loss the same on all ranks.
        labels: int64 ``[...]``, a plain tensor; -100 masks a token.
        global_vocab_size: the vocabulary of a DTensor is known; of plain logits it must be theirs, since which ranks
            have the rest is not: ``kdkernels.cross_entropy(kd.ShardedLogits(pred, kd.Shard(group)), labels)`` says it.

    Raises:
        ValueError: labels that are a DTensor, another vocabulary, or shapes and dtypes that do not fit.

    >>> import torch
    >>> cross_entropy_loss(torch.zeros(1, 2, 8), torch.tensor([[3, -100]]))
    tensor(2.0794)
    """
    if is_dtensor(labels):
        raise ValueError(
            "cross_entropy_loss takes labels as a plain tensor, got a DTensor; labels.to_local()"
        )
    if global_vocab_size is not None and global_vocab_size != pred.shape[-1]:
        raise ValueError(
            f"global_vocab_size={global_vocab_size}, but the logits have {pred.shape[-1]} columns and do not say which "
            "ranks have the others; kd.cross_entropy(kd.ShardedLogits(pred, kd.Shard(group)), labels, reduction='sum')"
        )
    return cross_entropy(pred, labels, ignore_index=IGNORE_INDEX, reduction="sum")
