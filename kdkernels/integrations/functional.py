"""``F.kl_div`` for code that already holds log-probabilities: its signature, a fraction of its memory.

Where the logits are at hand, ``kd.kl_div`` is better: it needs no log-probabilities at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

#: Elements that are worked on at a time: on a CPU what stays in its cache, elsewhere what
#: hides the launches.
_PIECE = {"cpu": 2**20}
_PIECE_ELSEWHERE = 2**24

Slopes = tuple[Optional[Tensor], Optional[Tensor]]


class KLTerms(NamedTuple):
    """p (log p - x): the terms of KL(p || exp(x)), p the target, neither of which need sum to 1.

    Written out beside :class:`kdkernels.ForwardKL`, whose ``phi`` may lean on both being finite
    log-probabilities and whose gradient on their sums being 1. Where p is 0 the term is 0.
    """

    log_target: bool

    def terms(self, x: Tensor, t: Tensor) -> Tensor:
        p, log_p = (t.exp(), t) if self.log_target else (t, t.log())
        return torch.where(p == 0, p, (log_p - x).mul_(p))

    def slopes(self, x: Tensor, t: Tensor, wants: list[bool]) -> Slopes:
        p = t.exp() if self.log_target else t
        to_x = -p if wants[0] else None
        if not wants[1]:
            return to_x, None
        if self.log_target:
            return to_x, torch.where(p == 0, p, (t - x).add_(1).mul_(p))
        return to_x, t.log().sub_(x).add_(1)


class TVTerms(NamedTuple):
    """1/2 |x - t|, both probabilities; the gradient at ties is 0, and none goes to t (a constant)."""

    def terms(self, x: Tensor, t: Tensor) -> Tensor:
        return (x - t).abs_().mul_(0.5)

    def slopes(self, x: Tensor, t: Tensor, wants: list[bool]) -> Slopes:
        return (x - t).sign_().mul_(0.5), None


Terms = Union[KLTerms, TVTerms]


class _Walk(torch.autograd.Function):
    """Terms of two tensors of one shape, piece by piece; their sum, or each.

    Kept for the backward: the two tensors, nothing else. The backward walks them again and allocates
    the gradients only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, terms: Terms, summed: bool) -> Tensor:
        ctx.save_for_backward(x, t)
        ctx.terms, ctx.summed = terms, summed
        dtype = torch.promote_types(x.dtype, t.dtype)
        if not summed:
            out = torch.empty(x.shape, dtype=dtype, device=x.device)
            for a, b, o in _pieces(x, t, out):
                o.copy_(terms.terms(_wide(a), _wide(b)))
            return out
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for a, b in _pieces(x, t):
            total += terms.terms(_wide(a), _wide(b)).sum()
        return total.to(torch.promote_types(dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Optional[Tensor], ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("this gradient cannot be differentiated again (create_graph=True); F.kl_div's can")
        tensors, wants = ctx.saved_tensors, list(ctx.needs_input_grad[:2])
        arriving = arriving.expand(tensors[0].shape)
        # A gradient that nobody wants is an expanded scalar: it takes part in the walk and no memory.
        made = [torch.empty(s.shape if want else (), dtype=s.dtype, device=s.device).expand(s.shape)
                for s, want in zip(tensors, wants)]  # fmt: skip
        for a, b, g, *outs in _pieces(*tensors, arriving, *made):
            for out, slope in zip(outs, ctx.terms.slopes(_wide(a), _wide(b), wants)):
                if slope is not None:
                    torch.mul(slope, g, out=out) if out.dtype == slope.dtype else out.copy_(slope * g)
        return (*(grad if want else None for grad, want in zip(made, wants)), None, None)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: Optional[bool] = None,
    reduce: Optional[bool] = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """``torch.nn.functional.kl_div``: KL(target || exp(input)), term by term, then reduced.

    Args:
        input: log-probabilities, any shape that broadcasts with ``target``.
        target: probabilities, or log-probabilities with ``log_target=True``.
        size_average, reduce: torch's deprecated form of ``reduction``, which they override.
        reduction: "none", "sum", "batchmean" (sum / size(0)) or "mean" (sum / number of elements).

    Returns:
        What F.kl_div returns, in the same dtype, with gradients for ``input`` (-p) and ``target``.

    What differs: half precision is computed in fp32 and rounded once; 0 log 0 = 0 also where
    F.kl_div has NaN (``log_target`` of -inf; a target of 0 where ``input`` is -inf), and the
    gradient for a target of 0 is -inf where F.kl_div has NaN; it cannot be differentiated twice.

    >>> import torch
    >>> from kdkernels.integrations import functional as F
    >>> log_q, p = torch.randn(4, 10).log_softmax(-1), torch.randn(4, 10).softmax(-1)
    >>> theirs = torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
    >>> bool(torch.isclose(F.kl_div(log_q, p, reduction="batchmean"), theirs))
    True
    """
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    return reduced(KLTerms(log_target), input, target, reduction)


def reduced(terms: Terms, x: Tensor, t: Tensor, reduction: str) -> Tensor:
    """``terms`` of two tensors that broadcast, under torch's four reductions."""
    if reduction not in ("none", "sum", "mean", "batchmean"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not (x.is_floating_point() and t.is_floating_point()):
        raise ValueError(f"input and target must be floating, got {x.dtype} and {t.dtype}")
    rows = x.shape[0] if x.dim() else 1
    x, t = torch.broadcast_tensors(x, t)
    value = _Walk.apply(x, t, terms, reduction != "none")
    if reduction == "mean":
        value = value / x.numel()
    elif reduction == "batchmean" and rows:
        value = value / rows
    return value.to(torch.promote_types(x.dtype, t.dtype))


def _wide(piece: Tensor) -> Tensor:
    return piece.float() if piece.dtype in (torch.bfloat16, torch.float16) else piece


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same places of tensors of one shape and any strides, small ones at a time."""
    first = tensors[0]
    shape, size = first.shape, _PIECE.get(first.device.type, _PIECE_ELSEWHERE)
    if first.numel() <= size:
        yield tensors
        return
    if shape[0] == 1:
        yield from _pieces(*(t[0] for t in tensors))
        return
    rows = max(size // (first.numel() // shape[0]), 1)
    for start in range(0, shape[0], rows):
        yield from _pieces(*(t[start : start + rows] for t in tensors))
