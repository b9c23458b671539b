"""A gradient times what arrives from autograd: 0-dim, or one number per row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import triton
from ..dtypes import HALF, wide
from .layout import flat, folds

#: What is widened to fp32 at a time where a half-precision gradient is scaled: 4 MiB of it.
_SLAB_LOGITS = 2**20


def scaled(grad: Tensor, factor: Tensor, reuse: bool) -> Tensor:
    """grad * factor, factor 0-dim or one per row of ``grad``; in ``grad``'s memory if ``reuse``."""
    if factor.dim() == 0 and factor.device.type == "cpu" and reuse and factor.item() == 1.0:
        return grad
    if factor.dim() == 0 and grad.is_cuda and reuse and grad.is_contiguous() and triton.why_not() is None:
        return triton.scale_(grad, factor)  # looks at the factor without waiting for it
    out = grad if reuse else torch.empty_like(grad)
    if factor.dim():
        factor = factor.to(wide(grad.dtype))  # in fp64 torch would hold the whole gradient in it
    _multiply(grad, factor, out)
    return out


def _multiply(grad: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = grad * factor, rounded once. On the CPU torch would hold half precision in fp32 for a factor
    per row: so few rows at a time."""
    if factor.dim() == 0 or grad.dtype not in HALF or grad.device.type != "cpu":
        torch.mul(grad, factor.unsqueeze(-1) if factor.dim() else factor, out=out)
    elif not folds(grad):
        for part in zip(grad, factor, out):
            _multiply(*part)
    else:
        grad, out = flat(grad), flat(out)
        step = max(_SLAB_LOGITS // max(grad.shape[1], 1), 1)  # an empty shard has no columns
        for g, f, o in zip(grad.split(step), factor.reshape(-1, 1).split(step), out.split(step)):
            torch.mul(g, f, out=o)
