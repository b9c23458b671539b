"""NVIDIA NeMo Automodel's ``KDLoss`` (``nemo_automodel.components.loss.kd_loss``) by its name and signature.

No fp32 copies and no log-softmax of either model are kept, and under tensor parallelism there is one exchange instead
of five. Rows are computed in fp32 whatever ``fp32_upcast`` says, and never held whole, whatever ``chunk_size`` says.
``num_batch_labels=0`` beside a token that counts is a ValueError; theirs is infinite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..heads import Shard, ShardedLogits
from ..losses import kl_div
from .common import is_dtensor


class KDLoss(nn.Module):
    """T^2 KL(teacher || student) in nats, the mean over the tokens whose label is not ``ignore_index``.

    Args:
        ignore_index: the label that masks a token; the others' values are not looked at.
        temperature: both models' logits are divided by it.
        fp32_upcast, chunk_size: taken, and not needed.
        tp_group: the ranks of which each has a part of the vocabulary; DTensors that are ``Shard(-1)`` say it
            themselves. Other DTensors are made whole, and so is any teacher beside a student that is whole.

    The module takes logits ``[..., V]`` of any floating dtype (under tensor parallelism this rank's columns), labels
    int64 ``[...]`` and, for gradient accumulation, how many tokens the sum is divided by instead. It returns a scalar.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    >>> import torch
    >>> loss = KDLoss(temperature=2.0)
    >>> loss(torch.randn(2, 3, 10), torch.randn(2, 3, 10), torch.tensor([[1, -100, 2], [3, 4, -100]])).shape
    torch.Size([])
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: Any = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.ignore_index, self.temperature, self.fp32_upcast = ignore_index, temperature, fp32_upcast
        self.tp_group, self.chunk_size = tp_group, chunk_size
        self._shards: tuple[Shard, Shard] | None = None

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | None = None,
    ) -> Tensor:
        if self.tp_group is not None:
            if self._shards is None:
                self._shards = Shard(self.tp_group), Shard(self.tp_group)
            student: Tensor | ShardedLogits = ShardedLogits(_rows(_local(student_logits)), self._shards[0])
            teacher: Tensor | ShardedLogits = ShardedLogits(_rows(_local(teacher_logits)), self._shards[1])
        elif is_dtensor(student_logits) and _shards_vocabulary(student_logits):
            student, teacher = _rows(student_logits), _rows(teacher_logits)
        else:
            student, teacher = _rows(_whole(student_logits)), _rows(_whole(teacher_logits))
            labels = _whole(labels)
        # A tensor may be 0 where no token counts, a number may not.
        nothing = isinstance(num_batch_labels, (int, float)) and num_batch_labels == 0
        return kl_div(
            student,
            teacher,
            mask=(_local(labels) != self.ignore_index).reshape(-1),
            temperature=self.temperature,
            temperature_squared=True,
            num_items=torch.zeros(()) if nothing else num_batch_labels,
            reduction="mean" if num_batch_labels is None else "sum",
        )


def _shards_vocabulary(logits: Any) -> bool:
    return any(p.is_shard(logits.ndim - 1) or p.is_shard(-1) for p in logits.placements)


def _rows(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_dtensor(tensor) else tensor
