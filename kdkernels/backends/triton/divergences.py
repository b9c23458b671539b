"""What each divergence is, once for Triton: the pointwise phi and q_psi = q dphi/dq.

``terms`` sees p, q, x = log(p / q), log p and log q and returns both at once; what a caller does not
use the compiler drops. As in ``kdkernels/divergences.py``, q_psi is defined up to c * q and chosen to be
exactly 0 at x = 0. SkewKL has another constant in a row of which p and q ``disagree``. x is +-inf where one
side is padding and NaN where both are: there p = q = 0.

``F.kind`` chooses the formula. The parameters are numbers in memory, so annealing one compiles nothing anew.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .state import times

#: Kinds of kdkernels/divergences.py and csrc/spec.h.
FORWARD_KL = tl.constexpr(1)
REVERSE_KL = tl.constexpr(2)
JSD = tl.constexpr(3)
SKEW_KL = tl.constexpr(4)
SKEW_REVERSE_KL = tl.constexpr(5)
TOTAL_VARIATION = tl.constexpr(6)
ALPHA_BETA = tl.constexpr(7)
MIXED = tl.constexpr(8)
SKEW_REVERSE_KL_DETACHED = tl.constexpr(9)
OVERLAP = tl.constexpr(10)

#: Probabilities below it no longer count; a quotient by it, and its logarithm, stay finite.
TINY = tl.constexpr(1e-30)


@triton.jit
def _log_ratio(p, m, d):
    """log(p / m) to a few ulp, relative to the result. d = p - m must be as accurate as p and m are; where
    d is 0, so is the result. m is at least TINY; of a p below it the result is finite, and no more.

    As csrc/vec.h: p / m = 2^k r. The difference of their bits is nearly that of their logarithms, and gives a k that
    leaves r in [2/3, 3/2]. log r = 2 atanh((r - 1) / (r + 1)), whose numerator and denominator are taken times m. k is
    subtracted from the exponent of p; of 0 and of subnormals that makes another number. k stays where it is in the bits:
    ``of_k`` is k's bits in an exponent, and a conversion would be a slow instruction.
    """
    bits = p.to(tl.int32, bitcast=True)
    of_k = (bits - m.to(tl.int32, bitcast=True) + 0x400000) & -0x800000
    over = tl.where(of_k == 0, d, (bits - of_k).to(tl.float32, bitcast=True) - m)
    h = over / tl.fma(over, 0.5, m)
    z = h * h
    y = tl.fma(z, 2.37301759e-3, 1.24866157e-2)
    y = tl.fma(y, z, 8.33336923e-2)
    k = ((of_k >> 23) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    return tl.fma(k, 0.693147181, tl.fma(y, z * h, h))


@triton.jit
def _mixture(a, b):
    """A mixture, which is divided by."""
    return tl.maximum(a + b, TINY)


class Share(NamedTuple):
    """A divergence's number, and 1 minus it: subtracted in fp64, since fp32 has few digits left of it near 1."""

    part: tl.tensor
    rest: tl.tensor


# The logarithms come from p and q, not from the logits: between models that agree the terms cancel to second
# order, and only what is computed from the same numbers does so. The skewed divergences add d to phi, which
# sums to 0 over a row and leaves of every term its second order.


@triton.jit
def _jsd(p, q, beta):
    bp = beta.part * p
    cq = beta.rest * q
    m = _mixture(bp, cq)
    d = p - q
    q_psi = cq * _log_ratio(q, m, -beta.part * d)
    return bp * _log_ratio(p, m, beta.rest * d) + q_psi, q_psi


# SkewKL's psi is -p / m (times 1 - alpha). Adding 1 makes it 0 where p = q. But where p and q have little in common,
# sum q p / m is small, and the 1 would be nearly all of every psi and of the sum of q psi, which are subtracted from
# each other. So it is not added in rows that `disagree`.


@triton.jit
def _skew_kl(p, q, alpha, disagree):
    cq = alpha.rest * q
    m = _mixture(alpha.part * p, cq)
    d = alpha.rest * (q - p)
    return d + p * _log_ratio(p, m, -d), cq * (tl.where(disagree, -p, d) / m)


@triton.jit
def _skew_reverse_kl(p, q, alpha, DETACHED: tl.constexpr):
    aq = alpha.part * q
    m = _mixture(aq, alpha.rest * p)
    d = alpha.rest * (p - q)
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
def _overlap(p, q):
    """psi is 1 where q < p and else 0: its sum over q is as small as the overlap, and keeps its digits."""
    return tl.where(q < p, q, p), tl.where(q < p, q, 0.0)


# Alpha-beta has no limit cases: a term is x^2 exp[s log q, a log p + b log q, s log p], with s = a + b and exp[...] the
# divided difference of exp, and q_psi is -x exp[s log q, a log p + b log q]. Two of exp's arguments, the corners,
# differ by a x, b x or s x, so which is the highest and which the lowest depends on the sign of x alone.


class Corner(NamedTuple):
    """An argument of exp as a combination of the logarithms: of_p log p + of_q log q."""

    of_p: tl.tensor
    of_q: tl.tensor


class Corners(NamedTuple):
    """Alpha-beta's corners where x > 0, and how they part per |x|."""

    low: Corner
    high: Corner
    upper: tl.tensor  # from the highest to the middle one
    lower: tl.tensor  # from the middle one to the lowest
    width: tl.tensor
    inner: tl.tensor  # the middle one beside the center of the outer two
    alpha: tl.tensor  # between the two corners of q_psi
    below_high: tl.tensor  # whether the highest corner is not one of q_psi's two
    above_low: tl.tensor


@triton.jit
def _ordered(a, b):
    swap = a.of_p > b.of_p
    first = Corner(tl.where(swap, b.of_p, a.of_p), tl.where(swap, b.of_q, a.of_q))
    return first, Corner(tl.where(swap, a.of_p, b.of_p), tl.where(swap, a.of_q, b.of_q))


@triton.jit
def _nonzero(number):
    """0 where it is next to nothing, which changes nothing of what is finite; fp32."""
    return tl.where(tl.abs(number) > TINY, number, 0.0).to(tl.float32)


@triton.jit
def _corners(a, b):
    total, zero = a + b, a * 0.0
    low, middle = _ordered(Corner(zero, total), Corner(a, b))
    middle, high = _ordered(middle, Corner(total, zero))
    low, middle = _ordered(low, middle)
    return Corners(
        low=Corner(_nonzero(low.of_p), _nonzero(low.of_q)),
        high=Corner(_nonzero(high.of_p), _nonzero(high.of_q)),
        upper=_nonzero(high.of_p - middle.of_p),
        lower=_nonzero(middle.of_p - low.of_p),
        width=_nonzero(high.of_p - low.of_p),
        inner=_nonzero(middle.of_p - 0.5 * (low.of_p + high.of_p)),
        alpha=_nonzero(tl.abs(a)),
        below_high=total >= tl.maximum(a, 0.0),
        above_low=total <= tl.minimum(a, 0.0),
    )


@triton.jit
def _decayed(rate, distance):
    """e^(-rate distance), and its integral over the distance."""
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
def _alpha_beta(p, q, x, log_p, log_q, c):
    padding = (x != x) & (p == 0.0) & (q == 0.0)
    x = tl.where(padding, 0.0, x)
    log_p, log_q = tl.where(padding, 0.0, log_p), tl.where(padding, 0.0, log_q)
    rising, distance = x > 0.0, tl.abs(x)
    of_p, of_q = tl.where(rising, c.high.of_p, c.low.of_p), tl.where(rising, c.high.of_q, c.low.of_q)
    # exp(100) is inf in fp32, and 0^0 is 1.
    peak = tl.exp(tl.minimum(times(of_p, log_p) + times(of_q, log_q), 100.0))
    # From the highest corner to the middle one, and from there to the lowest.
    upper_left, upper = _decayed(c.upper, distance)
    lower_left, lower = _decayed(c.lower, distance)
    left = tl.where(rising, upper_left, lower_left)
    first, second = tl.where(rising, upper, lower), tl.where(rising, lower, upper)
    reach = times(c.width, distance)
    near = _near(x, 0.5 * reach, times(c.inner, x))
    apart = (first - times(left, second)) / tl.where(c.width == 0.0, 1.0, c.width)
    phi = times(peak, tl.where(reach < 0.75, near, apart))
    slope = _decayed(c.alpha, distance)[1]
    slope = tl.where(tl.where(rising, c.below_high, c.above_low), times(left, slope), slope)
    q_psi = times(peak, tl.where(rising, -slope, slope))
    # Between equals (padding too) both are 0, whatever overflows.
    return tl.where(x == 0.0, 0.0, phi), tl.where(x == 0.0, 0.0, q_psi)


@triton.jit
def load_parameters(F: tl.constexpr, pointer):
    """The divergence's numbers as :func:`terms` reads them: alpha-beta's corners, else one number's share."""
    if F.kind == ALPHA_BETA:
        return _corners(tl.load(pointer), tl.load(pointer + 1))
    else:
        part = tl.load(pointer)
        return Share(part.to(tl.float32), (1.0 - part).to(tl.float32))


@triton.jit
def terms(F: tl.constexpr, p, q, x, log_p, log_q, parameters, disagree):
    """(phi, q_psi) of a tile of one row."""
    if F.kind == FORWARD_KL:
        return times(p, x), q - p
    elif F.kind == REVERSE_KL:
        reverse = times(q, -x)
        return reverse, reverse
    elif F.kind == JSD:
        return _jsd(p, q, parameters)
    elif F.kind == SKEW_KL:
        return _skew_kl(p, q, parameters, disagree)
    elif F.kind == SKEW_REVERSE_KL:
        return _skew_reverse_kl(p, q, parameters, False)
    elif F.kind == SKEW_REVERSE_KL_DETACHED:
        return _skew_reverse_kl(p, q, parameters, True)
    elif F.kind == TOTAL_VARIATION:
        return _total_variation(p, q)
    elif F.kind == OVERLAP:
        return _overlap(p, q)
    elif F.kind == ALPHA_BETA:
        return _alpha_beta(p, q, x, log_p, log_q, parameters)
    else:
        tl.static_assert(F.kind == MIXED)
        reverse = times(q, -x) * parameters.rest
        return times(p, x) * parameters.part + reverse, parameters.part * (q - p) + reverse
