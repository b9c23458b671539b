"""What users hand over besides plain logits: hidden states and an lm_head, or logits that are still to be mapped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_tensor, number


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Hidden states and the lm_head that would turn them into logits.

    Args:
        hidden: ``[..., H]`` floating.
        weight: ``[V, H]``, the lm_head's weight, same dtype and device (autocast casts both).
        bias: ``[V]`` or None.
        logit_scale: logits are multiplied by it (Cohere); a finite number, a constant, not 0.
        softcap: ``softcap * tanh(logits / softcap)`` after the scale (Gemma 2); > 0 or None; a constant too.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a number is out of range or requires
            grad. TypeError: something is no Tensor, or no number.

    >>> head = LinearHead(torch.randn(2, 3, 8), torch.randn(50, 8), softcap=30.0)
    >>> head.vocab_size, head.leading_shape
    (50, torch.Size([2, 3]))
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        hidden, weight = self.hidden, self.weight
        for name in ("hidden", "weight") if self.bias is None else ("hidden", "weight", "bias"):
            check_tensor(f"LinearHead's {name}", getattr(self, name))
        if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"LinearHead needs hidden [..., H] and weight [V, H], got hidden "
                f"{tuple(hidden.shape)} and weight {tuple(weight.shape)}"
            )
        if self.bias is not None and tuple(self.bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"LinearHead needs bias [V] = ({weight.shape[0]},), got {tuple(self.bias.shape)}"
            )
        tensors = [hidden, weight] + ([] if self.bias is None else [self.bias])
        if len({t.device for t in tensors}) > 1:
            raise ValueError(f"LinearHead is spread over devices {[str(t.device) for t in tensors]}")
        self._check_dtypes(tensors)
        _check_map(self)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def leading_shape(self) -> torch.Size:
        return self.hidden.shape[:-1]

    @property
    def _is_cast(self) -> bool:
        """By autocast, which leaves fp64 alone."""
        kind = self.hidden.device.type
        possible = torch.amp.is_autocast_available(kind) and self.hidden.dtype != torch.float64
        return possible and torch.is_autocast_enabled(kind)

    def _check_dtypes(self, tensors: list[Tensor]) -> None:
        if not all(t.is_floating_point() for t in tensors) or (
            not self._is_cast and len({t.dtype for t in tensors}) > 1
        ):
            raise ValueError(
                f"LinearHead needs one floating dtype, got {[str(t.dtype) for t in tensors]}; "
                "cast hidden or weight, or use torch.autocast"
            )

    def tensors(self) -> list[Tensor]:
        """[hidden, weight] or [hidden, weight, bias], cast as F.linear would under autocast."""
        given = [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])
        self._check_dtypes(given)  # again: autocast may have ended since
        kind = self.hidden.device.type
        if self._is_cast:
            given = [t.to(torch.get_autocast_dtype(kind)) for t in given]
        return given


@dataclass(frozen=True, eq=False)
class MappedLogits:
    """Logits ``[..., V]`` that are still to be scaled and capped, as a :class:`LinearHead`'s are.

    The pass that reads them does it, in its arithmetic: a half-precision cap would round the logits
    again, and cost a tensor of their size. Gradients are those of the logits as they are given.
    """

    logits: Tensor
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        check_tensor("logits", self.logits)
        _check_map(self)

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[-1]

    @property
    def leading_shape(self) -> torch.Size:
        return self.logits.shape[:-1]

    def tensors(self) -> list[Tensor]:
        return [self.logits]


def _check_map(given: LinearHead | MappedLogits) -> None:
    """Makes the scale and the cap Python numbers. An error where one is out of range, not a number, or learned."""
    owner = type(given).__name__
    object.__setattr__(given, "logit_scale", number(f"{owner}'s logit_scale", given.logit_scale))
    if given.logit_scale == 0:
        raise ValueError(f"{owner} needs logit_scale != 0, got 0")
    if given.softcap is not None:
        object.__setattr__(given, "softcap", number(f"{owner}'s softcap", given.softcap))
        if not given.softcap > 0:
            raise ValueError(f"{owner} needs softcap > 0 or None, got softcap={given.softcap}")
