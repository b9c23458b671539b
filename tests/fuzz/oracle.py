"""The truth about a call: textbook formulas and gradients derived by hand, in numpy's extended precision.

Nothing here comes from kdkernels, nor from torch. Logits are ``[N, V]``; the gradient of a row's loss
sum_j phi(p_j, q_j) for z is q_j (psi_j - sum_k q_k psi_k) / T with psi = d phi / d q. A divergence is
given as (phi, q * psi), pointwise, so that nothing is divided by a q that is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

Array = np.ndarray
WIDE = np.longdouble


def wide(a) -> Array:
    return np.asarray(a, dtype=WIDE)


def _log(x: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(x)


def _times(weight: Array, x: Array) -> Array:
    """weight * x, where nothing times anything is nothing."""
    with np.errstate(invalid="ignore"):
        return np.where(weight == 0, 0, weight * x)


def logsumexp(z: Array) -> Array:
    top = z.max(-1, keepdims=True)
    shift = np.where(np.isneginf(top), 0, top)
    return _log(np.exp(z - shift).sum(-1)) + shift[..., 0]


def log_softmax(z: Array) -> Array:
    return z - logsumexp(z)[..., None]


def _ratio(log_x: Array, log_y: Array) -> Array:
    """log(x / y), 0 where both are zero."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(log_x) & np.isneginf(log_y), 0, log_x - log_y)


def _forward(lp, lq):
    p = np.exp(lp)
    return _times(p, _ratio(lp, lq)), -p


def _reverse(lp, lq):
    q = np.exp(lq)
    return _times(q, _ratio(lq, lp)), _times(q, _ratio(lq, lp))


def _blend(share_of_p: float, lp, lq):
    p, q = np.exp(lp), np.exp(lq)
    return _log(share_of_p * p + (1 - WIDE(share_of_p)) * q)


def _jsd(lp, lq, beta):
    p, q, lm = np.exp(lp), np.exp(lq), _blend(beta, lp, lq)
    value = beta * _times(p, _ratio(lp, lm)) + (1 - WIDE(beta)) * _times(q, _ratio(lq, lm))
    return value, (1 - WIDE(beta)) * _times(q, _ratio(lq, lm))


def _skew(lp, lq, alpha):
    p, lm = np.exp(lp), _blend(alpha, lp, lq)
    return _times(p, _ratio(lp, lm)), -(1 - WIDE(alpha)) * _times(np.exp(lq), np.exp(_ratio(lp, lm)))


def _skew_reverse(lp, lq, alpha, detached):
    q, lm = np.exp(lq), _blend(1 - WIDE(alpha), lp, lq)
    own = _ratio(lq, lm)
    inside = 0 if detached else alpha * np.exp(own)
    return _times(q, own), _times(q, own - inside)


def _total_variation(lp, lq):
    p, q = np.exp(lp), np.exp(lq)
    return np.abs(p - q) / 2, q * np.sign(q - p) / 2


def _overlap(lp, lq):
    p, q = np.exp(lp), np.exp(lq)
    return np.minimum(p, q), np.where(q < p, q, 0)


def _alpha_beta(lp, lq, a, b):
    """-1/(ab) [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]; a, b and a + b far from 0 or exactly 0."""
    if a == 0 and b == 0:
        x = _ratio(lp, lq)
        return x * x / 2, -x
    power = lambda u, v: np.exp(_times(WIDE(u), lp) + _times(WIDE(v), lq))  # noqa: E731
    s = WIDE(a) + WIDE(b)
    p_s, q_s, x = power(s, 0), power(0, s), _ratio(lp, lq)
    slope = _times(q_s, -x) if a == 0 else (q_s - power(a, b)) / WIDE(a)
    if a == 0:
        return (_times(q_s, -b * x) - q_s + p_s) / WIDE(b) ** 2, slope
    if b == 0:
        return (_times(p_s, a * x) - p_s + q_s) / WIDE(a) ** 2, slope
    if a + b == 0:
        return (np.expm1(a * x) - a * x) / WIDE(a) ** 2, slope
    return -(power(a, b) - a / s * p_s - b / s * q_s) / (WIDE(a) * WIDE(b)), slope


def _mixed(lp, lq, weight):
    (forward, to_forward), (reverse, to_reverse) = _forward(lp, lq), _reverse(lp, lq)
    rest = 1 - WIDE(weight)
    return weight * forward + rest * reverse, weight * to_forward + rest * to_reverse


def _ends(name: str, parameters: tuple) -> tuple[str, tuple]:
    """JSD's and the skewed divergences' ends stand for the KL that they tend to."""
    ends = {
        ("jsd", 0): "forward",
        ("jsd", 1): "reverse",
        ("skew", 0): "forward",
        ("skew_reverse", 0): "reverse",
    }
    return (
        (ends[name, parameters[0]], ())
        if parameters and (name, parameters[0]) in ends
        else (name, parameters)
    )


DIVERGENCES = {
    "forward": _forward,
    "reverse": _reverse,
    "jsd": _jsd,
    "skew": _skew,
    "skew_reverse": _skew_reverse,
    "total_variation": _total_variation,
    "overlap": _overlap,
    "alpha_beta": _alpha_beta,
    "mixed": _mixed,
}


def divergence_rows(student: Array, teacher: Array, divergence: tuple, temperature: float):
    """(D [N], dD / d student [N, V])"""
    name, *parameters = divergence
    if name == "sum":
        each = [(WIDE(w), divergence_rows(student, teacher, one, temperature)) for w, one in parameters]
        return tuple(sum(w * part[i] for w, part in each) for i in range(2))
    name, parameters = _ends(name, tuple(parameters))
    lp, lq = log_softmax(teacher / WIDE(temperature)), log_softmax(student / WIDE(temperature))
    phi, q_psi = DIVERGENCES[name](lp, lq, *parameters)
    padding = np.isneginf(lp) & np.isneginf(lq)
    phi, q_psi = np.where(padding, 0, phi), np.where(padding, 0, q_psi)
    slope = q_psi - _times(np.exp(lq), q_psi.sum(-1, keepdims=True))
    return phi.sum(-1), slope / WIDE(temperature)


@dataclass
class Head:
    """Hidden states [N, H] and the lm_head that makes logits of them."""

    hidden: Array
    weight: Array
    bias: Array | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self) -> Array:
        z = wide(self.hidden) @ wide(self.weight).T
        if self.bias is not None:
            z = z + wide(self.bias)
        z = z * WIDE(self.logit_scale)
        return self.softcap * np.tanh(z / WIDE(self.softcap)) if self.softcap else z

    def backward(self, grad: Array) -> list[Array]:
        if self.softcap:
            grad = _times(grad, 1 - (self.logits() / WIDE(self.softcap)) ** 2)
        grad = grad * WIDE(self.logit_scale)
        grads = [grad @ wide(self.weight), grad.T @ wide(self.hidden)]
        return grads if self.bias is None else [*grads, grad.sum(0)]


@dataclass
class Sparse:
    """ids [N, K], the weights t (or their logarithms) of them, which slots are given, and the tail."""

    ids: Array
    values: Array
    linear: bool
    given: Array
    tail: str

    def weights(self, vocab: int) -> Array:
        """t over the whole vocabulary; what is stored twice adds up."""
        t = np.zeros((self.ids.shape[0], vocab), WIDE)
        values = wide(self.values) if self.linear else np.exp(wide(self.values))
        for row, slot in zip(*np.nonzero(self.given)):
            t[row, self.ids[row, slot]] += values[row, slot]
        return t


def sparse_rows(z: Array, target: Sparse, divergence: tuple, temperature: float):
    """(soft term [N], its gradient [N, V]); a token of which nothing is stored has none."""
    value, grad = np.zeros(len(z), WIDE), np.zeros_like(z)
    for row, t in enumerate(target.weights(z.shape[1])):
        if (t > 0).any():
            value[row], grad[row] = _sparse_row(z[row], t, target.tail, divergence, temperature)
    return value, grad


def _sparse_row(z: Array, t: Array, tail: str, divergence: tuple, temperature: float):
    stored, grad = t > 0, np.zeros_like(z)
    if tail in ("truncate", "renormalize"):
        p = t if tail == "truncate" else t ** (1 / WIDE(temperature)) / (t ** (1 / WIDE(temperature))).sum()
        log_q = log_softmax(z / WIDE(temperature))
        value = _times(p, _ratio(_log(p), log_q)).sum()
        return value, (p.sum() * np.exp(log_q) - p) / WIDE(temperature)
    ours, theirs = z[stored], _log(t[stored])
    if tail == "bucket" and not stored.all():
        rest = logsumexp(z[~stored])
        ours, theirs = np.append(ours, rest), np.append(theirs, _log(1 - t.sum()))
    value, slope = divergence_rows(ours[None], theirs[None], divergence, temperature)
    grad[stored] = slope[0, : stored.sum()]
    if tail == "bucket" and not stored.all():
        grad[~stored] = slope[0, -1] * np.exp(z[~stored] - rest)
    return value[0], grad


def cross_entropy_rows(z: Array, labels: Array, label_smoothing: float = 0.0, z_loss: float = 0.0):
    """(cross entropy [N], its gradient [N, V]) at temperature 1."""
    lse, rows = logsumexp(z), np.arange(len(z))
    smoothed = WIDE(label_smoothing) / z.shape[1]
    value = lse - (1 - WIDE(label_smoothing)) * z[rows, labels] + WIDE(z_loss) * lse**2
    grad = np.exp(z - lse[:, None]) * (1 + 2 * WIDE(z_loss) * lse)[:, None]
    grad[rows, labels] -= 1 - WIDE(label_smoothing)
    if label_smoothing:
        value, grad = value - smoothed * z.sum(-1), grad - smoothed
    return value, grad


@dataclass
class Options:
    """What the losses of a call are made of; ``live`` [N] is False where a token is masked."""

    live: Array
    token_weights: Array
    divisor: float
    divergence: tuple = ("forward",)
    temperature: float = 1.0
    soft_weight: float = 1.0
    hard_weight: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    entropy_weight: float = 0.0
    ids: Array | None = None  # [N, K], -1: none
    id_weights: Array | None = None
    arriving: Array = field(default_factory=lambda: np.ones(1, WIDE))


def entropy_rows(z: Array, temperature: float) -> Array:
    log_q = log_softmax(z / WIDE(temperature))
    return -_times(np.exp(log_q), log_q).sum(-1)


def entropy_slope(z: Array, temperature: float) -> Array:
    log_q, entropy = log_softmax(z / WIDE(temperature)), entropy_rows(z, temperature)
    return -_times(np.exp(log_q), log_q + entropy[:, None]) / WIDE(temperature)


def log_prob_rows(z: Array, ids: Array, weights: Array, temperature: float):
    """(-sum of weights times log-probabilities at the ids [N], its gradient [N, V])"""
    log_q = log_softmax(z / WIDE(temperature))
    value, grad = np.zeros(len(z), WIDE), np.zeros_like(log_q)
    for row, slot in zip(*np.nonzero((ids >= 0) & (weights != 0))):
        weight = WIDE(weights[row, slot])
        value[row] -= weight * log_q[row, ids[row, slot]]
        grad[row] += weight * np.exp(log_q[row])
        grad[row, ids[row, slot]] -= weight
    return value, grad / WIDE(temperature)


def terms(student, weights: Array) -> list[Array]:
    """The size of what a gradient's terms add up to before they cancel: of weight * q in each logit."""
    z = student.logits() if isinstance(student, Head) else wide(student)
    q = _times(weights[:, None], np.exp(log_softmax(z)))
    if not isinstance(student, Head):
        return [q]
    hidden = np.where(weights[:, None] == 0, 0, abs(student.hidden))
    return Head(hidden, abs(student.weight), student.bias, abs(student.logit_scale)).backward(q)


def losses(student, teacher, labels: Array | None, options: Options):
    """(loss of each token [N], gradient for the student's tensors); logits are Arrays or Heads.

    The loss is what the reduction adds up, the gradient that of sum(arriving * loss).
    """
    z = student.logits() if isinstance(student, Head) else wide(student)
    value, grad = np.zeros(len(z), WIDE), np.zeros_like(z)
    if teacher is not None and options.soft_weight:
        args = options.divergence, options.temperature
        if isinstance(teacher, Sparse):
            soft, slope = sparse_rows(z, teacher, *args)
        else:
            soft, slope = divergence_rows(
                z, teacher.logits() if isinstance(teacher, Head) else wide(teacher), *args
            )
        value, grad = value + options.soft_weight * soft, grad + options.soft_weight * slope
    if options.ids is not None:
        value, grad = log_prob_rows(z, options.ids, options.id_weights, options.temperature)
    if options.entropy_weight:
        value = value + options.entropy_weight * entropy_rows(z, options.temperature)
        grad = grad + options.entropy_weight * entropy_slope(z, options.temperature)
    if options.hard_weight:
        safe = np.where(options.live, labels, 0)
        hard, slope = cross_entropy_rows(z, safe, options.label_smoothing, options.z_loss)
        value, grad = value + options.hard_weight * hard, grad + options.hard_weight * slope
    weights = np.where(options.live, wide(options.token_weights) / WIDE(options.divisor), 0)
    if isinstance(student, Head):  # what does not count may be NaN, and stays out of the products
        student = replace(student, hidden=np.where(weights[:, None] == 0, 0, student.hidden))
    grad = _times((weights * options.arriving)[:, None], grad)
    return _times(weights, value), student.backward(grad) if isinstance(student, Head) else [grad]
