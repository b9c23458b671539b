"""The losses as ``nn.Module``: options at construction, tensors at the call."""

from __future__ import annotations

import difflib
import inspect
from typing import Any, Callable

from torch import nn

from . import losses
from .core.option_checks import check_options


def _keywords(function: Callable[..., Any] | None) -> list[str]:
    if function is None:
        return []
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


class _Loss(nn.Module):
    """Keeps the options of one of the functions in :mod:`kdkernels.losses` and calls it. Class weights move and are cast with
    the module, as those of torch's losses are; they are not in its state_dict.

    Names and values are checked here: TypeError for an option that the function does not have, and what the
    function itself would raise.
    """

    function: Callable[..., Any] = staticmethod(losses.distillation_loss)
    #: The function that ``function`` is a short name of, and hands its other options to.
    general: Callable[..., Any] | None = None

    def __init__(self, **options) -> None:
        super().__init__()
        kind = type(self)
        names = _keywords(kind.function) + [name for name in _keywords(kind.general) if name != "divergence"]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
                raise TypeError(f"{kind.__name__} has no option {name}{hint}")
        check_options(options)
        if "class_weights" in names:
            self.register_buffer("class_weights", options.pop("class_weights", None), persistent=False)
        self.options = options

    def forward(self, *tensors, **options):
        own = {"class_weights": self.class_weights} if "class_weights" in self._buffers else {}
        return type(self).function(*tensors, **{**own, **self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DistillationLoss(_Loss):
    """:func:`kdkernels.distillation_loss` with its options kept.

    >>> import torch, kdkernels as kd
    >>> loss = kd.DistillationLoss(divergence=kd.JSD(0.5), temperature=2.0)
    >>> loss(torch.randn(2, 5), torch.randn(2, 5)).shape
    torch.Size([])
    >>> kd.DistillationLoss(temprature=2.0)
    Traceback (most recent call last):
    TypeError: DistillationLoss has no option temprature; did you mean temperature?
    """


class CodistillationLossModule(_Loss):
    """:func:`kdkernels.codistillation_loss` with its options kept.

    >>> import torch, kdkernels as kd
    >>> loss = kd.CodistillationLossModule(soft_weight=0.5)
    >>> losses = loss(torch.randn(2, 5), torch.randn(2, 5), torch.tensor([1, 4]))
    >>> losses.student.shape, losses.teacher.shape
    (torch.Size([]), torch.Size([]))
    """

    function = staticmethod(losses.codistillation_loss)


class KLDivLoss(_Loss):
    """:func:`kdkernels.kl_div` with its options kept.

    >>> import torch, kdkernels as kd
    >>> kd.KLDivLoss(reduction="none")(torch.randn(2, 5), torch.randn(2, 5)).shape
    torch.Size([2])
    """

    function = staticmethod(losses.kl_div)
    general = staticmethod(losses.distillation_loss)


class JSDivergenceLoss(_Loss):
    """:func:`kdkernels.js_divergence` with its options kept.

    >>> import torch, kdkernels as kd
    >>> kd.JSDivergenceLoss(beta=0.1)(torch.randn(2, 5), torch.randn(2, 5)).shape
    torch.Size([])
    """

    function = staticmethod(losses.js_divergence)
    general = staticmethod(losses.distillation_loss)


class CrossEntropyLoss(_Loss):
    """:func:`kdkernels.cross_entropy` with its options kept.

    >>> import torch, kdkernels as kd
    >>> kd.CrossEntropyLoss(label_smoothing=0.1)(torch.randn(2, 5), torch.tensor([1, -100])).shape
    torch.Size([])
    """

    function = staticmethod(losses.cross_entropy)


class LinearCrossEntropyLoss(_Loss):
    """:func:`kdkernels.linear_cross_entropy` with its options kept.

    >>> import torch, kdkernels as kd
    >>> loss = kd.LinearCrossEntropyLoss(z_loss=1e-4)
    >>> loss(torch.randn(2, 8), torch.randn(5, 8), torch.tensor([1, 4])).shape
    torch.Size([])
    """

    function = staticmethod(losses.linear_cross_entropy)
    general = staticmethod(losses.cross_entropy)
