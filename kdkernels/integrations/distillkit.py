"""DistillKit's KL loss: ``sparse_kl_div``, ``dense_kl_div`` and the class for its registry::

    import distillkit.lossfuncs
    from kdkernels.integrations.distillkit import KLDLoss
    distillkit.lossfuncs.ALL_LOSS_CLASSES.insert(0, KLDLoss)  # the first of a name is taken

What differs from DistillKit (tests in ``tests/integrations/test_distillkit.py``):

* missing="symmetric_uniform": DistillKit clamps the stored mass to 1 - eps and drops the tail's term
  where the teacher's tail is at most eps; here every tail counts, so ``eps`` has nothing to do. A mass that
  rounding made larger than 1 is rescaled to 1, up to 1.1; what is larger is no probability, and a ValueError.
* An entry of -inf is an empty slot; there DistillKit's loss is NaN.
* Loss and row arithmetic are fp32; DistillKit's are partly in the logits' dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.option_checks import checked
from ..heads import MappedLogits
from ..losses import kl_div
from ..targets import SparseTarget

_MISSING = ("zero", "symmetric_uniform")
#: Log of the most that stored log-probabilities may sum to: those of bf16 are off by up to 2^-9 of their size.
_ROUNDING = math.log(1.1)


def sparse_kl_div(
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    missing: Any = "zero",
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    """The sum over tokens of KL(teacher || student), the teacher known at K entries a token.

    Args:
        logits: ``[B, T, V]``.
        target_ids, target_values: ``[B, T, K]``; values are log-probabilities, or logits with
            ``log_target=False``.
        mask: ``[B, T]`` or ``[B, T, 1]``, nonzero for tokens that count.
        missing: "zero" (the teacher is rescaled to 1 over its entries) or "symmetric_uniform" (the rest
            of both is one outcome; a token of which all V entries are stored has none), or DistillKit's
            enum of these.
        temperature: of the distributions that are compared; the two generation temperatures say at
            which temperature the teacher's values and the student's logits are.
        eps, chunk_length: taken and not needed.

    Raises:
        ValueError: an unknown ``missing``; with "symmetric_uniform" teacher logits, or a mass above 1.1; a
            temperature of 0.

    >>> ids, values = torch.randint(0, 50, (1, 3, 4)), torch.randn(1, 3, 4).log_softmax(-1)
    >>> sparse_kl_div(torch.randn(1, 3, 50), ids, values, temperature=2.0).shape
    torch.Size([])
    """
    name = getattr(missing, "value", missing)
    if name not in _MISSING:
        raise ValueError(f"missing must be one of {', '.join(_MISSING)}, got {missing!r}")
    if name == "symmetric_uniform" and not log_target:
        raise ValueError("teacher logits say nothing about missing probability: use missing='zero'")
    for given in (temperature, target_generation_temperature, student_generation_temperature):
        checked(temperature=given)
    mask = _tokens_that_count(mask)
    values, ratio = target_values.float(), target_generation_temperature / student_generation_temperature
    temperature = temperature / student_generation_temperature
    if name == "symmetric_uniform":
        whole = values.isfinite().all(-1, keepdim=True) & (values.shape[-1] == logits.shape[-1])
        # Tempered here, tail included: so the student's logits are tempered, and compared as they are.
        target = SparseTarget(target_ids, _tempered(values, ratio / temperature, whole), tail="bucket")
        return kl_div(MappedLogits(logits, 1 / temperature), target, mask=mask, reduction="sum")
    target = SparseTarget(target_ids, values * ratio, tail="renormalize")
    return kl_div(logits, target, mask=mask, temperature=temperature, reduction="sum")


def dense_kl_div(
    logits: Tensor, target_logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """The sum over tokens of KL(teacher || student), both ``[B, T, V]`` logits.

    >>> dense_kl_div(torch.randn(1, 3, 50), torch.randn(1, 3, 50), temperature=2.0).shape
    torch.Size([])
    """
    mask = _tokens_that_count(mask)
    return kl_div(logits, target_logits, mask=mask, temperature=temperature, reduction="sum")


class KLDLoss:
    """DistillKit's loss class "kl": T^2 times the sum, divided by the tokens."""

    def __init__(
        self,
        temperature: float,
        missing_probability_handling: Any = "zero",
        sparse_chunk_length: int | None = None,
    ) -> None:
        self.temperature, self.missing = temperature, missing_probability_handling
        self.chunk_length = sparse_chunk_length

    @classmethod
    def name(cls) -> str:
        return "kl"

    def requires_hidden_states(self) -> bool:
        return False

    def __call__(
        self,
        student_outputs: Any,
        signal: Any,
        mask: Tensor | None = None,
        hidden_state_mapping: Any = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        logits = student_outputs.logits
        if hasattr(signal, "logits"):
            total = dense_kl_div(logits, signal.logits, mask, self.temperature)
        else:
            total = sparse_kl_div(
                logits,
                signal.sparse_ids,
                signal.sparse_values,
                mask,
                missing=self.missing,
                log_target=signal.log_values,
                temperature=self.temperature,
                target_generation_temperature=signal.generation_temperature,
            )
        if num_items_in_batch is None:
            num_items_in_batch = logits.shape[:-1].numel() if mask is None else (mask != 0).sum().clamp(min=1)
        return total * self.temperature**2 / num_items_in_batch


def _tokens_that_count(mask: Tensor | None) -> Tensor | None:
    """``[B, T]`` of a mask that may be ``[B, T, 1]``; None where all do."""
    return None if mask is None else (mask.squeeze(-1) if mask.dim() == 3 else mask) != 0


def _tempered(log_p: Tensor, power: float, whole: Tensor) -> Tensor:
    """log of p^power, renormalised together with the power of the mass that is missing, which of a ``whole`` row is 0.

    A row with more mass than rounding explains stays as it is, and the loss refuses it."""
    log_mass = log_p.logsumexp(-1, keepdim=True)
    if math.isclose(power, 1.0):
        normal = log_p - torch.where(whole, log_mass, log_mass.clamp(min=0))
    else:
        missing = (-torch.expm1(log_mass)).clamp(min=0).masked_fill(whole, 0.0)
        normal = (torch.cat([log_p, missing.log()], -1) * power).log_softmax(-1)[..., :-1]
    return torch.where(log_mass > _ROUNDING, log_p, normal)
