"""What a trainer would write in PyTorch: its error is the measure of what a dtype allows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd

_FLOOR = -1e30  # for -inf, whose differences autograd cannot take


def logits(given, vocab: int) -> Tensor:
    if isinstance(given, kd.LinearHead):
        z = F.linear(given.hidden, given.weight[:vocab], None if given.bias is None else given.bias[:vocab])
        z = widened(z) * given.logit_scale
        z = given.softcap * torch.tanh(z / given.softcap) if given.softcap else z
    else:
        z = widened(given[..., :vocab])
    return z.reshape(-1, vocab).clamp(min=_FLOOR)


def widened(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _mixture(share_of_p: float, lp: Tensor, lq: Tensor) -> Tensor:
    return torch.logaddexp(lp + math.log(share_of_p), lq + math.log1p(-share_of_p))


def divergence(name: str, parameters: list, lp: Tensor, lq: Tensor) -> Tensor:
    if name == "sum":
        return sum(w * divergence(one[0], list(one[1:]), lp, lq) for w, one in parameters)
    p, q = lp.exp(), lq.exp()
    share = parameters[0] if parameters else None
    if name == "forward" or (name, share) in {("jsd", 0.0), ("skew", 0.0), ("mixed", 1.0)}:
        return (p * (lp - lq)).sum(-1)
    if name == "reverse" or (name, share) in {("jsd", 1.0), ("skew_reverse", 0.0), ("mixed", 0.0)}:
        return (q * (lq - lp)).sum(-1)
    if name == "jsd":
        m = _mixture(share, lp, lq)
        return (share * p * (lp - m) + (1 - share) * q * (lq - m)).sum(-1)
    if name == "skew":
        return (p * (lp - _mixture(share, lp, lq))).sum(-1)
    if name == "skew_reverse":
        m = _mixture(1 - share, lp, lq.detach() if parameters[1] else lq)
        return (q * (lq - m)).sum(-1)
    if name == "total_variation":
        return (p - q).abs().sum(-1) / 2
    if name == "overlap":
        return torch.where(q < p, q, p).sum(-1)
    if name == "mixed":
        return (share * p * (lp - lq) + (1 - share) * q * (lq - lp)).sum(-1)
    return alpha_beta(lp, lq, *parameters).sum(-1)


def alpha_beta(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    x, s = lp - lq, a + b
    if a == 0 and b == 0:
        return x * x / 2
    if b == 0:
        return ((a * lp).exp() * (a * x - 1) + (a * lq).exp()) / a**2
    if a == 0:
        return ((b * lq).exp() * (-b * x - 1) + (b * lp).exp()) / b**2
    if s == 0:
        return ((a * x).exp() - 1 - a * x) / a**2
    return -((a * lp + b * lq).exp() - a / s * (s * lp).exp() - b / s * (s * lq).exp()) / (a * b)


def sparse_rows(z: Tensor, t: Tensor, tail: str, kind: tuple, temperature: float) -> Tensor:
    """The soft term of each row; t ``[N, V]`` are the stored weights, 0 elsewhere."""
    name, *parameters = kind
    stored, rows = t > 0, []
    for logits, weights, some in zip(z, t, stored):
        if not some.any():
            rows.append(logits.sum() * 0)
            continue
        theirs = weights[some].log()
        if tail in ("truncate", "renormalize"):
            lp = theirs if tail == "truncate" else (theirs / temperature).log_softmax(-1)
            lq = (logits / temperature).log_softmax(-1)[some]
            rows.append((lp.exp() * (lp - lq)).sum())
            continue
        ours = logits[some]
        if tail == "bucket" and not some.all():
            ours = torch.cat([ours, logits[~some].logsumexp(-1)[None]])
            theirs = torch.cat([theirs, (1 - weights.sum()).log()[None]])
        rows.append(
            divergence(
                name, parameters, (theirs / temperature).log_softmax(-1), (ours / temperature).log_softmax(-1)
            )
        )
    return torch.stack(rows) if rows else z.sum(-1)
