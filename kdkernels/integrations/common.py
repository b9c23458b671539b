"""What the drop-ins share: masks as labels, lm_heads as trainers hold them."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..heads import LinearHead

IGNORED = -100


def mask_labels(kept: Tensor) -> Tensor:
    """int64 labels that say only which tokens count: those where ``kept`` is not 0.

    >>> mask_labels(torch.tensor([1, 0, 2]))
    tensor([   0, -100,    0])
    """
    return torch.where(kept != 0, 0, IGNORED)


def whole(parameter: Tensor) -> Tensor:
    """A DTensor (FSDP2, tensor parallel) gathered, differentiably; other tensors as they are."""
    gather = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


def head(hidden: Tensor, weight: Tensor, bias: Optional[Tensor] = None, **logit_map) -> LinearHead:
    """A LinearHead of parameters that may be sharded, or wider than the hidden states (master weights).

    >>> head(torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(50, 8), softcap=30.0).vocab_size
    50
    """
    weight = whole(weight).to(hidden.dtype)
    bias = None if bias is None else whole(bias).to(hidden.dtype)
    return LinearHead(hidden, weight, bias, **logit_map)
