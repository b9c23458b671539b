"""What the drop-ins share: masks as labels, lm_heads as trainers hold them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..heads import LinearHead

IGNORED = -100


def whole(parameter: Any) -> Tensor:
    """A DTensor parameter (FSDP2, tensor parallel) gathered; other tensors as they are.

    Its gradient is the mean over ranks: the data-parallel rule, and with the same data on every rank the
    gradient itself. Without it a rank would keep a slice of its own gradient, unreduced.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **logit_map) -> LinearHead:
    """A LinearHead of parameters that may be sharded, or wider than the hidden states (master weights).

    >>> import torch
    >>> head(torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(50, 8), softcap=30.0).vocab_size
    50
    """
    weight = whole(weight).to(hidden.dtype)
    bias = None if bias is None else whole(bias).to(hidden.dtype)
    return LinearHead(hidden, weight, bias, **logit_map)
