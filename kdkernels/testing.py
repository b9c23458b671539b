"""How a loss is compared with the oracle: one rule for the tests, for ``verify``, and for users.

:func:`assert_matches_reference` is what a user calls on a loss of their own. :class:`Problem` makes
inputs and answers for them with the fp64 oracle and with the plain PyTorch formula;
:func:`compare` applies the rule of exactness, one :class:`Check` per result.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import BackendName, use_backend
from .divergences import (
    JSD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    Mixed,
    Overlap,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
    simplified,
)
from .heads import LinearHead
from .losses import distillation_loss
from .options import Reduction

__all__ = ["ROWS", "Check", "Problem", "assert_exact", "assert_matches_reference", "compare", "relative"]

#: A loss and the gradients of the student's tensors.
Result = tuple[Tensor, Sequence[Tensor]]
LossFunction = Callable[[Any, Any, Tensor | None], Tensor]

#: What the rows of a problem are like.
ROWS = {
    "random": "normal logits",
    "one-hot": "a teacher that is certain: every other probability underflows to 0",
    "ties": "logits from a few integers, so that many are equal",
    "padding": "-inf in the last fifth of both vocabularies",
    "extreme": "every logit is 1e4 or -1e4 and a little",
    "equal": "teacher and student are the same: no gradient, exactly",
}
#: Rows that are made by a head's bias: a weight of -inf, or of 1e4, would leave dH nothing to compare.
_BY_BIAS = ("padding", "extreme")
_FAR = 1e4


class Problem:
    """Student and teacher as logits or heads, with labels; the student's tensors get gradients.

    ``student`` and ``teacher`` are "logits" or "head", with or without ``bias``; ``head`` options
    (``softcap``, ``logit_scale``) go to both LinearHeads. The first ``ignored`` labels are -100. The numbers come
    from torch's global generator, on the CPU whatever the device: seed it for the same problem.
    """

    def __init__(
        self,
        *,
        student: str = "logits",
        teacher: str = "logits",
        dtype: torch.dtype = torch.float32,
        vocab: int = 257,
        shape: tuple[int, ...] = (3, 5),
        width: int = 16,
        teacher_dtype: torch.dtype | None = None,
        scale: float = 3.0,
        ignored: int = 2,
        rows: str = "random",
        bias: bool = True,
        device: str | torch.device = "cpu",
        **head,
    ) -> None:
        if rows not in ROWS:
            raise ValueError(f"unknown rows {rows!r}; there are {', '.join(ROWS)}")
        for form in (student, teacher):
            if form not in ("logits", "head"):
                raise ValueError(f"unknown form {form!r}; there are logits, head")
        if rows in _BY_BIAS and not bias and "head" in (student, teacher):
            raise ValueError(f"rows={rows!r} are made by a head's bias; bias=True, or other rows")
        self.head, self.rows, self.dtype = head, rows, dtype
        teacher_width = width if rows == "equal" else 2 * width
        self.student = _tensors(student, shape, vocab, width, scale, bias)
        self.teacher = _tensors(teacher, shape, vocab, teacher_width, scale, bias)
        _shape_rows(rows, self.student, self.teacher)
        if rows == "equal":
            if student != teacher:
                raise ValueError("rows='equal' needs the same form on both sides")
            self.teacher = [t.clone() for t in self.student]
        self.student = [t.to(device, dtype) for t in self.student]
        self.teacher = [t.to(device, teacher_dtype or dtype) for t in self.teacher]
        live = vocab - vocab // 5 if rows == "padding" else vocab
        labels = torch.randint(0, live, shape)
        labels.view(-1)[:ignored] = -100
        self.labels = labels.to(device)

    @property
    def projected(self) -> bool:
        """Whether logits are rounded by a GEMM on the way."""
        return len(self.student) > 1 or len(self.teacher) > 1

    def side(self, tensors: Sequence[Tensor]) -> Tensor | LinearHead:
        if len(tensors) == 1:
            return tensors[0]
        hidden, weight, *bias = tensors
        return LinearHead(hidden, weight, bias[0] if bias else None, **self.head)

    def of(self, loss_fn: LossFunction, *, double: bool = False, labels: bool = True) -> Result:
        """What ``loss_fn(student, teacher, labels)`` makes of this problem."""
        convert = (lambda t: t.double()) if double else (lambda t: t.clone())
        leaves = [convert(t).requires_grad_() for t in self.student]
        teacher = self.side([convert(t) for t in self.teacher])
        value = loss_fn(self.side(leaves), teacher, self.labels if labels else None)
        return value, torch.autograd.grad(value.sum(), leaves)

    def run(
        self,
        backend: BackendName,
        *,
        double: bool = False,
        loss: Callable[..., Any] = distillation_loss,
        labels: bool = True,
        **options,
    ) -> Result:
        """What kdkernels makes of it on ``backend``."""
        with use_backend(backend):
            return self.of(lambda s, t, y: loss(s, t, y, **options), double=double, labels=labels)

    def oracle(self, **options) -> Result:
        """The truth: textbook formulas in fp64 on these very numbers."""
        return self.run("reference", double=True, **options)

    def plain(
        self,
        divergence: Divergence | None = ForwardKL(),
        *,
        labels: bool = True,
        loss: Callable[..., Tensor] | None = None,
        **options,
    ) -> Result:
        """What a trainer would write: the same formula in the tensors' own dtype. ``loss`` is another formula of
        logits, labels and a divergence."""
        leaves = [t.clone().requires_grad_() for t in self.student]
        s, t = self._plain_logits(leaves), self._plain_logits(self.teacher)
        formula: Callable[..., Tensor] = loss or plain_loss
        value = formula(s, t, self.labels if labels else None, divergence, **options)
        return value, torch.autograd.grad(value.sum(), leaves)

    def _plain_logits(self, tensors: Sequence[Tensor]) -> Tensor:
        if len(tensors) == 1:
            return tensors[0]
        z = F.linear(*tensors) * self.head.get("logit_scale", 1.0)
        cap = self.head.get("softcap")
        return cap * torch.tanh(z / cap) if cap else z


def _tensors(
    form: str, shape: tuple[int, ...], vocab: int, width: int, scale: float, bias: bool
) -> list[Tensor]:
    if form == "logits":
        return [torch.randn(*shape, vocab) * scale]
    spread = scale / width**0.5
    head = [torch.randn(*shape, width), torch.randn(vocab, width) * spread]
    return head + [torch.randn(vocab)] if bias else head


def _shape_rows(rows: str, student: list[Tensor], teacher: list[Tensor]) -> None:
    """Makes the random rows adversarial in place; a head's logits follow from its bias mostly."""
    vocab = student[-1].shape[0 if len(student) == 2 else -1]
    if rows == "one-hot":
        teacher[0].zero_()
        if len(teacher) == 2:  # a head without a bias: by the weight of a hidden number that is 1
            teacher[0][..., 0] = 1.0
            teacher[1][:, 0] = 0.0
            teacher[1][vocab // 2, 0] = _FAR
        else:
            teacher[-1].zero_()
            teacher[-1][..., vocab // 2] = _FAR
    elif rows == "ties":
        for tensor in student + teacher:
            tensor.copy_(tensor.round().clamp(-2, 2))
    elif rows == "padding":
        for side in (student, teacher):
            side[-1][..., vocab - vocab // 5 :] = -torch.inf
    elif rows == "extreme":
        for side in (student, teacher):
            side[-1] += torch.where(side[-1] > 0, _FAR, -_FAR)
            if len(side) > 1:  # in half precision a product would be lost beside 1e4
                side[1].zero_()


def textbook(divergence: Divergence, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """A divergence's terms as papers and trainers write them; of one that is not kdkernels' own, its ``phi``.

    It shares nothing with :mod:`kdkernels.divergences`, whose forms are more accurate.
    """
    divergence = simplified(divergence)
    padding = log_p.isneginf() & log_q.isneginf()
    log_p, log_q = log_p.masked_fill(padding, 0.0), log_q.masked_fill(padding, 0.0)
    forward, reverse = _weighted(p, log_p - log_q), _weighted(q, log_q - log_p)
    if isinstance(divergence, ForwardKL):
        return forward
    if isinstance(divergence, ReverseKL):
        return reverse
    if isinstance(divergence, Mixed):
        return divergence.weight * forward + (1 - divergence.weight) * reverse
    if isinstance(divergence, TotalVariation):
        return 0.5 * (p - q).abs()
    if isinstance(divergence, Overlap):
        return torch.where(q < p, q, p)
    if isinstance(divergence, JSD):
        log_m = _log_mixture(log_p, log_q, divergence.beta)
        of_p, of_q = _weighted(p, log_p - log_m), _weighted(q, log_q - log_m)
        return divergence.beta * of_p + (1 - divergence.beta) * of_q
    if isinstance(divergence, SkewKL):
        return _weighted(p, log_p - _log_mixture(log_p, log_q, divergence.alpha))
    if isinstance(divergence, SkewReverseKL):
        log_m = _log_mixture(log_q, log_p, divergence.alpha)
        if divergence.detach_mixture:
            log_m = _log_mixture(log_q.detach(), log_p, divergence.alpha)
        return _weighted(q, log_q - log_m)
    if isinstance(divergence, AlphaBeta):
        return _alpha_beta(log_p, log_q, divergence.alpha, divergence.beta).masked_fill(padding, 0.0)
    return divergence.phi(p, q, log_p, log_q)


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, 0 where the weight is."""
    return torch.where(weight == 0, 0.0, weight * x.masked_fill(weight == 0, 0.0))


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log(1 - share))


def _alpha_beta(log_p: Tensor, log_q: Tensor, a: float, b: float) -> Tensor:
    x = log_p - log_q
    p_ab, q_ab = _power(log_p, a + b, log_q, 0.0), _power(log_p, 0.0, log_q, a + b)
    if a == 0 and b == 0:
        return 0.5 * x.square()
    if b == 0:
        return (_weighted(p_ab, a * x) - p_ab + q_ab) / a**2
    if a == 0:
        return (_weighted(q_ab, -b * x) - q_ab + p_ab) / b**2
    if a + b == 0:
        return ((a * x).exp() - 1 - a * x) / a**2
    return -(_power(log_p, a, log_q, b) - a / (a + b) * p_ab - b / (a + b) * q_ab) / (a * b)


def _power(log_p: Tensor, a: float, log_q: Tensor, b: float) -> Tensor:
    """p^a q^b, with 0^0 = 1."""
    exponent = torch.zeros_like(log_q)
    if a:
        exponent = exponent + a * log_p
    if b:
        exponent = exponent + b * log_q
    return exponent.exp()


def plain_loss(
    s: Tensor,
    t: Tensor,
    labels: Tensor | None,
    divergence: Divergence,
    *,
    temperature: float | Tensor = 1.0,
    temperature_squared: bool = False,
    soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor = 0.0,
    entropy_weight: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """:func:`kdkernels.distillation_loss` of logits, as a trainer would write it."""
    s, t = s[..., :vocab_size], t[..., :vocab_size]
    dtype = torch.promote_types(t.dtype, s.dtype)
    numbers = (temperature, soft_weight, hard_weight)
    temperature, soft_weight, hard_weight = (n.to(dtype) if isinstance(n, Tensor) else n for n in numbers)
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None]
    log_q, log_p = ((z / temperature).log_softmax(-1).to(dtype) for z in (s, t))
    q, p = log_q.exp(), log_p.exp()
    if dtype == torch.float64:  # the oracle's own bits otherwise: see compare
        q, p = ((z / temperature).softmax(-1).to(dtype) for z in (s, t))
    soft = textbook(divergence, p, q, log_p, log_q).sum(-1)
    rows = soft * soft_weight
    if temperature_squared:
        rows = rows * (temperature.squeeze(-1) if isinstance(temperature, Tensor) else temperature) ** 2
    if isinstance(hard_weight, Tensor) or hard_weight:
        assert labels is not None
        hard = F.cross_entropy(
            s.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=label_smoothing
        )
        rows = rows + hard_weight * (hard.view_as(rows) + z_loss * s.logsumexp(-1).square())
    if isinstance(entropy_weight, Tensor) or entropy_weight:
        rows = rows - entropy_weight * (q * log_q.masked_fill(log_q.isneginf(), 0.0)).sum(-1)
    if token_weights is not None:
        rows = rows * token_weights
    live = torch.ones_like(rows, dtype=torch.bool) if labels is None else labels >= 0
    rows = torch.where(live, rows, 0.0)
    if reduction == "none":
        return rows
    divisor: Any = {"sum": 1, "mean": live.sum(), "batchmean": rows.shape[0]}[reduction]
    return rows.sum() / (divisor if num_items is None else num_items)


def relative(ours: Tensor, oracle: Tensor) -> float:
    """|ours - oracle| / |oracle| in the Euclidean norm; a zero gradient has the relative error 1."""
    scale = oracle.double().norm().item()
    return (ours.double() - oracle.double()).norm().item() / max(scale, 1e-300)


@dataclass(frozen=True)
class Check:
    """One result beside the oracle: ``what`` is "loss" or a gradient. A NaN error is not within.

    ``value`` and ``truth`` are the loss's (of the worst row), or the gradient's norms.
    """

    what: str
    value: float
    truth: float
    error: float
    plain_error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        what = self.what if self.what == "loss" else f"{self.what}, its norm"
        return (
            f"{what}: {self.value:.7g}, the oracle's {self.truth:.7g}; error {self.error:.3g}, "
            f"allowed {self.tolerance:.3g} (the plain formula's is {self.plain_error:.3g})"
        )


#: Below this norm a gradient has no direction to compare, so its absolute error is compared instead.
_NEGLIGIBLE = 1e-6


def compare(
    ours: Result, oracle: Result, plain: Result, *, dtype: torch.dtype, projected: bool = False
) -> list[Check]:
    """At most twice the plain formula's error plus a few ulp, for the loss and for every gradient.

    ``dtype`` is the coarsest that the inputs have. ``projected``: logits were rounded to it by a
    GEMM on the way, so the loss is known to one ulp of it only; the plain formula's error is then as
    much a matter of luck as ours. The loss's error is absolute, because it is a sum whose terms
    cancel; a gradient's is relative to the oracle's norm.
    """
    (value, grads), (true_value, true_grads), (plain_value, plain_grads) = ours, oracle, plain
    ulp = torch.finfo(dtype).eps
    checks = [_compare_loss(value, true_value, plain_value, projected * ulp)]
    for i, (mine, truth, theirs) in enumerate(zip(grads, true_grads, plain_grads, strict=True)):
        what = "gradient" if len(grads) == 1 else f"gradient of {('hidden', 'weight', 'bias')[i]}"
        scale = truth.double().norm().item()
        unit = 1.0 if scale > _NEGLIGIBLE else max(scale, 1e-300)
        # In fp64 the oracle rounds as well. Where its terms cancel (the reverse KL to a teacher's logit of 1e4)
        # it is 6e-15 from the truth in 80 bits, twice as far as ours. The plain formula shows how far: it uses
        # softmax instead of the oracle's exp(log_softmax), so it rounds differently.
        few_ulp = (16 if dtype == torch.float64 else 4) * ulp
        # The plain formula may fail, in half precision or by overflow. That does not allow ours to fail.
        plain_error = relative(theirs, truth) * unit if theirs.isfinite().all() else math.nan
        allowed = min(2 * plain_error, 0.1) if plain_error == plain_error else 0.1
        norm = mine.double().norm().item()
        checks.append(Check(what, norm, scale, relative(mine, truth) * unit, plain_error, allowed + few_ulp))
    return checks


def _compare_loss(value: Tensor, truth: Tensor, plain: Tensor, projection: float) -> Check:
    """Without a reduction rows are compared one by one, and the worst is reported."""
    wide = torch.finfo(value.dtype).eps
    value, truth, plain = (v.detach().double().reshape(-1) for v in (value, truth, plain))
    errors, plain_errors = (torch.where(x == truth, 0.0, (x - truth).abs()) for x in (value, plain))
    # Where the plain formula overflows, its error allows nothing. The ulp is that of the loss's dtype, for a
    # loss made of log-probabilities near 1.
    excused = torch.where(plain_errors.isfinite(), plain_errors, 0.0)
    size = torch.where(truth.isfinite(), truth.abs(), 0.0)  # infinite losses are equal or not
    tolerances = 2 * excused + 64 * wide * (1 + size) + projection * size
    worst = int((errors - tolerances).nan_to_num(nan=math.inf).argmax())
    return Check("loss", *(x[worst].item() for x in (value, truth, errors, plain_errors, tolerances)))


def assert_exact(
    ours: Result, oracle: Result, plain: Result, *, dtype: torch.dtype, projected: bool = False
) -> None:
    """:func:`compare`, as an assertion, of a problem whose gradients are far from 0."""
    for check in compare(ours, oracle, plain, dtype=dtype, projected=projected):
        _require(check.ok, str(check))
    _require(all(truth.norm() > _NEGLIGIBLE for truth in oracle[1]), "the gradients say nothing")


def _require(holds: Any, message: str) -> None:
    """``assert``, under python -O too."""
    if not holds:
        raise AssertionError(message)


def assert_matches_reference(
    loss_fn: LossFunction,
    *,
    student: str = "logits",
    teacher: str = "logits",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    rows: Sequence[str] | None = None,
    bias: bool = True,
    shape: tuple[int, ...] = (3, 5),
    vocab: int = 257,
    width: int = 16,
    head: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    labels: bool = True,
    seed: int = 0,
    **options,
) -> None:
    """Compares a loss of your own with the fp64 oracle: its value and gradients. Its inputs must stay as they are.

    Args:
        loss_fn: ``loss_fn(student, teacher, labels) -> loss``; a scalar, or one per token with
            ``reduction="none"``. Student and teacher come as logits ``[*shape, vocab]`` or, with
            "head", as a LinearHead whose ``hidden``, ``weight`` and ``bias`` your code takes apart.
        bias: False gives heads without one, for a loss that takes none.
        student, teacher: "logits" or "head".
        dtypes: of all floating inputs, one problem each.
        rows: which of :data:`ROWS`, one problem each; by default all but "equal" (and without a bias those
            that it makes: "padding" and "extreme").
        shape: of the tokens. vocab: of the vocabulary. width: of the student's hidden states; the
            teacher's is twice as wide.
        head: ``logit_scale`` and ``softcap`` of the LinearHeads.
        labels: some are -100, the others valid; False gives None.
        seed: of the inputs; the global generator is left as it was.
        options: what the loss means, as :func:`kdkernels.distillation_loss` takes it, but for mask and ignore_index:
            labels say which tokens take part.

    Raises:
        AssertionError: a value or gradient is further from the oracle than twice the plain
            formula's error and a few ulp; inputs were overwritten; or the gradient does not scale
            with the loss. The message names the problem and the numbers.
        TypeError: an option that does not say what a loss means.

    >>> import torch, kdkernels as kd
    >>> def mine(student, teacher, labels):
    ...     log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    ...     kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none")
    ...     return kl.masked_fill(log_q.isneginf(), 0.0).sum(-1)[labels != -100].mean()
    >>> kd.testing.assert_matches_reference(mine, dtypes=[torch.float32], rows=["random", "ties"])
    >>> kd.testing.assert_matches_reference(mine, divergence=kd.ReverseKL())
    Traceback (most recent call last):
    AssertionError: random rows, torch.float32, logits from logits: loss: ..., the oracle's ...; error ...
    """
    meanings = list(inspect.signature(plain_loss).parameters)[3:]
    if others := [name for name in options if name not in meanings]:
        raise TypeError(f"{others[0]} is no option here; what a loss means is said by {', '.join(meanings)}")
    if rows is None:
        biased = bias or "head" not in (student, teacher)
        rows = [kind for kind in ROWS if kind != "equal" and (biased or kind not in _BY_BIAS)]
    for dtype in dtypes:
        for kind in rows:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                problem = Problem(
                    student=student,
                    teacher=teacher,
                    dtype=dtype,
                    vocab=vocab,
                    shape=shape,
                    width=width,
                    rows=kind,
                    bias=bias,
                    device=device,
                    **(head or {}),
                )
            where = f"{kind} rows, {dtype}, {student} from {teacher}"
            _assert_matches(problem, loss_fn, labels, where, options)


def _assert_matches(
    problem: Problem, loss_fn: LossFunction, labels: bool, where: str, options: dict[str, Any]
) -> None:
    given: list[tuple[Tensor, Tensor]] = []

    def watched(s: Any, t: Any, y: Tensor | None) -> Tensor:
        for side in (s, t):
            tensors = [side] if isinstance(side, Tensor) else side.tensors()
            given.extend((x, x.detach().clone()) for x in tensors)
        # Twice the loss must have twice the gradient. A loss that ignores its incoming gradient fails here.
        return 2 * loss_fn(s, t, y)

    value, grads = problem.of(watched, labels=labels)
    ours = value.detach() / 2, [g / 2 for g in grads]
    same = all(torch.equal(now, before) for now, before in given)
    _require(same, f"{where}: the loss overwrote its inputs")
    oracle = problem.oracle(labels=labels, **options)
    _require(
        ours[0].shape == oracle[0].shape,
        f"{where}: the loss has shape {tuple(ours[0].shape)}, the oracle's {tuple(oracle[0].shape)}",
    )
    plain = problem.plain(labels=labels, **options)
    for check in compare(ours, oracle, plain, dtype=problem.dtype, projected=problem.projected):
        _require(check.ok, f"{where}: {check}")
