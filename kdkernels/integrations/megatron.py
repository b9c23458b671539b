"""Megatron-core's cross entropies of vocabulary-parallel logits by their names and signatures, and losses without logits.

``megatron.core.tensor_parallel.vocab_parallel_cross_entropy`` and
``megatron.core.fusions.fused_cross_entropy.fused_vocab_parallel_cross_entropy``. One exchange instead of three, and
no fp32 softmax is kept. Label smoothing spreads over the whole vocabulary; Megatron's own over a rank's part of it.
For losses against a teacher give :class:`kdkernels.ShardedLogits` or a ``LinearHead`` with a shard to
:func:`kdkernels.distillation_loss`.

:func:`output_processor` makes a hook of a loss, for Megatron models whose forward takes ``output_processor=``: hidden
states and the output layer's rows go in, token losses come out, and no logits are made. :func:`call_with_processor`
runs one in the models of megatron-core 0.16, whose forward has no such argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.shards import even_shard
from ..heads import LinearHead, ShardedLogits
from ..losses import cross_entropy
from .common import forward_as


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0, tp_group: Any = None
) -> Tensor:
    """Cross entropy ``[s, b]`` in fp32 of logits ``[s, b, V / ranks]``, which all ranks have as many of.

    Args:
        vocab_parallel_logits: this rank's columns.
        target: int64 ``[s, b]``, ids of the whole vocabulary; -100 gives a loss and a gradient of 0.
        label_smoothing: this much of the probability goes to the other ids in equal parts, in ``[0, 1 - 1 / V]``.
        tp_group: the ranks; None: Megatron's own group.

    Raises:
        ModuleNotFoundError: no group is given, and Megatron is not installed. ValueError: an argument does not fit.
    """
    if tp_group is None:
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        tp_group = get_tensor_model_parallel_group()
    vocab = vocab_parallel_logits.shape[-1] * dist.get_world_size(tp_group)
    student = ShardedLogits(vocab_parallel_logits, even_shard(tp_group, vocab))
    if not 0 <= label_smoothing <= (most := 1 - 1 / vocab):
        raise ValueError(f"label_smoothing must be in [0, {most:g}] with {vocab} ids, got {label_smoothing}")
    # Ours goes to all ids, the label's included.
    everywhere = min(label_smoothing * vocab / (vocab - 1), 1.0) if label_smoothing else 0.0
    return cross_entropy(student, target, label_smoothing=everywhere, reduction="none")


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any = None
) -> Tensor:
    """:func:`vocab_parallel_cross_entropy` without smoothing."""
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group=tp_group)


def output_processor(loss: Callable[[LinearHead, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A hook for Megatron's models: token losses ``[b, s]``, the same on all ranks, of hidden states and the output layer.

    Under sequence parallelism each rank gives the losses of its own part of the sequence, which are then gathered, and
    gets the hidden states' gradient of that part. The output layer's gradient is that of all tokens and complete on its
    rank, as Megatron's own is. Everything else that a model hands to its hook (context, loss mask, ...) is the caller's.

    Args:
        loss: takes this rank's :class:`kdkernels.LinearHead` of hidden ``[s, b, H]`` and int64 labels ``[s, b]``, and
            gives a loss of each token ``[s, b]`` (``reduction="none"``). Under sequence parallelism s is this rank's
            part, as it is of a teacher's hidden states: :func:`output_head` in a hook of its own gives its head.

    Returns:
        The hook: keyword arguments ``hidden_states``, ``output_layer``, ``output_weight=None`` (of tied embeddings),
        ``labels`` ``[b, s]``, and others that it leaves alone.

    >>> import kdkernels as kd
    >>> hook = output_processor(lambda head, labels: kd.cross_entropy(head, labels, reduction="none"))
    """

    def processed(
        *,
        hidden_states: Tensor,
        output_layer: Any,
        labels: Tensor,
        output_weight: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        head, own = output_head(hidden_states, output_layer, output_weight), labels.transpose(0, 1)
        if not output_layer.sequence_parallel:
            return loss(head, own).transpose(0, 1).contiguous()
        group = output_layer.tp_group
        own = own.chunk(dist.get_world_size(group))[dist.get_rank(group)]
        return _OfTheSequence.apply(loss(head, own), group).transpose(0, 1).contiguous()

    return processed


def output_head(hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None = None) -> LinearHead:
    """Megatron's output layer (a ``ColumnParallelLinear``) over hidden states ``[s, b, H]``, or a rank's part of s under
    sequence parallelism, as a LinearHead with its shard of the vocabulary.

    Args:
        output_weight: the weight where the layer has none of its own: tied embeddings.

    Raises:
        ValueError: the layer puts off its weight's gradient (``defer_embedding_wgrad_compute``), its gradient would be
            dropped (``gradient_accumulation_fusion`` beside multi-token prediction), or the model scales what comes out
            of it (``use_mup``).
    """
    config = output_layer.config
    if config.defer_embedding_wgrad_compute:
        raise ValueError(
            "defer_embedding_wgrad_compute leaves the output layer's gradient to Megatron, which sees no logits here; "
            "set it to False"
        )
    # Multi-token prediction runs the same layer, whose own kernel then marks the weight's gradient as added up already.
    if config.mtp_num_layers and config.gradient_accumulation_fusion:
        raise ValueError(
            f"mtp_num_layers={config.mtp_num_layers} with gradient_accumulation_fusion: Megatron would drop the loss's "
            "gradient for the output layer; set gradient_accumulation_fusion=False"
        )
    if getattr(config, "use_mup", False):  # megatron-core 0.16 has no such field
        raise ValueError(
            "use_mup scales logits after the output layer, and none are made here; take the loss from the model's logits"
        )
    weight = output_layer.weight if output_weight is None else output_weight
    bias = None if output_layer.skip_bias_add else output_layer.bias
    group, options = output_layer.tp_group, {"reduce_hidden": output_layer.allreduce_dgrad}
    if output_layer.sequence_parallel:
        options = {"tokens": "sharded", "data_parallel": "sum"}
    shard = even_shard(group, weight.shape[0] * dist.get_world_size(group), **options)
    return LinearHead(hidden_states, weight, bias, shard=shard)


def call_with_processor(
    model: Any, processor: Callable[..., Any], *arguments: Any, labels: Tensor, **options: Any
) -> Any:
    """``model(*arguments, labels=labels, output_processor=processor, **options)`` of a GPTModel that has no such argument.

    Its output layer runs the hook in place of its own forward. A model of an earlier pipeline stage has none, and gives
    its hidden states. DDP and Float16Module may be around it.

    Raises:
        ValueError: multi-token prediction, which calls the output layer several times.
    """
    own = model
    while hasattr(own, "module"):
        own = own.module
    if not own.post_process:
        return model(*arguments, **options)
    if own.config.mtp_num_layers:
        raise ValueError(
            f"mtp_num_layers={own.config.mtp_num_layers}: multi-token prediction makes logits of its own; set it to None"
        )
    made: list[Any] = []

    def forward(hidden_states: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        made.append(
            processor(
                hidden_states=hidden_states,
                output_layer=own.output_layer,
                output_weight=weight,
                labels=labels,
            )
        )
        return hidden_states.new_zeros(1, 1, 1), None

    with forward_as(own.output_layer, forward):
        model(*arguments, **options)
    return made[0]


class _OfTheSequence(torch.autograd.Function):
    """``[s, b]`` of all ranks' equal parts of s. What arrives is the same on all of them, and each takes its part."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group, own = group, own.contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return arriving.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None
