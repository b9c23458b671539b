"""The logit losses of NVIDIA ModelOpt (``modelopt.torch.distill``) by their names and signatures.

``LogitsDistillationLoss`` is a criterion for ``mtd.convert``. Its Hugging Face trainer, ``KDTrainer``, makes its own,
which one line replaces::

    from kdkernels.integrations import modelopt
    modelopt.replace(trainer)

``LogitsKLLoss`` and ``TopKLogitsKLLoss`` are those of its Megatron plugin, on one tensor-parallel rank or on many. Each
is a torch ``_Loss``, which ``mtd.convert`` asks of a criterion. Values and gradients are ModelOpt's, with three
differences (tests in ``tests/integrations/test_modelopt.py``):

* rows of half-precision logits are computed in fp32;
* on many ranks the loss comes back whole on each;
* there ModelOpt's ``TopKLogitsKLLoss`` has tensor_model_parallel_size times the loss's gradient, since its all_gather
  sums over ranks that all have the same loss; here it is the loss's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from ..core.moved_shards import top_k_of_shards
from ..divergences import ForwardKL, ReverseKL
from ..heads import Shard, ShardedLogits
from ..losses import distillation_loss, kl_div
from ..options import Reduction
from ..targets import SparseTarget


class LogitsDistillationLoss(_Loss):
    """T^2 KL(teacher || student) of logits ``[..., V]`` (Hinton et al., 2015).

    ``reduction`` is F.kl_div's: "mean" divides by every entry, vocabulary included, "batchmean" by the
    first dimension, "sum" by nothing; "none" gives one value per token.

    >>> import torch
    >>> s, t = torch.randn(2, 3, 10), torch.randn(2, 3, 10)
    >>> LogitsDistillationLoss(temperature=2.0, reduction="none")(s, t).shape
    torch.Size([2, 3])
    """

    def __init__(self, temperature: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        self._temperature, self._reduction = temperature, reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        loss = kl_div(
            logits_s,
            logits_t,
            temperature=self._temperature,
            temperature_squared=True,
            reduction=self._reduction,
        )
        return loss / logits_s.shape[-1] if self._reduction == "mean" else loss


def replace(trainer: Any) -> None:
    """Give a ``KDTrainer`` this loss in the place of its ``_kd_criterion``, with the same temperature and reduction.

    Raises:
        TypeError: the trainer has no such criterion, or another one.
        ValueError: the trainer's loss is Liger's.
    """
    theirs: Any = getattr(trainer, "_kd_criterion", None)
    if type(theirs).__name__ != LogitsDistillationLoss.__name__:
        raise TypeError(
            f"expected a trainer with ModelOpt's LogitsDistillationLoss as its _kd_criterion, found {theirs!r} in "
            f"{type(trainer)}"
        )
    if getattr(trainer, "use_liger_kernel", False):
        raise ValueError(
            "use_liger_kernel=True: the trainer's loss is Liger's, not its _kd_criterion; leave it out"
        )
    trainer._kd_criterion = LogitsDistillationLoss(theirs._temperature, theirs._reduction)


class LogitsKLLoss(_Loss):
    """KL(teacher || student) at a temperature, without T^2; the student's KL to the teacher if ``reverse``.

    Takes ``[s, b, V]`` logits, or the tuples that ColumnParallelLinear returns, and gives what
    ModelOpt's gives to its balancer: (loss ``[b, s]``, tp_reduce, is_sequence_parallel). Where the config says that
    the vocabulary is split over tensor-parallel ranks, V is this rank's part, and tp_reduce is False: the
    loss is the whole sum on every rank already.

    Raises:
        ModuleNotFoundError: the vocabulary is split, and Megatron, which knows the ranks, is not installed.
    """

    _tp_reduce = True
    _shards: tuple[Shard, Shard] | None = None

    def __init__(self, model_config: Any = None, temperature: float = 1.0, reverse: bool = False) -> None:
        super().__init__()
        self._is_split = getattr(model_config, "tensor_model_parallel_size", 1) > 1
        self._temperature = temperature
        self._divergence = ReverseKL() if reverse else ForwardKL()

    def forward(self, predictions: Tensor, targets: Tensor) -> tuple[Tensor, bool, bool]:
        if isinstance(predictions, tuple):
            predictions, targets = predictions[0], targets[0]
        if self._is_split and self._shards is None:
            group = _tensor_parallel_group()
            self._shards = Shard(group), Shard(group)
        loss = distillation_loss(
            predictions if self._shards is None else ShardedLogits(predictions, self._shards[0]),
            self._teacher(targets.detach()),
            divergence=self._divergence,
            temperature=self._temperature,
            reduction="none",
        )
        return loss.transpose(0, 1).contiguous(), self._tp_reduce and not self._is_split, False

    def _teacher(self, targets: Tensor) -> Tensor | ShardedLogits | SparseTarget:
        return targets if self._shards is None else ShardedLogits(targets, self._shards[1])


def _tensor_parallel_group() -> Any:
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    return get_tensor_model_parallel_group()


class TopKLogitsKLLoss(LogitsKLLoss):
    """:class:`LogitsKLLoss` on the teacher's ``top_k`` entries, where both are rescaled to 1."""

    _tp_reduce = False

    def __init__(
        self, model_config: Any = None, temperature: float = 1.0, reverse: bool = False, top_k: int = 1024
    ) -> None:
        super().__init__(model_config, temperature, reverse)
        self.top_k = top_k

    def _teacher(self, targets: Tensor) -> SparseTarget:
        if self._shards is not None:
            ids, values = top_k_of_shards(targets, self._shards[1], self.top_k)
            return SparseTarget(ids, values, tail="conditional")
        if self.top_k > targets.shape[-1]:
            raise ValueError(f"top_k={self.top_k} is larger than the vocabulary, {targets.shape[-1]}")
        values, ids = torch.topk(targets, self.top_k, dim=-1)
        return SparseTarget(ids, values, tail="conditional")
