"""The logit losses of NVIDIA ModelOpt (``modelopt.torch.distill``) by their names and signatures.

``LogitsDistillationLoss`` is what its Hugging Face trainer uses; ``LogitsKLLoss`` and
``TopKLogitsKLLoss`` are those of its Megatron plugin, on one tensor-parallel rank. Values and gradients
are ModelOpt's; only the rows of half-precision logits are computed in fp32 here. Each is a torch ``_Loss``,
which ``mtd.convert`` asks of a criterion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from ..divergences import ForwardKL, ReverseKL
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


class LogitsKLLoss(_Loss):
    """KL(teacher || student) at a temperature, without T^2; the student's KL to the teacher if ``reverse``.

    Takes ``[s, b, V]`` logits, or the tuples that ColumnParallelLinear returns, and gives what
    ModelOpt's gives to its balancer: (loss ``[b, s]``, tp_reduce, is_sequence_parallel).

    Raises:
        ValueError: the config says that the vocabulary is split over tensor-parallel ranks.
    """

    _tp_reduce = True

    def __init__(self, model_config: Any = None, temperature: float = 1.0, reverse: bool = False) -> None:
        super().__init__()
        ranks = getattr(model_config, "tensor_model_parallel_size", 1)
        if ranks > 1:
            raise ValueError(
                f"{type(self).__name__} needs whole vocabularies, but tensor_model_parallel_size={ranks}"
            )
        self._temperature = temperature
        self._divergence = ReverseKL() if reverse else ForwardKL()

    def forward(self, predictions: Tensor, targets: Tensor) -> tuple[Tensor, bool, bool]:
        if isinstance(predictions, tuple):
            predictions, targets = predictions[0], targets[0]
        loss = distillation_loss(
            predictions,
            self._teacher(targets),
            divergence=self._divergence,
            temperature=self._temperature,
            reduction="none",
        )
        return loss.transpose(0, 1).contiguous(), self._tp_reduce, False

    def _teacher(self, targets: Tensor) -> Tensor | SparseTarget:
        return targets.detach()


class TopKLogitsKLLoss(LogitsKLLoss):
    """:class:`LogitsKLLoss` on the teacher's ``top_k`` entries, where both are rescaled to 1."""

    _tp_reduce = False

    def __init__(
        self, model_config: Any = None, temperature: float = 1.0, reverse: bool = False, top_k: int = 1024
    ) -> None:
        super().__init__(model_config, temperature, reverse)
        self.top_k = top_k

    def _teacher(self, targets: Tensor) -> SparseTarget:
        if self.top_k > targets.shape[-1]:
            raise ValueError(f"top_k={self.top_k} is larger than the vocabulary, {targets.shape[-1]}")
        values, ids = torch.topk(targets.detach(), self.top_k, dim=-1)
        return SparseTarget(ids, values, tail="conditional")
