"""``F.kl_div`` for code that already holds log-probabilities: its signature, a fraction of its memory.

Everything else of ``torch.nn.functional`` is here too, so that one import changes::

    from kdkernels.integrations import functional as F

Where the logits are at hand, ``kd.kl_div`` is better: it needs no log-probabilities at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ..core.transforms import batched, tracing
from ..dtypes import wide
from ..heads import under_autocast
from ..operators import operator
from .common import is_dtensor

#: Elements of a piece. On a CPU a piece stays in cache; elsewhere it is large enough to hide the kernel launches.
_PIECE = {"cpu": 2**20}
_PIECE_ELSEWHERE = 2**24


def __getattr__(name: str) -> Any:
    return getattr(torch.nn.functional, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn.functional)})


class KLTerms(NamedTuple):
    """p (log p - x): the terms of KL(p || exp(x)), where p is the target. Neither side need sum to 1.

    This is not :class:`kdkernels.ForwardKL`, whose gradient assumes that both sum to 1. Where p is 0 the term is 0.
    """

    log_target: bool

    def terms(self, x: Tensor, t: Tensor) -> Tensor:
        p, log_p = (t.exp(), t) if self.log_target else (t, t.log())
        # 0, but NaN where x is.
        return torch.where(p == 0, x.clamp(0, 0), (log_p - x).mul_(p))

    def slopes(self, x: Tensor, t: Tensor, wants: list[bool]) -> Iterator[Tensor]:
        p = t.exp() if self.log_target else t
        if wants[0]:
            yield -p
        if wants[1] and self.log_target:
            yield torch.where(p == 0, p, (t - x).add_(1).mul_(p))
        elif wants[1]:
            yield t.log().sub_(x).add_(1)


class TVTerms(NamedTuple):
    """1/2 |x - t|, both probabilities; the gradient at ties is 0, and none goes to t (a constant)."""

    def terms(self, x: Tensor, t: Tensor) -> Tensor:
        return (x - t).abs_().mul_(0.5)

    def slopes(self, x: Tensor, t: Tensor, wants: list[bool]) -> Iterator[Tensor]:
        yield (x - t).sign_().mul_(0.5)


#: By the name that crosses the operators' boundary.
_TERMS: dict[str, KLTerms | TVTerms] = {
    "kl": KLTerms(log_target=False),
    "kl of log target": KLTerms(log_target=True),
    "tv": TVTerms(),
}


@operator("terms")
def _terms(x: Tensor, t: Tensor, mask: Tensor | None, name: str, summed: bool, dtype: torch.dtype) -> Tensor:
    """Terms of two tensors of one shape, piece by piece: their sum if ``summed``, in fp32 at least, else each in
    ``dtype``. Where ``mask`` (of that shape) is False a term is 0, whatever the tensors hold there.

    It is an operator because a compiler would unroll the loop over pieces. Only the two tensors are saved for the
    backward, which goes over them again and allocates nothing but the gradients.
    """
    terms = _TERMS[name]
    if not summed:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        for o, a, b, m in _pieces(out, x, t, mask):
            _masked(o.copy_(terms.terms(_wide(a), _wide(b))), m)
        return out
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for a, b, m in _pieces(x, t, mask):
        total += _masked(terms.terms(_wide(a), _wide(b)), m).sum()
    return total.to(torch.promote_types(dtype, torch.float32))


@torch.library.register_fake(_terms)
def _(x, t, mask, name, summed, dtype):
    if summed:
        return torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@operator("slopes")
def _slopes(
    x: Tensor, t: Tensor, mask: Tensor | None, arriving: Tensor, name: str, wants: list[bool]
) -> list[Tensor]:
    """The terms' derivatives for x and for t, where they are wanted, times the gradient ``arriving`` from above."""
    made = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s, want in zip((x, t), wants) if want]
    for a, b, g, m, *outs in _pieces(x, t, arriving, mask, *made):
        for out, slope in zip(outs, _TERMS[name].slopes(_wide(a), _wide(b), wants)):
            torch.mul(slope, g, out=out) if out.dtype == slope.dtype else out.copy_(slope * g)
            _masked(out, m)
    return made


@torch.library.register_fake(_slopes)
def _(x, t, mask, arriving, name, wants):
    return [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s, want in zip((x, t), wants) if want]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, t, mask, ctx.name, *_ = inputs
    ctx.save_for_backward(x, t, mask)


def _backward(ctx: Any, arriving: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not tracing(arriving):
        raise RuntimeError("this gradient cannot be differentiated again (create_graph=True); F.kl_div's can")
    x, t, mask = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:2])
    arriving = arriving.expand(x.shape)
    if batched(arriving):  # is_grads_batched=True has rules for torch's own functions only
        slopes = (slope * arriving for slope in _TERMS[ctx.name].slopes(_wide(x), _wide(t), wants))
        made = iter([torch.where(mask, s, 0.0) if mask is not None else s for s in slopes])
    else:
        made = iter(_slopes(x, t, mask, arriving, ctx.name, wants))
    to_x, to_t = (next(made) if want else None for want in wants)
    return to_x, to_t, None, None, None, None


torch.library.register_autograd(_terms, _backward, setup_context=_setup)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
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
        What F.kl_div returns, in the same dtype (under autocast fp32 at least), with gradients for ``input`` (-p)
        and ``target``.

    What differs: half precision is computed in fp32 and rounded once; 0 log 0 = 0 also where
    F.kl_div has NaN (``log_target`` of -inf; a target of 0 where ``input`` is -inf), and the
    gradient for a target of 0 is -inf where F.kl_div has NaN; "batchmean" of no rows is 0, not
    NaN; it cannot be differentiated twice; DTensors and nested tensors are refused.

    >>> import torch
    >>> from kdkernels.integrations import functional as F
    >>> log_q, p = torch.randn(4, 10).log_softmax(-1), torch.randn(4, 10).softmax(-1)
    >>> theirs = torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
    >>> bool(torch.isclose(F.kl_div(log_q, p, reduction="batchmean"), theirs))
    True
    """
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    return reduced("kl of log target" if log_target else "kl", input, target, reduction)


def reduced(
    name: str, x: Tensor, t: Tensor, reduction: str, rows: Tensor | None = None, wide: bool = False
) -> Tensor:
    """The terms ``name`` of two tensors that broadcast, under torch's four reductions: in the tensors' dtype, or in
    fp32 at least if ``wide`` or under autocast.

    With ``rows``, a bool tensor, only those rows' terms count: the others are 0. "mean" and
    "batchmean" divide by all of them nevertheless.
    """
    if reduction not in ("none", "sum", "mean", "batchmean"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not (x.is_floating_point() and t.is_floating_point()):
        raise ValueError(f"input and target must be floating, got {x.dtype} and {t.dtype}")
    if not torch.compiler.is_compiling():
        if any(is_dtensor(z) for z in (x, t)):
            raise ValueError(
                "this loss takes no DTensors; give their full_tensor(), or with reduction='none' or 'sum' each "
                "rank's to_local(); F.kl_div takes them"
            )
        if any(z.is_nested for z in (x, t)):
            raise ValueError(
                "this loss takes no nested tensors; give their values(), whose rows reduction='batchmean' then "
                "counts; F.kl_div takes them"
            )
        if any(unpack_dual(z).tangent is not None for z in (x, t)):
            raise RuntimeError("this loss has no forward-mode derivative; F.kl_div has")
        if any(torch._C._functorch.is_functorch_wrapped_tensor(z) for z in (x, t)):
            raise RuntimeError(
                "torch.func (grad, vmap, jacrev, ...) cannot transform this loss; it can F.kl_div"
            )
    batch = x.shape[0] if x.dim() else 1
    x, t = torch.broadcast_tensors(x, t)
    mask = None if rows is None else rows[..., None].expand(x.shape)
    dtype = torch.promote_types(x.dtype, t.dtype)
    if wide or under_autocast(x.device):
        dtype = torch.promote_types(dtype, torch.float32)
    value = _terms(x, t, mask, name, reduction != "none", dtype)
    if reduction == "mean":
        value = value / x.numel()
    elif reduction == "batchmean" and batch:
        value = value / batch
    return value.to(dtype)


def _wide(piece: Tensor) -> Tensor:
    return piece.to(wide(piece.dtype))


def _masked(terms: Tensor, mask: Tensor | None) -> Tensor:
    """``terms``, overwritten with 0 where ``mask`` is False."""
    return terms if mask is None else terms.masked_fill_(~mask, 0.0)


def _pieces(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Views of the same places of tensors of one shape and any strides, small ones at a time; None
    where a tensor is None."""
    shape, size = first.shape, _PIECE.get(first.device.type, _PIECE_ELSEWHERE)
    if first.numel() <= size:
        yield first, *others
        return
    if shape[0] == 1:
        yield from _pieces(first[0], *(None if t is None else t[0] for t in others))
        return
    rows = max(size // (first.numel() // shape[0]), 1)
    for start in range(0, shape[0], rows):
        part = slice(start, start + rows)
        yield from _pieces(first[part], *(None if t is None else t[part] for t in others))
