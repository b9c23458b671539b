"""axolotl's top-k distillation loss: in place of ``AxolotlKDTrainer._kd_loss_fn``::

    from kdkernels.integrations import axolotl
    axolotl.replace(trainer)

What differs from axolotl 0.19 (tests in ``tests/integrations/test_axolotl.py``):

* T^2 is on the gradient too. axolotl multiplies the reported loss only, so that at temperature T the
  soft term's gradient is too small by T^2: 4 times at T = 2.
* With ``normalize_topk`` the student is rescaled over the slots where ``target_mask`` is True. axolotl
  rescales over all of them, so whatever token ids the padding holds take part.
* Loss sums are fp32; axolotl adds them up in the hidden states' dtype.
* The lm_head's gradient is not computed where the head is frozen.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..divergences import JSD
from ..losses import cross_entropy, distillation_loss
from ..targets import SparseTarget
from .common import head


class LigerFusedLinearKLTopKLogprobLoss(nn.Module):
    """weight_soft_loss T^2 D(teacher, student) + weight_hard_loss CE, summed over tokens, from hidden states.

    Args:
        compiled, chunk_size: taken and not needed; what is not named here is axolotl's.
        beta: 0 is the forward KL, 1 (axolotl's default) the reverse KL, in between generalised JSD.
        normalize_topk: the student's distribution is over the stored top k, else over the vocabulary
            (then beta must be 0: no other divergence is defined by a part of a distribution).

    >>> import torch
    >>> loss = LigerFusedLinearKLTopKLogprobLoss(temperature=2.0, beta=0.0)
    >>> ids = torch.randint(0, 50, (1, 3, 4))
    >>> loss(torch.randn(50, 8), torch.randn(1, 3, 8), ids, torch.randn(1, 3, 4).log_softmax(-1),
    ...      torch.ones(1, 3, 4), torch.randint(0, 50, (1, 3))).shape
    torch.Size([])
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        temperature: float = 1.0,
        beta: float = 1.0,
        ignore_index: int = -100,
        compiled: bool = True,
        chunk_size: int = 1024,
        compute_ce_loss: bool = True,
        normalize_topk: bool = True,
    ) -> None:
        super().__init__()
        if not (0.0 <= weight_hard_loss <= 1.0 and 0.0 <= weight_soft_loss <= 1.0):
            raise ValueError(f"loss weights must be in [0, 1], got {weight_hard_loss} and {weight_soft_loss}")
        if temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.temperature, self.beta, self.ignore_index = temperature, beta, ignore_index
        self.compiled, self.chunk_size = compiled, chunk_size
        self.compute_ce_loss, self.normalize_topk = compute_ce_loss, normalize_topk

    def forward(
        self,
        lm_head_weight: Tensor,
        student_hidden_states: Tensor,
        target_token_ids: Tensor,
        target_logprobs: Tensor,
        target_mask: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
    ) -> Tensor:
        """Weight ``[V, H]``, hidden states ``[B, N, H]``, the teacher's ids, log-probabilities (at this
        temperature) and mask ``[B, N, K]``, labels ``[B, N]`` not yet shifted."""
        student = (student_hidden_states, lm_head_weight, student_bias)
        # The log-probabilities are at T already: so are the student's logits, and the loss is taken at 1.
        target = SparseTarget(
            target_token_ids.long(),
            target_logprobs,
            mask=target_mask.bool(),
            tail="conditional" if self.normalize_topk else "truncate",
        )
        loss = distillation_loss(
            head(*student, logit_scale=1 / self.temperature),
            target,
            divergence=JSD(self.beta),
            soft_weight=self.weight_soft_loss * self.temperature**2,
            reduction="sum",
        )
        if self.compute_ce_loss and self.weight_hard_loss:
            labels = nn.functional.pad(true_labels[:, 1:], (0, 1), value=self.ignore_index)
            hard = cross_entropy(head(*student), labels, reduction="sum", ignore_index=self.ignore_index)
            loss = loss + self.weight_hard_loss * hard
        return loss


def replace(trainer: Any) -> None:
    """Give a trainer that has axolotl's ``_kd_loss_fn`` this loss with the same settings.

    Raises:
        TypeError: the trainer's loss is not axolotl's top-k loss.
    """
    theirs = getattr(trainer, "_kd_loss_fn", None)
    if type(theirs).__name__ != LigerFusedLinearKLTopKLogprobLoss.__name__:
        raise TypeError(f"expected a trainer with axolotl's _kd_loss_fn, found {theirs!r} in {type(trainer)}")
    names = (
        "weight_hard_loss",
        "weight_soft_loss",
        "temperature",
        "beta",
        "ignore_index",
        "compiled",
        "chunk_size",
        "compute_ce_loss",
        "normalize_topk",
    )
    trainer._kd_loss_fn = LigerFusedLinearKLTopKLogprobLoss(**{name: getattr(theirs, name) for name in names})
