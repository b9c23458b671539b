"""The oracle: textbook formulas on full fp64 logits; autograd does the gradient.

Slow, large, and twice differentiable. Everything else in the package is compared with this page.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from .backends import row_state as rs
from .divergences import Divergence, NoDivergence
from .heads import LinearHead


def logits_of(given: Union[Tensor, LinearHead], vocab: int) -> Tensor:
    """``[N, vocab]`` fp64 logits."""
    if isinstance(given, Tensor):
        return given.reshape(-1, given.shape[-1])[:, :vocab].double()
    z = given.hidden.reshape(-1, given.hidden.shape[-1]).double() @ given.weight.double().t()
    if given.bias is not None:
        z = z + given.bias.double()
    z = z * given.logit_scale
    if given.softcap is not None:
        z = given.softcap * torch.tanh(z / given.softcap)
    return z[:, :vocab]


def divergence_rows(student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float) -> Tensor:
    """The divergence of each row of logits, ``[N]``."""
    log_q = (student / temperature).log_softmax(-1)
    log_p = (teacher.detach() / temperature).log_softmax(-1)
    return divergence.phi(log_p.exp(), log_q.exp(), log_p, log_q).sum(-1)


def cross_entropy_rows(logits: Tensor, labels: Tensor, *, label_smoothing: float, z_loss: float) -> Tensor:
    """Cross entropy of each row, 0 where the label is -1, ``[N]``."""
    log_q = logits.log_softmax(-1)
    loss = -(1 - label_smoothing) * log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    if label_smoothing:
        loss = loss - label_smoothing * log_q.mean(-1)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square()
    return torch.where(labels >= 0, loss, 0.0)


def _entropy(logits: Tensor) -> Tensor:
    log_q = logits.log_softmax(-1)
    return -torch.where(log_q.exp() > 0, log_q.exp() * log_q, 0.0).sum(-1)


def run(student, teacher, call, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """(loss, per-row results) of a checked call of :mod:`kdkernels.losses`."""
    spec, labels = call.spec, call.labels
    s = logits_of(student, call.vocab)
    live: Optional[Tensor] = None if labels is None else labels >= 0
    results = s.new_zeros(s.shape[0], rs.RESULTS)
    total = s.new_zeros(s.shape[0])
    with torch.no_grad():
        results[:, rs.STUDENT_ENTROPY] = _entropy(s / spec.temperature)
    if not isinstance(divergence, NoDivergence):
        t = logits_of(teacher, call.vocab)
        soft = divergence_rows(s, t, divergence, spec.temperature)
        total = total + spec.soft_weight * soft
        with torch.no_grad():
            results[:, rs.SOFT] = soft
            results[:, rs.TEACHER_ENTROPY] = _entropy(t / spec.temperature)
            results[:, rs.AGREEMENT] = (s.argmax(-1) == t.argmax(-1)).double()
    if spec.hard_weight:
        hard = cross_entropy_rows(s, labels, label_smoothing=spec.label_smoothing, z_loss=spec.z_loss)
        total = total + spec.hard_weight * hard
        results[:, rs.HARD] = hard.detach()
    if live is not None:
        total = torch.where(live, total, 0.0)
        results = torch.where(live[:, None], results, 0.0)
    rows = total * call.weights.double()
    dtype = call.weights.dtype
    if call.reduction == "none":
        return rows.reshape(call.student.leading).to(dtype), results
    return (rows * call.scale).sum().to(dtype), results
