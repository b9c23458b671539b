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
from dataclasses import dataclass, fields
from typing import ClassVar, Optional

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
    """Base of all divergences: ``code`` names it to the kernels, ``parameters`` go with it."""

    code: ClassVar[int] = -1
    #: "forward" or "reverse": the value and gradient follow from the first pass alone.
    closed_form: ClassVar[Optional[str]] = None

    def __post_init__(self) -> None:
        """A dataclass's fields are its numbers; a 0-dim tensor becomes the number that it holds."""
        for name in (field.name for field in fields(self)):  # type: ignore[arg-type]
            given = getattr(self, name)
            if type(given) not in (int, float, bool) or not abs(given) < math.inf:
                object.__setattr__(self, name, number(f"{type(self).__name__}'s {name}", given))

    @property
    def parameters(self) -> tuple[float, float]:
        return (0.0, 0.0)

    def phi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        raise NotImplementedError

    def q_psi(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        raise NotImplementedError


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
    if isinstance(divergence, JSD) and divergence.beta in (0.0, 1.0):
        return ForwardKL() if divergence.beta == 0.0 else ReverseKL()
    if isinstance(divergence, Mixed) and divergence.weight in (0.0, 1.0):
        return ForwardKL() if divergence.weight == 1.0 else ReverseKL()
    if isinstance(divergence, (SkewKL, SkewReverseKL)) and divergence.alpha == 0.0:
        return ForwardKL() if isinstance(divergence, SkewKL) else ReverseKL()
    if divergence == AlphaBeta(1.0, 0.0):
        return ForwardKL()
    if divergence == AlphaBeta(0.0, 1.0):
        return ReverseKL()
    return divergence


def from_code(code: int, first: float, second: float) -> Divergence:
    """The divergence that ``code`` and its two ``parameters`` stand for."""
    if code == JSD.code:
        return JSD(first)
    if code == SkewKL.code:
        return SkewKL(first)
    if code == SkewReverseKL.code:
        return SkewReverseKL(first, bool(second))
    if code == AlphaBeta.code:
        return AlphaBeta(first, second)
    if code == Mixed.code:
        return Mixed(first)
    plain = {d.code: d for d in (NoDivergence(), ForwardKL(), ReverseKL(), TotalVariation())}
    if code not in plain:
        raise ValueError("the kernels know kdkernels' own divergences; kd.use_backend('reference') takes any")
    return plain[code]
