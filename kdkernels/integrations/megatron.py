"""Megatron-core's cross entropies of vocabulary-parallel logits by their names and signatures.

``megatron.core.tensor_parallel.vocab_parallel_cross_entropy`` and
``megatron.core.fusions.fused_cross_entropy.fused_vocab_parallel_cross_entropy``. One exchange instead of three, and
no fp32 softmax is kept. Label smoothing spreads over the whole vocabulary; Megatron's own over a rank's part of it.
For losses against a teacher give :class:`kdkernels.ShardedLogits` or a ``LinearHead`` with a shard to
:func:`kdkernels.distillation_loss`.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..core.exchange import even_shard
from ..heads import ShardedLogits
from ..losses import cross_entropy


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0, tp_group: Any = None
) -> Tensor:
    """Cross entropy ``[s, b]`` in fp32 of logits ``[s, b, V / ranks]``, which all ranks have as many of.

    Args:
        vocab_parallel_logits: this rank's columns.
        target: int64 ``[s, b]``, ids of the whole vocabulary; -100 gives a loss and a gradient of 0.
        label_smoothing: this much of the probability goes to the other ids in equal parts, in ``[0, 1)``.
        tp_group: the ranks; None: Megatron's own group.

    Raises:
        ModuleNotFoundError: no group is given, and Megatron is not installed. ValueError: an argument does not fit.
    """
    if tp_group is None:
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        tp_group = get_tensor_model_parallel_group()
    vocab = vocab_parallel_logits.shape[-1] * dist.get_world_size(tp_group)
    student = ShardedLogits(vocab_parallel_logits, even_shard(tp_group, vocab))
    # Ours goes to all ids, the label's included.
    everywhere = label_smoothing * vocab / (vocab - 1) if label_smoothing else 0.0
    return cross_entropy(student, target, label_smoothing=everywhere, reduction="none")


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any = None
) -> Tensor:
    """:func:`vocab_parallel_cross_entropy` without smoothing."""
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group=tp_group)
