"""What each divergence is, once for Triton: the pointwise phi and q_psi = q dphi/dq.

``terms`` sees p, q, x = log(p / q), log p and log q and returns both at once; what a caller does not
use the compiler drops. As in ``kdkernels/divergences.py``, q_psi is defined up to c * q and chosen to
be exactly 0 at x = 0; but in a row of which p and q ``disagree``, where SkewKL has another constant. x is +-inf where one side is padding and NaN where both are: there p = q = 0.

``F.kind`` is the divergence's code and ``F.variant`` what else changes its formula: whether the
mixture is detached, or how alpha-beta's corners lie. The parameters are run-time numbers.
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


# SkewKL's psi is -p / m, to which 1 is added: 0 where p = q. But the slope, sum q p / m, is at least the mass that p
# and q have in common; where they have little, the 1 would be nearly all of every psi and of the slope, which cancel.


@triton.jit
def _skew_kl(p, q, alpha, disagree):
    keep = 1.0 - alpha
    kq = keep * q
    m = _mixture(alpha * p, kq)
    d = keep * (q - p)
    return d + p * _log_ratio(p, m, -d), kq * (tl.where(disagree, -p, d) / m)


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


# Alpha-beta has no limit cases: a term is x^2 exp[s log q, a log p + b log q, s log p], with s = a + b and exp[...] the
# divided difference of exp, and q_psi is -x exp[s log q, a log p + b log q]. Two of exp's arguments, the corners,
# differ by a x, b x or s x, so which is the highest and which the lowest depends on the sign of x alone.


#
# The corners are numbered 0, 1, 2 in this order; the variant is three times the lowest one where x > 0, and the highest.


@triton.jit
def _place(CORNER: tl.constexpr, a, sum_ab):
    """What x is multiplied by from s log q to the corner."""
    if CORNER == 0:
        return a * 0.0
    elif CORNER == 1:
        return a
    else:
        return sum_ab


@triton.jit
def _power(CORNER: tl.constexpr, log_p, log_q, a, b, sum_ab):
    """exp of the corner. exp(100) is inf in fp32, and 0^0 is 1."""
    if CORNER == 0:
        exponent = times(sum_ab, log_q)
    elif CORNER == 1:
        exponent = times(a, log_p) + times(b, log_q)
    else:
        exponent = times(sum_ab, log_p)
    return tl.exp(tl.minimum(exponent, 100.0))


@triton.jit
def _over(ONE: tl.constexpr, OTHER: tl.constexpr, distance, a, b, sum_ab):
    """With the rate r at which two corners part: e^(-r distance), and its integral over the distance."""
    rate = tl.abs(sum_ab)
    if ONE + OTHER == 1:
        rate = tl.abs(a)
    if ONE + OTHER == 3:
        rate = tl.abs(b)
    y = times(rate, distance)
    series = 1.0 / 120.0 - y * (1.0 / 720.0 - y * (1.0 / 5040.0 - y * (1.0 / 40320.0)))
    series = 0.5 - y * (1.0 / 6.0 - y * (1.0 / 24.0 - y * series))
    left = tl.exp(-y)
    lost = tl.where(y < 0.5, y * (1.0 - y * series), 1.0 - left)
    return left, tl.where(rate == 0.0, distance, lost / tl.where(rate == 0.0, 1.0, rate))


@triton.jit
def _near(x, h, t):
    """x^2 exp[0, t - h, -2 h] for |t| <= h < 3/8: a series whose terms are the complete symmetric polynomials of
    h, t and -h over (n + 2)!."""
    z = h * h
    fourth = 1.0 / 720.0 + t * (1.0 / 5040.0 + t * (1.0 / 40320.0))
    second = 1.0 / 24.0 + t * (1.0 / 120.0 + t * fourth) + z * (fourth + z * (1.0 / 40320.0))
    series = 0.5 + t * (1.0 / 6.0 + t * (1.0 / 24.0 + t * (1.0 / 120.0 + t * fourth))) + z * second
    return x * x * tl.exp(-h) * series


@triton.jit
def _alpha_beta(p, q, x, log_p, log_q, a, b, sum_ab, VARIANT: tl.constexpr):
    LOW: tl.constexpr = VARIANT // 3
    HIGH: tl.constexpr = VARIANT % 3
    MIDDLE: tl.constexpr = 3 - LOW - HIGH
    padding = (x != x) & (p == 0.0) & (q == 0.0)
    x = tl.where(padding, 0.0, x)
    log_p, log_q = tl.where(padding, 0.0, log_p), tl.where(padding, 0.0, log_q)
    rising, distance = x > 0.0, tl.abs(x)
    peak = tl.where(rising, _power(HIGH, log_p, log_q, a, b, sum_ab), _power(LOW, log_p, log_q, a, b, sum_ab))
    # From the highest corner to the middle one, and from there to the lowest.
    upper_left, upper = _over(HIGH, MIDDLE, distance, a, b, sum_ab)
    lower_left, lower = _over(MIDDLE, LOW, distance, a, b, sum_ab)
    left = tl.where(rising, upper_left, lower_left)
    first, second = tl.where(rising, upper, lower), tl.where(rising, lower, upper)
    low, middle, high = _place(LOW, a, sum_ab), _place(MIDDLE, a, sum_ab), _place(HIGH, a, sum_ab)
    width = high - low
    reach = times(width, distance)
    near = _near(x, 0.5 * reach, times(middle - 0.5 * (low + high), x))
    apart = (first - times(left, second)) / tl.where(width == 0.0, 1.0, width)
    phi = times(peak, tl.where(reach < 0.75, near, apart))
    if HIGH + MIDDLE == 1:  # the two corners of q_psi
        slope = tl.where(rising, upper, times(left, upper))
    elif MIDDLE + LOW == 1:
        slope = tl.where(rising, times(left, lower), lower)
    else:
        slope = _over(HIGH, LOW, distance, a, b, sum_ab)[1]
    q_psi = times(peak, tl.where(rising, -slope, slope))
    # Between equals (padding too) both are 0, whatever overflows.
    return tl.where(x == 0.0, 0.0, phi), tl.where(x == 0.0, 0.0, q_psi)


@triton.jit
def terms(F: tl.constexpr, p, q, x, log_p, log_q, numbers, disagree):
    """(phi, q_psi) of a tile of one row."""
    if F.kind == FORWARD_KL:
        return times(p, x), q - p
    elif F.kind == REVERSE_KL:
        reverse = times(q, -x)
        return reverse, reverse
    elif F.kind == JSD:
        return _jsd(p, q, numbers.first)
    elif F.kind == SKEW_KL:
        return _skew_kl(p, q, numbers.first, disagree)
    elif F.kind == SKEW_REVERSE_KL:
        return _skew_reverse_kl(p, q, numbers.first, F.variant)
    elif F.kind == TOTAL_VARIATION:
        return _total_variation(p, q)
    elif F.kind == ALPHA_BETA:
        return _alpha_beta(p, q, x, log_p, log_q, numbers.first, numbers.second, numbers.sum, F.variant)
    else:
        tl.static_assert(F.kind == MIXED)
        reverse = times(q, -x) * (1.0 - numbers.first)
        return times(p, x) * numbers.first + reverse, numbers.first * (q - p) + reverse
