"""The keyword options of the public losses, as types for editors and type checkers.

The functions in :mod:`kdkernels.losses` say what each option means and what its default is; nothing here runs.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import Tensor

Reduction = Literal["none", "sum", "mean", "batchmean"]


class _SharedOptions(TypedDict, total=False):
    """What every loss takes."""

    label_smoothing: float
    z_loss: float
    mask: Tensor | None
    token_weights: Tensor | None
    reduction: Reduction
    num_items: int | float | Tensor | None
    ignore_index: int
    vocab_size: int | None
    chunk_bytes: int | None
    gradient_tolerance: float


class CrossEntropyOptions(_SharedOptions, total=False):
    """Of :func:`kdkernels.cross_entropy` and :func:`kdkernels.linear_cross_entropy`."""

    class_weights: Tensor | None
    inplace: bool


class CodistillationOptions(_SharedOptions, total=False):
    """Of :func:`kdkernels.codistillation_loss`, but for ``divergence`` and ``return_stats``."""

    temperature: float | Tensor
    temperature_squared: bool
    soft_weight: float | Tensor
    hard_weight: float | Tensor


class DistillationOptions(CodistillationOptions, total=False):
    """Of :func:`kdkernels.distillation_loss` and its short names, but for ``divergence`` and ``return_stats``."""

    entropy_weight: float | Tensor
    inplace: bool
