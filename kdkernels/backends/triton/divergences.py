"""What each divergence is, once for Triton: the pointwise phi and q_psi = q dphi/dq.

``terms`` sees p, q, x = log(p / q), log p and log q and returns both at once; what a caller does not
use the compiler drops. As in ``kdkernels/divergences.py``, q_psi is defined up to c * q and chosen to
be exactly 0 at x = 0. x is +-inf where one side is padding and NaN where both are: there p = q = 0.

``F.kind`` is the divergence's code and ``F.variant`` what else changes its formula: whether the
mixture is detached, or which limit of alpha-beta it is. The two parameters are run-time numbers.
"""

import triton
import triton.language as tl

from .state import times

#: Codes of kdkernels/divergences.py and csrc/spec.h.
FORWARD_KL = tl.constexpr(1)
REVERSE_KL = tl.constexpr(2)
JSD = tl.constexpr(3)
SKEW_KL = tl.constexpr(4)
SKEW_REVERSE_KL = tl.constexpr(5)
TOTAL_VARIATION = tl.constexpr(6)
ALPHA_BETA = tl.constexpr(7)
MIXED = tl.constexpr(8)

#: Probabilities below it no longer count; a quotient by it, and its logarithm, stay finite.
TINY = tl.constexpr(1e-30)

#: Alpha-beta: the general formula and its limits.
GENERAL, BETA_ZERO, ALPHA_ZERO, BOTH_ZERO, SUM_ZERO = (tl.constexpr(i) for i in range(5))


@triton.jit
def _log_ratio(p, m, d):
    """log(p / m) to a few ulp of itself, given d = p - m as exactly as p and m: 0 where d is. A polynomial
    (cephes' logf) where p / m is near 1; beyond, the hardware's logarithm."""
    inverse = 1.0 / m
    u = d * inverse
    y = tl.fma(u, 7.0376836292e-2, -1.1514610310e-1)
    y = tl.fma(y, u, 1.1676998740e-1)
    y = tl.fma(y, u, -1.2420140846e-1)
    y = tl.fma(y, u, 1.4249322787e-1)
    y = tl.fma(y, u, -1.6668057665e-1)
    y = tl.fma(y, u, 2.0000714765e-1)
    y = tl.fma(y, u, -2.4999993993e-1)
    y = tl.fma(y, u, 3.3333331174e-1)
    near = u + u * u * tl.fma(y, u, -0.5)
    return tl.where((u > -0.29) & (u < 0.41), near, tl.log(tl.maximum(p * inverse, TINY)))


@triton.jit
def _mixture(a, b):
    """A mixture, which is divided by."""
    return tl.maximum(a + b, TINY)


# The logarithms come from p and q, not from the logits: between models that agree the terms cancel to second
# order, and only what is computed from the same numbers does so. The skewed divergences add d to phi, which
# sums to 0 over a row and leaves of every term its second order.


@triton.jit
def _jsd(p, q, beta):
    keep = 1.0 - beta
    bp = beta * p
    kq = keep * q
    m = _mixture(bp, kq)
    d = p - q
    q_psi = kq * _log_ratio(q, m, -beta * d)
    return bp * _log_ratio(p, m, keep * d) + q_psi, q_psi


@triton.jit
def _skew_kl(p, q, alpha):
    keep = 1.0 - alpha
    kq = keep * q
    m = _mixture(alpha * p, kq)
    d = keep * (q - p)
    return d + p * _log_ratio(p, m, -d), kq * (d / m)


@triton.jit
def _skew_reverse_kl(p, q, alpha, DETACHED: tl.constexpr):
    keep = 1.0 - alpha
    aq = alpha * q
    m = _mixture(aq, keep * p)
    d = keep * (p - q)
    q_log = q * _log_ratio(q, m, -d)
    q_psi = q_log
    if not DETACHED:
        q_psi += aq * (d / m)
    return d + q_log, q_psi


@triton.jit
def _total_variation(p, q):
    d = q - p
    sign = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0))
    return 0.5 * tl.abs(d), sign * q


@triton.jit
def _exp(y):
    """exp(100) is inf in fp32, and min keeps inf - inf away."""
    return tl.exp(tl.minimum(y, 100.0))


@triton.jit
def _small_remainder(y):
    """e^y - 1 - y for small y, by its series: between near equals a difference of powers keeps nothing."""
    tail = y * (1.0 / 120.0 + y * (1.0 / 720.0 + y * (1.0 / 5040.0)))
    return y * y * (0.5 + y * (1.0 / 6.0 + y * (1.0 / 24.0 + tail)))


@triton.jit
def _alpha_beta(p, q, x, log_p, log_q, a, b, LIMIT: tl.constexpr):
    padding = (x != x) & (p == 0.0) & (q == 0.0)
    x = tl.where(padding, 0.0, x)
    log_p, log_q = tl.where(padding, 0.0, log_p), tl.where(padding, 0.0, log_q)
    y = a * x  # p^a q^b = q^(a + b) e^y
    close = tl.abs(y) < 0.25
    remainder = _small_remainder(y)
    if LIMIT == BOTH_ZERO:
        phi, q_psi = 0.5 * x * x, -x
    elif LIMIT == ALPHA_ZERO:
        p_b, q_b = _exp(b * log_p), _exp(b * log_q)
        phi, q_psi = (times(q_b, -b * x) - q_b + p_b) / (b * b), times(q_b, -x)
    elif LIMIT == BETA_ZERO:
        p_a, q_a = _exp(a * log_p), _exp(a * log_q)
        phi = (times(p_a, y) - p_a + q_a) / (a * a)
        q_psi = tl.where(close, -q_a * (y + remainder), q_a - p_a) / a
    elif LIMIT == SUM_ZERO:
        cross = _exp(y)
        phi = tl.where(close, remainder, cross - 1.0 - y) / (a * a)
        q_psi = tl.where(close, -(y + remainder), 1.0 - cross) / a
    else:
        sum_ab = a + b
        cross = _exp(a * log_p + b * log_q)
        p_ab, q_ab = _exp(sum_ab * log_p), _exp(sum_ab * log_q)
        phi = ((a / sum_ab) * p_ab + (b / sum_ab) * q_ab - cross) / (a * b)
        q_psi = tl.where(close, -q_ab * (y + remainder), q_ab - cross) / a
    # At x = 0 (padding too) both are 0; the terms would only nearly cancel.
    return tl.where(x == 0.0, 0.0, phi), tl.where(x == 0.0, 0.0, q_psi)


@triton.jit
def terms(F: tl.constexpr, p, q, x, log_p, log_q, first, second):
    """(phi, q_psi) of a tile."""
    if F.kind == FORWARD_KL:
        return times(p, x), q - p
    elif F.kind == REVERSE_KL:
        reverse = times(q, -x)
        return reverse, reverse
    elif F.kind == JSD:
        return _jsd(p, q, first)
    elif F.kind == SKEW_KL:
        return _skew_kl(p, q, first)
    elif F.kind == SKEW_REVERSE_KL:
        return _skew_reverse_kl(p, q, first, F.variant)
    elif F.kind == TOTAL_VARIATION:
        return _total_variation(p, q)
    elif F.kind == ALPHA_BETA:
        return _alpha_beta(p, q, x, log_p, log_q, first, second, F.variant)
    else:
        tl.static_assert(F.kind == MIXED)
        reverse = times(q, -x) * (1.0 - first)
        return times(p, x) * first + reverse, first * (q - p) + reverse
