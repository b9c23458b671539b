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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Callable, ClassVar, Optional

import torch
from torch import Tensor

from .checks import number

__all__ = [
    "Divergence",
    "ForwardKL",
    "ReverseKL",
    "JSD",
    "SkewKL",
    "SkewReverseKL",
    "TotalVariation",
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


def _clamped_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / q) within what exp can take: beyond it the smaller of the two no longer counts."""
    limit = 700.0 if log_q.dtype == torch.float64 else 80.0
    return _log_ratio(log_p, log_q).clamp(-limit, limit)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x with 0 * inf = 0, for autograd too."""
    some = weight != 0  # true for NaN, which must stay
    return torch.where(some, weight * torch.where(some, x, 0.0), 0.0)


class Divergence:
    """Base of all divergences, and of your own: a class with ``phi``, and with ``q_psi`` where it should not be
    taken from ``phi`` by autograd. Its numbers are the fields of a dataclass.

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
    closed_form: ClassVar[Optional[str]] = None

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
    def parameters(self) -> tuple[float, ...]:
        """Its numbers, in the order of its fields; at least two, as the kernels read them."""
        kind = type(self)
        own = tuple(
            float(number(f"{kind.__name__}'s {name}", getattr(self, name))) for name in _numbers_of(self)
        )
        return own + (0.0,) * (2 - len(own))

    def check(self) -> None:
        """TypeError for what cannot be a divergence: no formula, or numbers that are no fields."""
        kind = type(self)
        if kind.phi is Divergence.phi:
            raise TypeError(f"{kind.__name__} defines no phi, whose sum is the divergence")
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
        return _derivative(lambda p, lp, lq: self.phi(p, lq.exp(), lp, lq), p, lp, lq).masked_fill(padding, 0.0)


def _derivative(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """That of a pointwise function for the last of ``tensors``.

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


#: Every class by its code: what an operator is told of a divergence is its code and its numbers.
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
    closed_form: ClassVar[Optional[str]] = "forward"

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
    closed_form: ClassVar[Optional[str]] = "reverse"

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

    @property
    def parameters(self) -> tuple[float, float]:
        return (self.beta, 0.0)

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        x = _clamped_ratio(log_p, log_q)
        log_m_over_q = torch.log1p(self.beta * torch.expm1(x))
        return self.beta * p * (x - log_m_over_q) - (1 - self.beta) * q * log_m_over_q

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        x = _clamped_ratio(log_p, log_q)
        return -(1 - self.beta) * q * torch.log1p(self.beta * torch.expm1(x))


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

    @property
    def parameters(self) -> tuple[float, float]:
        return (self.alpha, 0.0)

    def _log_p_over_m(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        x = _clamped_ratio(log_p, log_q)
        return -torch.log1p((1 - self.alpha) * torch.expm1(-x))

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return p * self._log_p_over_m(log_p, log_q)

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return -(1 - self.alpha) * q * torch.expm1(self._log_p_over_m(log_p, log_q))


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"SkewReverseKL needs 0 <= alpha < 1, got alpha={self.alpha}")

    @property
    def parameters(self) -> tuple[float, float]:
        return (self.alpha, float(self.detach_mixture))

    def _log_q_over_m(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        x = _clamped_ratio(log_p, log_q)
        return -torch.log1p((1 - self.alpha) * torch.expm1(x))

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_q_over_m = self._log_q_over_m(log_p, log_q)
        if self.detach_mixture:
            _, finite = _both_finite(log_p, log_q)
            log_q_over_m = _times(q, finite - (finite - log_q_over_m).detach())
            return log_q_over_m
        return q * log_q_over_m

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_q_over_m = self._log_q_over_m(log_p, log_q)
        if self.detach_mixture:
            return q * log_q_over_m
        return q * (log_q_over_m - self.alpha * torch.expm1(log_q_over_m))


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
class AlphaBeta(Divergence):
    """The alpha-beta divergence of Cichocki et al. (2011), used by ABKD (arXiv 2505.04560).

    ``-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]`` with its limits at a = 0, b = 0
    and a + b = 0; (1, 0) is the forward and (0, 1) the reverse KL. Raises ValueError unless both are
    finite.

    >>> AlphaBeta(alpha=0.2, beta=0.7)
    AlphaBeta(alpha=0.2, beta=0.7)
    """

    alpha: float = 0.2
    beta: float = 0.7
    code: ClassVar[int] = 7

    @property
    def parameters(self) -> tuple[float, float]:
        return (self.alpha, self.beta)

    @staticmethod
    def _power(log_p: Tensor, a: float, log_q: Tensor, b: float) -> Tensor:
        """p^a q^b, with 0^0 = 1."""
        exponent = torch.zeros_like(log_q)
        if a:
            exponent = exponent + a * log_p
        if b:
            exponent = exponent + b * log_q
        return exponent.exp()

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        padding = torch.isneginf(log_p) & torch.isneginf(log_q)
        lp, lq = _both_finite(log_p, log_q)
        # Between equals the terms would only nearly cancel.
        return self._finite_phi(lp, lq).masked_fill(padding | (lp == lq), 0.0)

    def _finite_phi(self, lp: Tensor, lq: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        x = lp - lq
        if a == 0 and b == 0:
            return 0.5 * x * x
        p_ab, q_ab = self._power(lp, a + b, lq, 0.0), self._power(lp, 0.0, lq, a + b)
        if b == 0:
            return (_times(p_ab, a * x) - p_ab + q_ab) / a**2
        if a == 0:
            return (_times(q_ab, -b * x) - q_ab + p_ab) / b**2
        if a + b == 0:
            return (-a * x + torch.expm1(a * x)) / a**2
        cross = self._power(lp, a, lq, b)
        return -(cross - a / (a + b) * p_ab - b / (a + b) * q_ab) / (a * b)

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        lp, lq = _both_finite(log_p, log_q)
        q_ab = self._power(lp, 0.0, lq, a + b)
        if a == 0:
            value = _times(q_ab, lq - lp)
        else:
            value = (q_ab - self._power(lp, a, lq, b)) / a
        return value.masked_fill(log_p == log_q, 0.0)


@dataclass(frozen=True)
class Mixed(Divergence):
    """weight KL(p || q) + (1 - weight) KL(q || p). Raises ValueError unless 0 <= weight <= 1.

    >>> Mixed(weight=0.5)
    Mixed(weight=0.5)
    """

    weight: float = 0.5
    code: ClassVar[int] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"Mixed needs 0 <= weight <= 1, got weight={self.weight}")

    @property
    def parameters(self) -> tuple[float, float]:
        return (self.weight, 0.0)

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


def simplified(divergence: Divergence) -> Divergence:
    """The same divergence in its cheapest form: the ends of JSD, Mixed and AlphaBeta are KLs."""
    # By exact types: a subclass may mean something else.
    if type(divergence) is JSD and divergence.beta in (0.0, 1.0):
        return ForwardKL() if divergence.beta == 0.0 else ReverseKL()
    if type(divergence) is Mixed and divergence.weight in (0.0, 1.0):
        return ForwardKL() if divergence.weight == 1.0 else ReverseKL()
    if type(divergence) is SkewKL and divergence.alpha == 0.0:
        return ForwardKL()
    if type(divergence) is SkewReverseKL and divergence.alpha == 0.0:
        return ReverseKL()
    if divergence == AlphaBeta(1.0, 0.0):
        return ForwardKL()
    if divergence == AlphaBeta(0.0, 1.0):
        return ReverseKL()
    return divergence


def from_code(code: int, parameters: list[float]) -> Divergence:
    """The divergence that a ``code`` and its ``parameters`` stand for."""
    if code not in _CLASSES:
        raise ValueError(f"no divergence is defined here whose code is {code}; import the module that defines it")
    kind = _CLASSES[code]
    return kind(**dict(zip(_numbers_of(kind), parameters)))
