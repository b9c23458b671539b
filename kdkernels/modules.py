"""The losses as ``nn.Module``: options at construction, tensors at the call."""

from __future__ import annotations

from typing import Any, Callable

from torch import nn

from . import losses


class _Loss(nn.Module):
    """Keeps the options of one of the functions in :mod:`kdkernels.losses` and calls it."""

    function: Callable[..., Any] = staticmethod(losses.distillation_loss)

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, *tensors, **options):
        return type(self).function(*tensors, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DistillationLoss(_Loss):
    """:func:`kdkernels.distillation_loss` with its options kept.

    >>> import torch, kdkernels as kd
    >>> loss = kd.DistillationLoss(divergence=kd.JSD(0.5), temperature=2.0)
    >>> loss(torch.randn(2, 5), torch.randn(2, 5)).shape
    torch.Size([])
    """


class CodistillationLossModule(_Loss):
    """:func:`kdkernels.codistillation_loss` with its options kept."""

    function = staticmethod(losses.codistillation_loss)


class KLDivLoss(_Loss):
    """:func:`kdkernels.kl_div` with its options kept."""

    function = staticmethod(losses.kl_div)


class JSDivergenceLoss(_Loss):
    """:func:`kdkernels.js_divergence` with its options kept."""

    function = staticmethod(losses.js_divergence)


class CrossEntropyLoss(_Loss):
    """:func:`kdkernels.cross_entropy` with its options kept."""

    function = staticmethod(losses.cross_entropy)


class LinearCrossEntropyLoss(_Loss):
    """:func:`kdkernels.linear_cross_entropy` with its options kept."""

    function = staticmethod(losses.linear_cross_entropy)
