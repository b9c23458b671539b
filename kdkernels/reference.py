"""The oracle: textbook formulas on full fp64 logits; autograd does the gradient.

Slow, large, and twice differentiable. Everything else in the package is compared with this page.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .backends import row_state as rs
from .backends.outcomes import LEAST_TAIL
from .backends.spec import LogitMap, Spec
from .divergences import Divergence, NoDivergence, simplified
from .heads import LinearHead, MappedLogits
from .targets import SparseTarget

_Logits = Tensor | LinearHead | MappedLogits


def logits_of(given: _Logits, vocab: int, counted: Tensor) -> Tensor:
    """``[N, vocab]`` fp64 logits. The rows that are not ``counted`` ``[N]`` may hold anything, NaN too, and are
    taken for 0: neither they nor their hidden states reach a product, whose 0 * NaN would be NaN. With a bias of
    -inf, too: against a teacher's 0 it would be an infinite divergence."""

    def rows(t: Tensor) -> Tensor:
        return torch.where(counted[:, None], t.reshape(-1, t.shape[-1]), 0.0).double()

    if isinstance(given, Tensor):
        return rows(given)[:, :vocab]
    if isinstance(given, MappedLogits):
        z = rows(given.logits)
    else:
        z = rows(given.hidden) @ given.weight.double().t()
        if given.bias is not None:
            z = z + given.bias.double()
    z = z * given.logit_scale
    if given.softcap is not None:
        z = given.softcap * torch.tanh(z / given.softcap)
    return torch.where(counted[:, None], z[:, :vocab], 0.0)


def _below_top(z: Tensor) -> Tensor:
    """The same distribution from logits of at most 0: what is far from 0 loses digits in fp64 too when it is
    divided by a temperature. A constant's gradient is none."""
    return z - z.detach().amax(-1, keepdim=True)


def divergence_rows(student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float) -> Tensor:
    """The divergence of each row of logits, ``[N]``."""
    log_q = (student / temperature).log_softmax(-1)
    log_p = (teacher.detach() / temperature).log_softmax(-1)
    return divergence.phi(log_p.exp(), log_q.exp(), log_p, log_q).sum(-1)


def cross_entropy_rows(logits: Tensor, labels: Tensor, *, label_smoothing: float, z_loss: float) -> Tensor:
    """Cross entropy of each row, 0 where the label is -1, ``[N]``."""
    log_q = logits.log_softmax(-1)
    loss = torch.zeros_like(log_q[:, 0])
    if label_smoothing < 1:
        loss = loss - (1 - label_smoothing) * log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    if label_smoothing:
        loss = loss - label_smoothing * log_q.mean(-1)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square()
    return torch.where(labels >= 0, loss, 0.0)


class SparseOracle:
    """A sparse target written out over the whole vocabulary: log t ``[N, V]``, -inf where nothing is stored.

    Logarithms, since a stored e^-800 is 0 in fp64, and any weight is at a low enough temperature.
    """

    def __init__(self, target: SparseTarget, vocab: int, counted: Tensor) -> None:
        ids, values = target.ids.reshape(-1, target.slots), target.values.reshape(-1, target.slots)
        given = (ids >= 0) & counted[:, None]
        if target.mask is not None:
            given = given & target.mask.reshape(ids.shape)
        ids, values = torch.where(given, ids, 0), values.detach().double()
        values = torch.where(given, values.log() if target.logprobs is None else values, -torch.inf)
        log_t = values.new_full((ids.shape[0], vocab), -torch.inf)
        for at, value in zip(ids.split(1, 1), values.split(1, 1)):  # what is stored twice adds up
            log_t.scatter_(1, at, torch.logaddexp(log_t.gather(1, at), value))
        self.log_t, self.kept, self.tail = log_t, log_t > -torch.inf, target.tail
        self.some = self.kept.any(-1)

    def grouped(self, z: Tensor, rest_of_teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(student, teacher) logits of V + 1 outcomes: the stored ids, and last the rest."""
        others = z.masked_fill(self.kept, -torch.inf)
        everything = self.kept.all(-1)
        rest = torch.where(everything[:, None], 0.0, others).logsumexp(-1)
        rest, log_rest = (r.masked_fill(everything, -torch.inf) for r in (rest, rest_of_teacher.log()))
        return (
            torch.cat([z.masked_fill(~self.kept, -torch.inf), rest[:, None]], 1),
            torch.cat([self.log_t, log_rest[:, None]], 1),
        )

    def rows(self, z: Tensor, divergence: Divergence, temperature: float) -> Tensor:
        """The soft term of each row, ``[N]``."""
        if self.tail == "bucket":
            return divergence_rows(*self.grouped(z, self.rest()), divergence, temperature)
        if self.tail == "conditional":
            student, teacher = self.conditional(z)
            return torch.where(self.some, divergence_rows(student, teacher, divergence, temperature), 0.0)
        log_p = self.log_t
        if self.tail == "renormalize":
            log_p = torch.where(self.some[:, None], (log_p / temperature).log_softmax(-1), -torch.inf)
        log_q = (z / temperature).log_softmax(-1)
        p = log_p.exp()
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)

    def rest(self) -> Tensor:
        rest = 1 - self.log_t.exp().sum(-1)
        return torch.where(rest > 0, rest, LEAST_TAIL)

    def conditional(self, z: Tensor) -> tuple[Tensor, Tensor]:
        hidden = ~self.kept & self.some[:, None]
        return z.masked_fill(hidden, -torch.inf), self.log_t.masked_fill(~self.some[:, None], 0.0)

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
        return (self.some & (z.argmax(-1) == self.log_t.argmax(-1))).double()


def _entropy(logits: Tensor) -> Tensor:
    log_q = logits.log_softmax(-1)
    return -torch.where(log_q.exp() > 0, log_q.exp() * log_q, 0.0).sum(-1)


def _terms(
    student, teacher, labels: Tensor | None, spec: Spec, vocab: int, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(soft terms ``[N]``, hard terms ``[N]``, results ``[N, RESULTS]``), all 0 for the tokens that are not
    ``counted`` ``[N]``, whose logits may be anything."""
    s = logits_of(student, vocab, counted)
    soft, hard = torch.zeros_like(s[:, 0]), torch.zeros_like(s[:, 0])
    results = s.new_zeros(s.shape[0], rs.RESULTS)
    z = _below_top(s)
    some, compared = counted, [z / spec.temperature]
    if isinstance(teacher, SparseTarget):
        oracle = SparseOracle(teacher, vocab, counted)
        soft = oracle.rows(z, spec.divergence, spec.temperature)
        some, compared = oracle.some, list(oracle.compared(z, spec.temperature))
        results[:, rs.AGREEMENT] = oracle.agreement(s)
    elif not isinstance(spec.divergence, NoDivergence):
        t = _below_top(logits_of(teacher, vocab, counted))
        soft = divergence_rows(z, t, spec.divergence, spec.temperature)
        compared += [t / spec.temperature]
        results[:, rs.AGREEMENT] = (s.argmax(-1) == t.argmax(-1)).double()
    if spec.hard_weight:
        assert labels is not None
        hard = cross_entropy_rows(s, labels, label_smoothing=spec.label_smoothing, z_loss=spec.z_loss)
    with torch.no_grad():
        results[:, rs.SOFT], results[:, rs.HARD] = soft, hard
        for at, logits in zip((rs.STUDENT_ENTROPY, rs.TEACHER_ENTROPY), compared):
            results[:, at] = torch.where(some, _entropy(logits), 0.0)
    soft, hard = (torch.where(counted, term, 0.0) for term in (soft, hard))
    return soft, hard, torch.where(counted[:, None], results, 0.0)


def rows(
    student, teacher, labels: Tensor | None, weights: Tensor, spec: Spec, vocab: int
) -> tuple[Tensor, Tensor]:
    """(``weights`` times each row's loss ``[N]``, per-row results ``[N, RESULTS]``) of checked inputs.

    Weight 0 times anything is 0, of a token and of a term, in the gradient too.
    """
    weights = weights.double()
    weighed = weights != 0
    live = torch.ones_like(weighed) if labels is None else labels >= 0
    soft, hard, results = _terms(student, teacher, labels, spec, vocab, weighed & live)
    if not torch.equal(weighed & live, live):  # what is told of a token does not depend on its weight
        with torch.no_grad():
            results = _terms(student, teacher, labels, spec, vocab, live)[2]
    total = torch.zeros_like(weights)
    if spec.soft_weight:
        total = total + spec.soft_weight * soft
    if spec.hard_weight:
        total = total + spec.hard_weight * hard
    return total * weights, results


def run(student, teacher, call, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """(loss, per-row results) of a checked call of :mod:`kdkernels.losses`."""
    # At its ends JSD's own formula is 0, and not the KL that it stands for.
    spec = call.spec._replace(divergence=simplified(divergence))
    total, results = rows(student, teacher, call.labels, call.weights, spec, call.vocab)
    dtype = call.weights.dtype
    if call.reduction == "none":
        return total.reshape(call.student.leading).to(dtype), results
    return (total * call.scale).sum().to(dtype), results


def operator(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    weights: Tensor,
    spec: Spec,
    vocab: int,
    wants: list[bool],
) -> list[Tensor]:
    """What ``kdkernels::rows`` gives, from the oracle: compiled code comes here, since it knows only operators.

    An operator runs below autograd, which the oracle takes its gradients from. A thread of its own has it.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_operator, student, teacher, labels, weights, spec, vocab, wants).result()


def _operator(student, teacher, labels, weights, spec, vocab, wants) -> list[Tensor]:
    tensors = [t.detach().clone(memory_format=torch.contiguous_format) for t in student + teacher]
    leaves = [t.requires_grad_(want) for t, want in zip(tensors, wants)]
    s = _side(leaves[: len(student)], spec.student_map)
    t: _Logits | SparseTarget | None = None
    if spec.tail:
        kind = "weights" if spec.linear else "logprobs"
        t = SparseTarget(leaves[-2], tail=spec.tail, **{kind: leaves[-1]})
    elif teacher:
        t = _side(leaves[len(student) :], spec.teacher_map)
    total, results = rows(s, t, labels, weights, spec, vocab)
    if spec.teacher_hard_weight:
        assert labels is not None and isinstance(t, (LinearHead, MappedLogits))
        hard = cross_entropy_rows(logits_of(t, vocab, weights != 0), labels, label_smoothing=0.0, z_loss=0.0)
        total = total + spec.teacher_hard_weight * hard * weights.double()
        results[:, rs.TEACHER_HARD] = hard.detach()
    wanted = [leaf for leaf, want in zip(leaves, wants) if want]
    if not wanted:
        return [results]
    gradients = torch.autograd.grad(total.sum(), wanted)
    return [results, *(g.contiguous() for g in gradients)]


def _side(tensors: list[Tensor], logit_map: LogitMap) -> LinearHead | MappedLogits:
    scale, softcap = logit_map.scale, logit_map.softcap or None
    if len(tensors) == 1:
        return MappedLogits(tensors[0], scale, softcap)
    bias = tensors[2] if len(tensors) > 2 else None
    return LinearHead(tensors[0], tensors[1], bias, scale, softcap)
