"""The oracle: textbook formulas on full fp64 logits; autograd does the gradient.

Slow, large, and twice differentiable. Everything else in the package is compared with this page.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Optional, Union

import torch
from torch import Tensor

from .backends import row_state as rs
from .divergences import Divergence, NoDivergence, simplified
from .heads import LinearHead
from .outcomes import LEAST_TAIL
from .spec import LogitMap, Spec
from .targets import SparseTarget


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


class SparseOracle:
    """A sparse target written out over the whole vocabulary: t ``[N, V]``, 0 where nothing is stored."""

    def __init__(self, target: SparseTarget, vocab: int, live: Optional[Tensor]) -> None:
        ids, values = target.ids.reshape(-1, target.slots), target.values.reshape(-1, target.slots)
        given = ids >= 0
        if target.mask is not None:
            given = given & target.mask.reshape(ids.shape)
        if live is not None:
            given = given & live[:, None]
        ids = torch.where(given, ids, 0)
        t = torch.where(given, values.double() if target.logprobs is None else values.double().exp(), 0.0)
        self.t = t.new_zeros(ids.shape[0], vocab).scatter_add_(1, ids, t)
        self.kept, self.some, self.tail = self.t > 0, (self.t > 0).any(-1), target.tail

    def grouped(self, z: Tensor, rest_of_teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(student, teacher) logits of V + 1 outcomes: the stored ids, and last the rest."""
        others = z.masked_fill(self.kept, -torch.inf)
        everything = self.kept.all(-1)
        rest = torch.where(everything[:, None], 0.0, others).logsumexp(-1)
        rest, log_rest = (r.masked_fill(everything, -torch.inf) for r in (rest, rest_of_teacher.log()))
        return (torch.cat([z.masked_fill(~self.kept, -torch.inf), rest[:, None]], 1),
                torch.cat([self.t.log(), log_rest[:, None]], 1))  # fmt: skip

    def rows(self, z: Tensor, divergence: Divergence, temperature: float) -> Tensor:
        """The soft term of each row, ``[N]``."""
        if self.tail == "bucket":
            return divergence_rows(*self.grouped(z, self.rest()), divergence, temperature)
        if self.tail == "conditional":
            student, teacher = self.conditional(z)
            return torch.where(self.some, divergence_rows(student, teacher, divergence, temperature), 0.0)
        p = self.t
        if self.tail == "renormalize":
            p = p ** (1 / temperature)
            p = p / torch.where(self.some, p.sum(-1), 1.0)[:, None]
        log_q = (z / temperature).log_softmax(-1)
        return torch.where(self.kept, p * (p.log() - log_q), 0.0).sum(-1)

    def rest(self) -> Tensor:
        rest = 1 - self.t.sum(-1)
        return torch.where(rest > 0, rest, LEAST_TAIL)

    def conditional(self, z: Tensor) -> tuple[Tensor, Tensor]:
        hidden = ~self.kept & self.some[:, None]
        return z.masked_fill(hidden, -torch.inf), self.t.log().masked_fill(~self.some[:, None], 0.0)

    def compared(self, z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(student, teacher) logits of the outcomes compared, for the metrics."""
        if self.tail == "conditional":
            student, teacher = self.conditional(z)
            return student / temperature, teacher / temperature
        if self.tail == "bucket":
            student, teacher = self.grouped(z, self.rest())
            return student / temperature, teacher / temperature
        student, teacher = self.grouped(z / temperature, (~self.some).double())
        return student, teacher / (temperature if self.tail == "renormalize" else 1)

    def agreement(self, z: Tensor) -> Tensor:
        if self.tail == "conditional":
            z = z.masked_fill(~self.kept, -torch.inf)
        return (self.some & (z.argmax(-1) == self.t.argmax(-1))).double()


def _entropy(logits: Tensor) -> Tensor:
    log_q = logits.log_softmax(-1)
    return -torch.where(log_q.exp() > 0, log_q.exp() * log_q, 0.0).sum(-1)


def rows(student, teacher, labels: Optional[Tensor], spec: Spec, vocab: int) -> tuple[Tensor, Tensor]:
    """(each row's loss before its weight, per-row results) of checked inputs, ``[N]`` and ``[N, RESULTS]``."""
    s = logits_of(student, vocab)
    live: Optional[Tensor] = None if labels is None else labels >= 0
    results = s.new_zeros(s.shape[0], rs.RESULTS)
    total = s.new_zeros(s.shape[0])
    with torch.no_grad():
        results[:, rs.STUDENT_ENTROPY] = _entropy(s / spec.temperature)
    if isinstance(teacher, SparseTarget):
        oracle = SparseOracle(teacher, vocab, live)
        soft = oracle.rows(s, spec.divergence, spec.temperature)
        total = total + spec.soft_weight * soft
        results[:, rs.SOFT] = soft.detach()
        with torch.no_grad():
            for at, z in zip(
                (rs.STUDENT_ENTROPY, rs.TEACHER_ENTROPY), oracle.compared(s, spec.temperature)
            ):
                results[:, at] = torch.where(oracle.some, _entropy(z), 0.0)
            results[:, rs.AGREEMENT] = oracle.agreement(s)
    elif not isinstance(spec.divergence, NoDivergence):
        t = logits_of(teacher, vocab)
        soft = divergence_rows(s, t, spec.divergence, spec.temperature)
        total = total + spec.soft_weight * soft
        with torch.no_grad():
            results[:, rs.SOFT] = soft
            results[:, rs.TEACHER_ENTROPY] = _entropy(t / spec.temperature)
            results[:, rs.AGREEMENT] = (s.argmax(-1) == t.argmax(-1)).double()
    if spec.hard_weight:
        assert labels is not None
        hard = cross_entropy_rows(s, labels, label_smoothing=spec.label_smoothing, z_loss=spec.z_loss)
        total = total + spec.hard_weight * hard
        results[:, rs.HARD] = hard.detach()
    if live is not None:
        total = torch.where(live, total, 0.0)
        results = torch.where(live[:, None], results, 0.0)
    return total, results


def run(student, teacher, call, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """(loss, per-row results) of a checked call of :mod:`kdkernels.losses`."""
    # At its ends JSD's own formula is 0, and not the KL that it stands for.
    spec = call.spec._replace(divergence=simplified(divergence))
    total, results = rows(student, teacher, call.labels, spec, call.vocab)
    total = total * call.weights.double()
    dtype = call.weights.dtype
    if call.reduction == "none":
        return total.reshape(call.student.leading).to(dtype), results
    return (total * call.scale).sum().to(dtype), results


def operator(student: list[Tensor], teacher: list[Tensor], labels: Optional[Tensor], weights: Tensor, spec: Spec,
             vocab: int, wants: list[bool]) -> list[Tensor]:  # fmt: skip
    """What ``kdkernels::rows`` gives, from the oracle: compiled code comes here, since it knows only operators.

    An operator runs below autograd, which the oracle takes its gradients from. A thread of its own has it.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_operator, student, teacher, labels, weights, spec, vocab, wants).result()


def _operator(student, teacher, labels, weights, spec, vocab, wants) -> list[Tensor]:
    tensors = [t.detach().clone(memory_format=torch.contiguous_format) for t in student + teacher]
    leaves = [t.requires_grad_(want) for t, want in zip(tensors, wants)]
    s = _side(leaves[: len(student)], spec.student_map)
    t: Union[Tensor, LinearHead, SparseTarget, None] = None
    if spec.tail:
        kind = "weights" if spec.linear else "logprobs"
        t = SparseTarget(leaves[-2], tail=spec.tail, **{kind: leaves[-1]})
    elif teacher:
        t = _side(leaves[len(student) :], spec.teacher_map)
    total, results = rows(s, t, labels, spec, vocab)
    if spec.teacher_hard_weight:
        assert labels is not None and isinstance(t, (Tensor, LinearHead))
        hard = cross_entropy_rows(logits_of(t, vocab), labels, label_smoothing=0.0, z_loss=0.0)
        total = total + spec.teacher_hard_weight * hard
        results[:, rs.TEACHER_HARD] = hard.detach()
    wanted = [leaf for leaf, want in zip(leaves, wants) if want]
    if not wanted:
        return [results]
    gradients = torch.autograd.grad((total * weights.double()).sum(), wanted)
    return [results, *(g.contiguous() for g in gradients)]


def _side(tensors: list[Tensor], logit_map: LogitMap) -> Union[Tensor, LinearHead]:
    if len(tensors) == 1:
        return tensors[0]
    bias = tensors[2] if len(tensors) > 2 else None
    return LinearHead(tensors[0], tensors[1], bias, logit_map.scale, logit_map.softcap or None)
