"""The two models' sides of a call: which tensors, and whether they fit together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.spec import LogitMap
from ..checks import DTYPES, check_tensor, shown
from ..heads import LinearHead, MappedLogits, Shard, ShardedLogits
from ..targets import SparseTarget

Logits = Tensor | LinearHead | MappedLogits | ShardedLogits
Teacher = Logits | SparseTarget


@dataclass(frozen=True)
class Side:
    """One model's tensors: logits, or hidden, weight and bias; or a sparse target's ids and values."""

    tensors: list[Tensor]
    logit_map: LogitMap
    leading: torch.Size
    vocab: int
    shard: Shard | None = None  # then the tensors, and at first ``vocab``, are this rank's part

    @property
    def is_head(self) -> bool:
        return len(self.tensors) > 1

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


def side(role: str, given: Any) -> Side:
    """The model's side of a call, its tensors as they are."""
    shard = None
    if isinstance(given, (LinearHead, MappedLogits, ShardedLogits)):
        tensors, vocab, leading = given.tensors(), given.vocab_size, given.leading_shape
        logit_map = LogitMap(given.logit_scale, given.softcap or 0.0)
        shard = None if isinstance(given, MappedLogits) else given.shard
    elif isinstance(given, Tensor):
        check_tensor(f"{role} logits", given)
        if given.dim() < 1:
            raise ValueError(f"{role} logits need a vocabulary dimension, got a scalar")
        tensors, vocab, leading, logit_map = [given], given.shape[-1], given.shape[:-1], LogitMap()
    else:
        sparse = " or a kd.SparseTarget" if role == "teacher" else ""
        raise TypeError(f"{role} must be a Tensor of logits or a kd.LinearHead{sparse}, got {shown(given)}")
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{role} needs fp64, fp32, bf16 or fp16, got {tensor.dtype}")
    if vocab == 0 and shard is None:
        raise ValueError(f"{role} has an empty vocabulary: shape {tuple(tensors[0].shape)}")
    return Side(tensors, logit_map, leading, vocab, shard)


def common_vocab(student: Side, teacher: Side | None, vocab_size: int | None) -> int:
    sizes = [student.vocab] + ([] if teacher is None else [teacher.vocab])
    if vocab_size is not None:
        if vocab_size > min(sizes):
            raise ValueError(f"vocab_size={vocab_size} must be in 1..{min(sizes)} (vocabularies {sizes})")
        return vocab_size
    if sizes[0] != sizes[-1]:
        raise ValueError(
            f"student has vocabulary {sizes[0]}, teacher {sizes[1]}; if they share a tokenizer and one is padded, cut "
            "both to the tokenizer's size (kdkernels' own losses: vocab_size=<that size>)"
        )
    return sizes[0]


def check_together(student: Side, teacher: Side) -> None:
    if student.leading != teacher.leading:
        raise ValueError(f"student has tokens {tuple(student.leading)}, teacher {tuple(teacher.leading)}")
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device}, teacher on {teacher.device}")
