"""What each divergence is: one frozen dataclass each, with its formula.

Every divergence is a sum over the vocabulary of ``phi(p_j, q_j)``, with p the teacher's and q the
student's distribution. A class gives two pointwise functions of (p, q, log p, log q):

* ``phi``, whose sum is the divergence. It is differentiable by autograd, which is how
  :mod:`kdkernels.reference` obtains its gradient.
* ``q_psi`` = q * d phi / d q, up to a constant times q, chosen so that it is exactly zero where
  p == q. With S = sum_j q_psi_j the gradient for the student's logits is ``q_psi_j - q_j * S``.

``log_p`` and ``log_q`` may be -inf (padding); where both are, the term is 0.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Callable, ClassVar

import torch
from torch import Tensor

from .checks import flag, number

__all__ = [
    "Divergence",
    "ForwardKL",
    "ReverseKL",
    "JSD",
    "SkewKL",
    "SkewReverseKL",
    "TotalVariation",
    "Overlap",
    "AlphaBeta",
    "Mixed",
]


def _both_finite(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities with 0 in the places where both are -inf."""
    padding = torch.isneginf(log_p) & torch.isneginf(log_q)
    return log_p.masked_fill(padding, 0.0), log_q.masked_fill(padding, 0.0)


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / q), 0 where both are zero."""
    log_p, log_q = _both_finite(log_p, log_q)
    return log_p - log_q


def _over_mixture(x: Tensor, m: Tensor) -> Tensor:
    """x / m, 0 where the mixture m is next to nothing."""
    return x / m.clamp(min=_tiny(m))


def _log_over_mixture(p: Tensor, m: Tensor, d: Tensor) -> Tensor:
    """log(p / m), given d = p - m as exactly as p and m: 0 where d is.

    The logarithm's argument is 1 and something positive, whichever of the two is the larger.
    """
    above = d > 0
    away = torch.where(above, d, -d)  # not abs, whose derivative is 0 between equals
    log = torch.log1p(away / torch.where(above, m, p).clamp(min=_tiny(m)))
    return torch.where(above, log, -log)


def _tiny(of: Tensor) -> float:
    """Probabilities below it no longer count; a quotient by it, and its square, stay finite."""
    return 1e-150 if of.dtype == torch.float64 else 1e-30


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x with 0 * inf = 0, for autograd too."""
    some = weight != 0  # true for NaN, which must stay
    return torch.where(some, weight * torch.where(some, x, 0.0), 0.0)


class Divergence:
    """Base of all divergences, and of your own: a class with ``phi``, and with ``q_psi`` where it should not be
    taken from ``phi`` by autograd. Its numbers are the fields of a dataclass. What it sums to is in nats where its
    formula has logarithms of base e, as all of kdkernels' have that have any.

    Such a class goes through every input form, option and compiler as the others do, on the eager backend. What it
    inherits of a parent's ``q_psi``, ``closed_form`` and kernels counts only while the parent's formula does:
    not for a class with a ``phi`` of its own. ``docs/divergences.md`` says what a formula must hold to.

    >>> import torch, kdkernels as kd
    >>> @dataclass(frozen=True)
    ... class Hellinger(kd.Divergence):
    ...     weight: float = 1.0
    ...
    ...     def phi(self, p, q, log_p, log_q):
    ...         return self.weight * (p + q - 2 * ((log_p + log_q) / 2).exp())
    >>> student, teacher = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    >>> kd.distillation_loss(student, teacher, divergence=Hellinger(0.5)).backward()
    """

    #: How operators and kernels name the class: > 0 where kernels know it, and given to all others here.
    code: ClassVar[int] = -1
    #: "forward" or "reverse": the value and gradient follow from the first pass alone.
    closed_form: ClassVar[str | None] = None

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        phi, q_psi, form = (_level(cls, name) for name in ("phi", "q_psi", "closed_form"))
        if q_psi > phi:
            cls.q_psi = Divergence.q_psi  # type: ignore[method-assign]
        if form > min(phi, q_psi):
            cls.closed_form = None
        if cls.__module__ != __name__:
            cls.code = _new_code(f"{cls.__module__}.{cls.__qualname__}")
        _CLASSES[cls.code] = cls

    def __post_init__(self) -> None:
        """A 0-dim tensor in a field becomes the number that it holds."""
        for name in _numbers_of(self):
            given = getattr(self, name)
            if type(given) not in (int, float, bool) or not abs(given) < math.inf:
                object.__setattr__(self, name, number(f"{type(self).__name__}'s {name}", given))

    @property
    def kind(self) -> int:
        """What kernels are specialised on."""
        return type(self).code

    @property
    def parameters(self) -> tuple[float, ...]:
        """Its numbers, in the order of its fields; at least two, as the kernels read them."""
        own = tuple(
            number(f"{type(self).__name__}'s {name}", getattr(self, name)) for name in _numbers_of(self)
        )
        return own + (0.0,) * (2 - len(own))

    @classmethod
    def with_parameters(cls, kind: int, parameters: Sequence[Any]) -> Divergence:
        """The divergence of that ``kind`` whose :attr:`parameters` these are: numbers, or 0-dim tensors, which
        are not looked at. They were checked when the divergence was made."""
        made = object.__new__(cls)
        for name, value in zip(_numbers_of(cls), parameters):
            object.__setattr__(made, name, value)
        return made

    def check(self) -> None:
        """TypeError for what cannot be a divergence: no formula, or numbers that are no fields."""
        kind = type(self)
        if kind.phi is Divergence.phi:
            raise TypeError(f"{kind.__name__} defines no phi, whose sum is the divergence")
        if torch.compiler.is_compiling():  # torch before 2.13 cannot trace __dict__
            return
        loose = [name for name in getattr(self, "__dict__", {}) if name not in _numbers_of(self)]
        if loose:
            raise TypeError(
                f"{kind.__name__} keeps {', '.join(loose)} outside of a dataclass's fields, where it would be "
                "lost on the way to an operator; make it a number in a field of a @dataclass(frozen=True)"
            )

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        raise NotImplementedError

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """From ``phi``, whose derivative for log q it is; 0 where both sides are -inf."""
        padding = torch.isneginf(log_p) & torch.isneginf(log_q)
        lp, lq = log_p.masked_fill(padding, 0.0), log_q.masked_fill(padding, 0.0)
        return _derivative(lambda p, lp, lq: self.phi(p, lq.exp(), lp, lq), p, lp, lq).masked_fill(
            padding, 0.0
        )


def pointwise(divergence: Divergence, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """``divergence.phi`` of a chunk's columns. A formula that sums them itself would be counted once a column."""
    terms = unwritten(divergence.phi, p, q, log_p, log_q)
    if terms.shape != p.shape:
        raise TypeError(
            f"{type(divergence).__name__}.phi must be pointwise: of tensors {tuple(p.shape)} it made "
            f"{tuple(terms.shape)}; return the terms, which are summed for you"
        )
    return terms


def unwritten(formula: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """What a formula of the user's makes of tensors that others read too."""
    before = [_version(t) for t in given]
    made = formula(*given)
    if before != [_version(t) for t in given]:
        raise TypeError(
            f"{formula.__qualname__} writes into a tensor that it is given; it may only read them"
        )
    return made


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version  # such tensors have no version


def _derivative(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """d function / d (last of ``tensors``), of a pointwise function.

    Operators run below autograd: a thread of its own has it. The stream is the caller's.
    """
    stream = torch.cuda.current_stream(tensors[0].device) if tensors[0].is_cuda else None

    def differentiate() -> Tensor:
        with torch.cuda.stream(stream):
            *others, last = (t.clone() if t.is_inference() else t.detach() for t in tensors)
            value = function(*others, last.requires_grad_())
            return torch.autograd.grad(value, last, torch.ones_like(value))[0]

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(differentiate).result()


#: Every class by its kinds: what an operator is told of a divergence is its kind and its numbers.
_CLASSES: dict[int, type[Divergence]] = {}


def _level(cls: type, name: str) -> int:
    """How many classes up ``name`` is defined."""
    return next(i for i, kind in enumerate(cls.__mro__) if name in vars(kind))


def _new_code(name: str) -> int:
    """The same in every process that defines the class: a graph may be stored with it."""
    code = -2 - zlib.crc32(name.encode())
    while code in _CLASSES:  # the name is defined again, and what was made with the first stays its own
        code -= 1
    return code


def _numbers_of(divergence: Any) -> list[str]:
    """The fields of an instance or a class."""
    return [field.name for field in fields(divergence)] if is_dataclass(divergence) else []


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q) = sum p log(p / q): the divergence of ``F.kl_div`` and of Hinton et al. (2015).

    >>> ForwardKL()
    ForwardKL()
    """

    code: ClassVar[int] = 1
    closed_form: ClassVar[str | None] = "forward"

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _times(p, _log_ratio(log_p, log_q))

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return q - p


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p) = sum q log(q / p), as in MiniLLM (arXiv 2306.08543).

    >>> ReverseKL()
    ReverseKL()
    """

    code: ClassVar[int] = 2
    closed_form: ClassVar[str | None] = "reverse"

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _times(q, -_log_ratio(log_p, log_q))

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _times(q, -_log_ratio(log_p, log_q))


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = (1-beta) q + beta p.

    TRL's convention (GKD, arXiv 2306.13649): beta = 0 is the forward and beta = 1 the reverse KL.
    Raises ValueError unless 0 <= beta <= 1.

    >>> JSD(beta=0.5)
    JSD(beta=0.5)
    """

    beta: float = 0.5
    code: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"JSD needs 0 <= beta <= 1, got beta={self.beta}")

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        m, d = self._mixture(p, q), p - q
        of_p = _log_over_mixture(p, m, (1 - self.beta) * d)
        return self.beta * p * of_p + (1 - self.beta) * q * _log_over_mixture(q, m, -self.beta * d)

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (1 - self.beta) * q * _log_over_mixture(q, self._mixture(p, q), self.beta * (q - p))

    def _mixture(self, p: Tensor, q: Tensor) -> Tensor:
        return self.beta * p + (1 - self.beta) * q


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q), DistiLLM's skew KL (arXiv 2402.03898).

    Raises ValueError unless 0 <= alpha < 1.

    >>> SkewKL(alpha=0.1)
    SkewKL(alpha=0.1)
    """

    alpha: float = 0.1
    code: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"SkewKL needs 0 <= alpha < 1, got alpha={self.alpha}")

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        # p - m sums to 0: subtracted, it leaves of every term its second order.
        m, d = self._mixture(p, q), (1 - self.alpha) * (p - q)
        return p * _log_over_mixture(p, m, d) - d

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (1 - self.alpha) ** 2 * q * _over_mixture(q - p, self._mixture(p, q))

    def q_psi_apart(self, p: Tensor, q: Tensor) -> Tensor:
        """q_psi without the 1 that is added to psi elsewhere, for rows whose p and q ``disagree``
        (``backends/row_state.py``). Where they have little in common, sum q p / m is small, and the 1 would be nearly
        all of every psi and of the sum of q_psi, which are subtracted from each other."""
        return -(1 - self.alpha) * q * _over_mixture(p, self._mixture(p, q))

    def _mixture(self, p: Tensor, q: Tensor) -> Tensor:
        return self.alpha * p + (1 - self.alpha) * q


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q), DistiLLM's skew reverse KL (arXiv 2402.03898).

    ``detach_mixture=True`` treats the q inside the mixture as a constant (DistiLLM-2,
    arXiv 2503.07067): same value, another gradient. Raises ValueError unless 0 <= alpha < 1.

    >>> SkewReverseKL(alpha=0.1, detach_mixture=True)
    SkewReverseKL(alpha=0.1, detach_mixture=True)
    """

    alpha: float = 0.1
    detach_mixture: bool = False
    code: ClassVar[int] = 5
    #: Its kind with a detached mixture.
    detached_code: ClassVar[int] = 9

    def __post_init__(self) -> None:
        flag("SkewReverseKL's detach_mixture", self.detach_mixture)
        super().__post_init__()
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"SkewReverseKL needs 0 <= alpha < 1, got alpha={self.alpha}")

    @property
    def kind(self) -> int:
        return self.detached_code if self.detach_mixture else self.code

    @classmethod
    def with_parameters(cls, kind: int, parameters: Sequence[Any]) -> Divergence:
        return super().with_parameters(kind, (parameters[0], kind == cls.detached_code))

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        m, d = self._mixture(p, q), (1 - self.alpha) * (q - p)
        log_q_over_m = _log_over_mixture(q, m, d)
        if self.detach_mixture:
            _, finite = _both_finite(log_p, log_q)
            return _times(q, log_q_over_m.detach() + (finite - finite.detach())) - d
        return q * log_q_over_m - d  # as in SkewKL

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        m, d = self._mixture(p, q), (1 - self.alpha) * (q - p)
        log_q_over_m = _log_over_mixture(q, m, d)
        if self.detach_mixture:
            return q * log_q_over_m
        return q * (log_q_over_m - self.alpha * _over_mixture(d, m))

    def _mixture(self, p: Tensor, q: Tensor) -> Tensor:
        return (1 - self.alpha) * p + self.alpha * q


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """1/2 sum |p - q|; the gradient at ties is 0.

    >>> TotalVariation()
    TotalVariation()
    """

    code: ClassVar[int] = 6

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * (p - q).abs()

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * q * torch.sign(q - p)


@dataclass(frozen=True)
class Overlap(Divergence):
    """sum min(p, q): how often speculative decoding accepts a token that q drafted and p verifies.

    It is 1 - TotalVariation, and what two models have in common, not how they differ: a loss is its negative, or
    its negative logarithm. Where that is small, 1 - TV has no digits left; this keeps its own, and so does its
    gradient. The gradient at ties is that of p, which is 0.

    >>> Overlap()
    Overlap()
    """

    code: ClassVar[int] = 10

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.where(q < p, q, p + 0.0 * q)  # NaN of either stays

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.where(q < p, q, 0.0 * q)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """The alpha-beta divergence of Cichocki et al. (2011), used by ABKD (arXiv 2505.04560).

    ``-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]`` with its limits at a = 0, b = 0
    and a + b = 0; (1, 0) is the forward and (0, 1) the reverse KL. Raises ValueError unless both are
    finite.

    A term is ``x^2 exp[s log q, a log p + b log q, s log p]`` with x = log(p / q), s = a + b and exp[...]
    the divided difference of exp: half its mean over a triangle with these corners. That is positive, loses
    no digits wherever the corners lie, and holds at the limits, where corners meet.

    >>> AlphaBeta(alpha=0.2, beta=0.7)
    AlphaBeta(alpha=0.2, beta=0.7)
    """

    alpha: float = 0.2
    beta: float = 0.7
    code: ClassVar[int] = 7

    @property
    def _corners(self) -> list[tuple[float, float]]:
        """(of log p, of log q) in each of exp's three arguments, ascending in the first."""
        a, b = self.alpha, self.beta
        return sorted([(0.0, a + b), (a, b), (a + b, 0.0)])

    @staticmethod
    def _exponent(lp: Tensor, lq: Tensor, corner: tuple[float, float]) -> Tensor:
        """Of p^u q^v, with 0^0 = 1."""
        exponent = torch.zeros_like(lq)
        for log, power in zip((lp, lq), corner):
            if power:
                exponent = exponent + power * log
        return exponent

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        lp, lq = _both_finite(log_p, log_q)
        x, width = lp - lq, self._corners[2][0] - self._corners[0][0]
        if width == 0:
            return 0.5 * x * x
        close = width * x.abs() < 1
        near = self._near(torch.where(close, lp, 0.0), torch.where(close, lq, 0.0))
        return torch.where(close, near, self._apart(lp, lq, torch.where(close, 1 / width, x)))

    def _near(self, lp: Tensor, lq: Tensor) -> Tensor:
        """By exp's series about the middle between the outer corners."""
        x, (low, middle, high) = lp - lq, self._corners
        center = 0.5 * (low[0] + high[0]), 0.5 * (low[1] + high[1])
        square, inner = (0.5 * (high[0] - low[0]) * x).square(), (middle[0] - center[0]) * x
        even = products = torch.ones_like(x)
        total = 0.5 * products
        for n in range(1, 14 if x.dtype == torch.float64 else 8):
            products = products * inner  # of n of the corners: their complete symmetric polynomial
            if n % 2 == 0:
                even = even * square
                products = products + even
            total = total + products / math.factorial(n + 2)
        exponent = self._exponent(lp, lq, center)
        # Between equals the power may overflow, and counts for nothing.
        return x.square() * total * exponent.masked_fill((x == 0) & (exponent > 80), 0.0).exp()

    def _apart(self, lp: Tensor, lq: Tensor, x: Tensor) -> Tensor:
        """By the differences of exp from the highest corner to the middle one and from there to the lowest."""
        (low, middle, high), rising, distance = self._corners, x > 0, x.abs()
        upper, lower = high[0] - middle[0], middle[0] - low[0]
        (decay_high, high_span), (decay_low, low_span) = _decayed(upper, distance), _decayed(lower, distance)
        decay = torch.where(rising, decay_high, decay_low)
        first, second = torch.where(rising, high_span, low_span), torch.where(rising, low_span, high_span)
        highest = torch.where(rising, self._exponent(lp, lq, high), self._exponent(lp, lq, low))
        return _times(highest.exp(), (first - _times(decay, second)) / (high[0] - low[0]))

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        # -x exp[s log q, a log p + b log q]
        lp, lq = _both_finite(log_p, log_q)
        a, b, x = self.alpha, self.beta, lp - lq
        ends = self._exponent(lp, lq, (0.0, a + b)), self._exponent(lp, lq, (a, b))
        higher = torch.where(a * x > 0, ends[1], ends[0]).masked_fill(x == 0, 0.0)
        return _times(higher.exp(), -x.sign() * _decayed(abs(a), x.abs())[1])


def _decayed(rate: float, distance: Tensor) -> tuple[Tensor, Tensor]:
    """e^(-rate distance), and the integral of e^(-rate t) over the distance: at rate 0 the distance."""
    if rate < _tiny(distance):  # it differs by rate * distance / 2 of itself
        return torch.ones_like(distance), distance
    decay = torch.exp(-rate * distance)
    return decay, torch.where(decay < 0.5, 1 - decay, -torch.expm1(-rate * distance)) / rate


@dataclass(frozen=True)
class Mixed(Divergence):
    """weight KL(p || q) + (1 - weight) KL(q || p): Jeffreys' divergence (1946) with weights.

    Raises ValueError unless 0 <= weight <= 1.

    >>> Mixed(weight=0.5)
    Mixed(weight=0.5)
    """

    weight: float = 0.5
    code: ClassVar[int] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"Mixed needs 0 <= weight <= 1, got weight={self.weight}")

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        x = _log_ratio(log_p, log_q)
        return self.weight * _times(p, x) + (1 - self.weight) * _times(q, -x)

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        x = _log_ratio(log_p, log_q)
        return self.weight * (q - p) + (1 - self.weight) * _times(q, -x)


@dataclass(frozen=True)
class NoDivergence(Divergence):
    """No soft term: what cross entropy alone uses. Not public."""

    code: ClassVar[int] = 0


_CLASSES[SkewReverseKL.detached_code] = SkewReverseKL


#: With these numbers a divergence of the first class is the last.
_ENDS: tuple[tuple[type[Divergence], dict[str, float], type[Divergence]], ...] = (
    (JSD, {"beta": 0.0}, ForwardKL),
    (JSD, {"beta": 1.0}, ReverseKL),
    (Mixed, {"weight": 1.0}, ForwardKL),
    (Mixed, {"weight": 0.0}, ReverseKL),
    (SkewKL, {"alpha": 0.0}, ForwardKL),
    (SkewReverseKL, {"alpha": 0.0}, ReverseKL),
    (AlphaBeta, {"alpha": 1.0, "beta": 0.0}, ForwardKL),
    (AlphaBeta, {"alpha": 0.0, "beta": 1.0}, ReverseKL),
)


def simplified(divergence: Divergence) -> Divergence:
    """The same divergence in its cheapest form: at the ends of its range it is a KL."""
    for kind, numbers, end in _ENDS:  # torch 2.10's compiler does not follow `match`
        if isinstance(divergence, kind) and all(getattr(divergence, n) == numbers[n] for n in numbers):
            return end() if _keeps_its_formula(type(divergence)) else divergence
    return divergence


def _keeps_its_formula(cls: type[Divergence]) -> bool:
    """Whether it is one of the divergences here, or a subclass that means the same."""
    ours = next(kind for kind in cls.__mro__ if kind.__module__ == __name__)
    return all(getattr(cls, name) is getattr(ours, name) for name in ("phi", "q_psi", "closed_form"))


def class_of(kind: int) -> type[Divergence]:
    """The class that a :attr:`Divergence.kind` stands for."""
    if kind not in _CLASSES:
        raise ValueError(
            f"no divergence is defined here whose kind is {kind}; import the module that defines it"
        )
    return _CLASSES[kind]
