"""The oracle: textbook formulas on full fp64 logits; autograd does the gradient.

Slow, large, and twice differentiable. Everything else in the package is compared with this page.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .backends.outcomes import LEAST_TAIL, missing_mass
from .backends.spec import OUTPUTS, Asked, LogitMap, Output, Tail
from .divergences import Divergence, pointwise
from .heads import LinearHead, MappedLogits
from .targets import SparseTarget

if TYPE_CHECKING:
    from .core.request import Call, Request

_Logits = Tensor | LinearHead | MappedLogits
_HARD = [Output.LABEL, Output.SMOOTH, Output.LSE_SQUARED]


def logits_of(given: _Logits, vocab: int, counted: Tensor) -> Tensor:
    """``[N, vocab]`` fp64 logits. The rows that are not ``counted`` ``[N]`` may hold anything, NaN too, and are
    taken for 0: neither they nor their hidden states reach a product, whose 0 * NaN would be NaN. With a bias of
    -inf, too: against a teacher's 0 it would be an infinite divergence. What is beyond ``vocab`` reaches none either."""

    def rows(t: Tensor) -> Tensor:
        return torch.where(counted[:, None], t.reshape(-1, t.shape[-1]), 0.0).double()

    if isinstance(given, Tensor):
        return rows(given)[:, :vocab]
    if isinstance(given, MappedLogits):
        z = rows(given.logits)[:, :vocab]
    else:
        z = rows(given.hidden) @ given.weight[:vocab].double().t()
        if given.bias is not None:
            z = z + given.bias[:vocab].double()
    z = z * given.logit_scale
    if given.softcap is not None:
        z = given.softcap * torch.tanh(z / given.softcap)
    return torch.where(counted[:, None], z, 0.0)


def _below_top(z: Tensor) -> Tensor:
    """The same distribution from logits of at most 0: what is far from 0 loses digits in fp64 too when it is
    divided by a temperature. A constant's gradient is none."""
    return z - z.detach().amax(-1, keepdim=True)


def divergence_rows(student: Tensor, teacher: Tensor, divergence: Divergence, temperature: Tensor) -> Tensor:
    """The divergence of each row of logits ``[N, V]`` at a temperature ``[N, 1]``, ``[N]``."""
    log_q = (student / temperature).log_softmax(-1)
    log_p = (teacher.detach() / temperature).log_softmax(-1)
    return pointwise(divergence, log_p.exp(), log_q.exp(), log_p, log_q).sum(-1)


def hard_outputs(z: Tensor, labels: Tensor, asked: int) -> list[Tensor]:
    """LABEL, SMOOTH and LSE_SQUARED of each row of logits, each ``[N]``; zeros for those that are not asked for."""
    log_q, nothing = z.log_softmax(-1), torch.zeros_like(z[:, 0])
    return [
        -log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0] if asked & Asked.LABEL else nothing,
        -log_q.mean(-1) if asked & Asked.SMOOTH else nothing,
        z.logsumexp(-1).square() if asked & Asked.LSE_SQUARED else nothing,
    ]


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
        self.log_t, self.is_stored, self.tail = log_t, log_t > -torch.inf, target.tail
        self.some = self.is_stored.any(-1)
        self.slack = missing_mass(log_t, target.values.dtype)[1]

    def grouped(self, z: Tensor, rest_of_teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(student, teacher) logits of V + 1 outcomes: the stored ids, and last the rest."""
        others = z.masked_fill(self.is_stored, -torch.inf)
        none = (others == -torch.inf).all(-1)
        rest = torch.where(none[:, None], 0.0, others).logsumexp(-1).masked_fill(none, -torch.inf)
        log_rest = rest_of_teacher.log().masked_fill(none & (rest_of_teacher <= self.slack), -torch.inf)
        return (
            torch.cat([z.masked_fill(~self.is_stored, -torch.inf), rest[:, None]], 1),
            torch.cat([self.log_t, log_rest[:, None]], 1),
        )

    def rows(self, z: Tensor, divergence: Divergence, temperature: Tensor) -> Tensor:
        """The soft term of each row, ``[N]``."""
        if self.tail in ("bucket", "conditional"):
            student, teacher = (
                self.conditional(z) if self.tail == "conditional" else self.grouped(z, self.rest())
            )
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
        return self.seen(z), self.log_t.masked_fill(~self.some[:, None], 0.0)

    def seen(self, z: Tensor) -> Tensor:
        """The student's logits that the target looks at: "conditional" at the stored ids alone."""
        if self.tail != "conditional":
            return z
        return z.masked_fill(~self.is_stored & self.some[:, None], -torch.inf)

    def compared(self, z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
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
        z = self.seen(z)
        return (self.some & (z.argmax(-1) == self.log_t.argmax(-1))).double()


def _entropy(logits: Tensor) -> Tensor:
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    return -(q * torch.where(q == 0, 0.0, log_q)).sum(-1)  # NaN stays


class _Soft(NamedTuple):
    """The soft term of each row, and what its statistics are of."""

    term: Tensor  # [N]
    compared: list[Tensor]  # the student's logits over T, and the teacher's where there is one
    agreement: Tensor  # [N]
    some: Tensor  # bool [N]: rows that compare anything

    def statistics(self) -> Tensor:
        """STUDENT_ENTROPY, TEACHER_ENTROPY and AGREEMENT ``[N, 3]``."""
        entropies = [torch.where(self.some, _entropy(logits), 0.0) for logits in self.compared]
        entropies.append(torch.zeros_like(self.agreement))  # the teacher's, where there is none
        return torch.stack([*entropies[:2], self.agreement], 1)


@dataclass(frozen=True)
class _Problem:
    """A request's two sides as users hand them over, and its divergence."""

    student: _Logits
    teacher: _Logits | SparseTarget | None
    divergence: Divergence
    request: Request

    @property
    def live(self) -> Tensor:
        labels = self.request.labels
        return (
            torch.ones_like(self.request.weights[:, 0], dtype=torch.bool) if labels is None else labels >= 0
        )

    def soft(self, counted: Tensor) -> tuple[Tensor, Tensor]:
        """(SOFT, the statistics STUDENT_ENTROPY, TEACHER_ENTROPY and AGREEMENT ``[N, 3]``) of each row, both 0 for
        the tokens that are not ``counted`` ``[N]``, whose logits may be anything."""
        s = logits_of(self.student, self.request.vocab, counted)
        if not self.request.spec.asked & Asked.SOFT:
            found = self._without_teacher(s, counted)
        elif isinstance(self.teacher, SparseTarget):
            found = self._against_sparse(self.teacher, s, counted)
        else:
            found = self._against_dense(s, counted)
        with torch.no_grad():
            statistics = found.statistics()
        return torch.where(counted, found.term, 0.0), torch.where(counted[:, None], statistics, 0.0)

    def _without_teacher(self, s: Tensor, counted: Tensor) -> _Soft:
        nothing = torch.where(torch.zeros_like(counted), s[:, 0], 0.0)  # with a graph: a gradient of 0
        student = _below_top(s) / self.request.temperature[:, None]
        return _Soft(nothing, [student], torch.zeros_like(s[:, 0]), counted)

    def _against_dense(self, s: Tensor, counted: Tensor) -> _Soft:
        assert self.teacher is not None and not isinstance(self.teacher, SparseTarget)
        z, temperature = _below_top(s), self.request.temperature[:, None]
        t = _below_top(logits_of(self.teacher, self.request.vocab, counted))
        term = divergence_rows(z, t, self.divergence, temperature)
        agreement = (s.argmax(-1) == t.argmax(-1)).double()
        return _Soft(term, [z / temperature, t / temperature], agreement, counted)

    def _against_sparse(self, target: SparseTarget, s: Tensor, counted: Tensor) -> _Soft:
        oracle, temperature = (
            SparseOracle(target, self.request.vocab, counted),
            self.request.temperature[:, None],
        )
        z = _below_top(oracle.seen(s))
        term = oracle.rows(z, self.divergence, temperature)
        return _Soft(term, list(oracle.compared(z, temperature)), oracle.agreement(s), oracle.some)

    def hard(self, given: _Logits, counted: Tensor, asked: int) -> Tensor:
        """LABEL, SMOOTH and LSE_SQUARED of each row of one model, ``[N, 3]``; 0 where it is not ``counted``."""
        labels = self.request.labels
        assert labels is not None
        made = hard_outputs(logits_of(given, self.request.vocab, counted), labels, asked)
        return torch.where(counted[:, None], torch.stack(made, 1), 0.0)

    def outputs(self, weights: Tensor) -> tuple[list[Tensor], Tensor]:
        """(each output ``[N]``, statistics ``[N, 3]``). An output is taken of the tokens that it has a weight
        for: neither the value nor the gradient of another reaches a product, whose 0 * NaN would be NaN."""
        asked, labels = self.request.spec.asked, self.request.labels
        columns = [torch.zeros_like(weights[:, 0])] * OUTPUTS
        columns[Output.SOFT], statistics = self.soft(self.live & (weights[:, Output.SOFT] != 0))
        if asked & Asked.HARD and labels is not None:
            weighted = (weights[:, _HARD] != 0).any(1)
            made = self.hard(self.student, self.live & weighted, asked)
            for output, column in zip(_HARD, made.unbind(1)):
                columns[output] = column
        if asked & Asked.ENTROPY:
            counted = self.live & (weights[:, Output.ENTROPY] != 0)
            z = _below_top(logits_of(self.student, self.request.vocab, counted))
            entropy = _entropy(z / self.request.temperature[:, None])
            columns[Output.ENTROPY] = torch.where(counted, entropy, 0.0)
        if asked & Asked.TEACHER_LABEL:
            assert isinstance(self.teacher, (Tensor, LinearHead, MappedLogits))
            weighted = weights[:, Output.TEACHER_LABEL] != 0
            columns[Output.TEACHER_LABEL] = self.hard(self.teacher, self.live & weighted, Asked.LABEL)[:, 0]
        return columns, statistics

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """(the student's losses ``[N]``, the teacher's own, results ``[N, RESULTS]``): two graphs, if both learn."""
        weights = self.request.weights
        outputs, statistics = self.outputs(weights)
        weighted = [torch.where(w != 0, o * w, 0.0) for o, w in zip(outputs, weights.unbind(1))]
        asked = [bool(self.request.spec.asked >> output & 1) for output in range(OUTPUTS)]
        with torch.no_grad():  # a token's results do not depend on its weight
            if not bool((weights != 0)[self.live][:, asked].all()):
                outputs, statistics = self.outputs(torch.ones_like(weights))
            results = torch.cat([torch.stack(outputs, 1), statistics], 1)
        teacher_loss = weighted.pop(Output.TEACHER_LABEL)
        return sum(weighted, torch.zeros_like(teacher_loss)), teacher_loss, results


def losses(
    student: _Logits, teacher: _Logits | SparseTarget | None, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """(the student's loss, the teacher's own, per-row results) of a checked call."""
    problem = _Problem(student, teacher, call.terms.divergences[0], call.request)
    student_loss, teacher_loss, results = problem.losses()
    teacher_reducer = call.reducer.of(call.request.teacher)
    return call.reducer.apply(student_loss), teacher_reducer.apply(teacher_loss), results


def log_prob_values(request: Request, student: _Logits | None = None) -> list[Tensor]:
    """Log-probabilities ``[N, K]`` at the request's ids, entropy, logsumexp and top-1 ``[N]``; of the request's own
    tensors, unless the student is given as users hand it over."""
    if student is None:
        student = _side(request.student, request.spec.student_map)
    (ids,), labels, temperature = request.teacher, request.labels, request.temperature[:, None]
    assert labels is not None
    live = labels >= 0
    s = logits_of(student, request.vocab, live)
    z = _below_top(s) / temperature
    log_probs = torch.where(ids >= 0, z.log_softmax(-1).gather(1, ids.clamp(min=0)), 0.0)
    lse = s.detach().amax(-1) / temperature[:, 0] + z.detach().logsumexp(-1)
    return [
        torch.where(live[:, None], log_probs, 0.0),
        torch.where(live, _entropy(z), 0.0),
        torch.where(live, lse, 0.0),
        torch.where(live, s.argmax(-1), -1),
    ]


def log_prob_gradients(request: Request, arriving: Tensor) -> list[Tensor]:
    """The gradients for the student's tensors, of what arrives ``[N, K]``, and for the entropy in the request's weights."""

    def solve() -> list[Tensor]:
        leaves = _leaves(request)
        log_probs, entropy = log_prob_values(replace(request, student=leaves))[:2]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return list(
            torch.autograd.grad([log_probs, entropy], wanted, [arriving, request.weights[:, Output.ENTROPY]])
        )

    return _below_autograd(solve)


def compute(request: Request) -> list[Tensor]:
    """Results and gradients of a request, for compiled code, which sees operators only."""
    made = [_below_autograd(lambda one=one: _compute_one(one)) for one in request.each()]  # type: ignore[misc]
    if len(made) == 1:
        return made[0]
    results = torch.cat([results for results, *_ in made], 1)
    return [results, *(torch.stack(each).sum(0) for each in zip(*(grads for _, *grads in made)))]


def _below_autograd(solve: Callable[[], list[Tensor]]) -> list[Tensor]:
    """An operator runs below autograd, which the oracle takes its gradients from. A thread of its own has it."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(solve).result()


def _leaves(request: Request) -> list[Tensor]:
    tensors = [t.detach().clone(memory_format=torch.contiguous_format) for t in request.tensors]
    return [t.requires_grad_(needed) for t, needed in zip(tensors, request.needs_grad)]


def _compute_one(request: Request) -> list[Tensor]:
    spec, count = request.spec, len(request.student)
    leaves = _leaves(request)
    teacher: _Logits | SparseTarget | None = None
    if spec.tail:
        kind = "weights" if spec.linear else "logprobs"
        teacher = SparseTarget(leaves[-2], tail=Tail(spec.tail).word, **{kind: leaves[-1]})
    elif request.teacher:
        teacher = _side(leaves[count:], spec.teacher_map)
    student = _side(leaves[:count], spec.student_map)
    divergence = spec.divergence(request.parameters[0])
    student_loss, teacher_loss, results = _Problem(student, teacher, divergence, request).losses()
    wanted = [leaf for leaf, needed in zip(leaves, request.needs_grad) if needed]
    if not wanted:
        return [results]
    return [
        results,
        *(g.contiguous() for g in torch.autograd.grad((student_loss + teacher_loss).sum(), wanted)),
    ]


def _side(tensors: list[Tensor], logit_map: LogitMap) -> LinearHead | MappedLogits:
    scale, softcap = logit_map.scale, logit_map.softcap or None
    if len(tensors) == 1:
        return MappedLogits(tensors[0], scale, softcap)
    bias = tensors[2] if len(tensors) > 2 else None
    return LinearHead(tensors[0], tensors[1], bias, scale, softcap)
