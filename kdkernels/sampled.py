"""The reverse KL from tokens that a student drew: what on-policy distillation and policies use instead of all of V."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import check_tensor, number, shown
from .core import autograd
from .core.transforms import refuse_transforms

Estimator = Literal["k1", "k2", "k3"]
Gradient = Literal["none", "value", "score", "ratio"]


def sampled_kl(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    *,
    estimator: Estimator = "k1",
    gradient: Gradient = "score",
    sampling_log_probs: Tensor | None = None,
    clip_ratio: tuple[float, float] | None = None,
) -> Tensor:
    """KL(student || teacher) estimated from each token that the student drew, by Schulman's k1, k2 or k3.

    With q the student's and p the teacher's probability of the drawn token, and r = log(p / q)
    (J. Schulman, "Approximating KL Divergence", 2020):

    =========  ==============  =================================  ==========================================
    estimator  value           its mean over q                    its spread
    =========  ==============  =================================  ==========================================
    "k1"       -r              KL(q, p)                           large: the sign differs from draw to draw
    "k2"       r^2 / 2         not KL(q, p), but near it for      small
                               p near q
    "k3"       e^r - 1 - r     KL(q, p), where p has no mass      small for p near q; without bound where p is
                               that q lacks; never negative       much above q, since e^r is p / q
    =========  ==============  =================================  ==========================================

    The value is not what is differentiated: ``gradient`` says what arrives at ``student_log_probs``, and through
    them, as d log q, at the student. Means are over draws from q:

    =========  ==============================  ===========================================================
    gradient   d(result) / d log q             its mean, as a gradient for the student
    =========  ==============================  ===========================================================
    "none"     0                               0
    "value"    the estimator's own: 1 for k1,  k1: 0, nothing is learned. k2: that of KL(q, p). k3: that of
               -r for k2, 1 - e^r for k3       KL(p, q), the forward KL
    "score"    the estimate, a constant        k1: that of KL(q, p). k2: of no divergence. k3: that of
               (REINFORCE)                     KL(q, p) less that of KL(p, q)
    "ratio"    the estimate times q / q_old    "score"'s, where q_old drew the tokens
    =========  ==============================  ===========================================================

    With "ratio" the value carries q / q_old as well, so that its mean over draws from q_old is the estimate's over q.
    ``clip_ratio=(low, high)`` clips q / q_old in both: less noise, and means that are no longer these. A token that
    is clipped keeps its gradient, which PPO's clipping would take away.

    Args:
        student_log_probs: floating ``[...]``, log q of the drawn tokens; :func:`kdkernels.token_log_probs` makes them.
        teacher_log_probs: the same of the teacher, in any floating dtype; a constant.
        estimator: of the first table above. The defaults of this and the next have the value and the gradient of
            KL(q, p) in the mean; so has "k2" with "value", but for its value.
        gradient: of the second table.
        sampling_log_probs: log q_old of the drawn tokens, a constant; for "ratio", and only there.
        clip_ratio: 0 <= low <= 1 <= high, bounds of q / q_old; None clips nothing.

    Returns:
        One number per token ``[...]``, in fp32 (fp64 for an fp64 student). What is beyond its dtype is an infinity
        (k3 in fp32 at r > 88), and what is beyond it in the gradient the dtype's largest number. Where both
        log-probabilities are -inf, r is 0. NaN comes only from NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, an unknown estimator or gradient, sampling_log_probs
            or clip_ratio without "ratio", "ratio" without sampling_log_probs.
        RuntimeError: forward-mode derivatives, torch.func, and ``create_graph=True``, but for "none".

    >>> student = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> each = sampled_kl(student, torch.tensor([-1.5, -1.0]))
    >>> each.sum().backward()
    >>> each.tolist(), student.grad.tolist()
    ([0.5, -1.0], [0.5, -1.0])
    """
    _check_choice("estimator", estimator, Estimator)
    _check_choice("gradient", gradient, Gradient)
    if (gradient == "ratio") != (sampling_log_probs is not None):
        raise ValueError(
            'gradient="ratio" needs sampling_log_probs, those that drew the tokens'
            if sampling_log_probs is None
            else f'sampling_log_probs belong to gradient="ratio", but gradient={gradient!r}'
        )
    others = {"teacher_log_probs": teacher_log_probs}
    if sampling_log_probs is not None:
        others["sampling_log_probs"] = sampling_log_probs
    _check_together(student_log_probs, others)
    bounds = _checked_clip(clip_ratio, gradient)
    dtype = torch.promote_types(student_log_probs.dtype, torch.float32)
    log_q = student_log_probs.detach().double()
    r = _log_ratio(teacher_log_probs, log_q)
    value = _estimate(r, estimator)
    slope = _slope(r, estimator) if gradient == "value" else value
    if sampling_log_probs is not None:
        value = slope = _times(_log_ratio(log_q, sampling_log_probs).exp().clamp(*bounds), value)
    value = value.to(dtype)
    if gradient == "none":
        return value
    refuse_transforms([student_log_probs], has_reference=False)
    largest = torch.finfo(student_log_probs.dtype).max
    slope = slope.clamp(-largest, largest).to(student_log_probs.dtype)
    return autograd.attach_one(value, student_log_probs.unsqueeze(-1), slope.unsqueeze(-1))


def _log_ratio(of: Tensor, to: Tensor) -> Tensor:
    """In fp64, 0 where both logarithms are -inf."""
    of, to = of.detach().double(), to.detach().double()
    return torch.where(of.isneginf() & to.isneginf(), 0.0, of - to)


def _estimate(r: Tensor, estimator: Estimator) -> Tensor:
    if estimator == "k1":
        return -r
    return 0.5 * r.square() if estimator == "k2" else _k3(r)


def _k3(r: Tensor) -> Tensor:
    """e^r - 1 - r, by its series where the difference would lose digits."""
    near = r.abs() < 0.5
    x = torch.where(near, r, 0.0)
    series = torch.zeros_like(x)
    for n in range(15, 1, -1):  # 0.5^14 / 16! is nothing in fp64
        series = series * x + 1 / math.factorial(n)
    return torch.where(near, x * x * series, torch.where(r == torch.inf, r, r.expm1() - r))


def _slope(r: Tensor, estimator: Estimator) -> Tensor:
    """The estimate's derivative for log q."""
    if estimator == "k1":
        return torch.ones_like(r)
    return -r if estimator == "k2" else -r.expm1()


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a * b with 0 * inf = 0."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def _check_choice(name: str, given: Any, choices: Any) -> None:
    if given not in choices.__args__:
        raise ValueError(f"unknown {name} {shown(given)}; there are {', '.join(choices.__args__)}")


def _check_together(student: Tensor, others: dict[str, Tensor]) -> None:
    for name, given in {"student_log_probs": student, **others}.items():
        check_tensor(name, given)
        if not given.is_floating_point():
            raise ValueError(f"{name} must be floating, got {given.dtype}")
        if given.shape != student.shape:
            raise ValueError(f"{name} are {tuple(given.shape)}, student_log_probs {tuple(student.shape)}")
        if given.device != student.device:
            raise ValueError(f"{name} are on {given.device}, student_log_probs on {student.device}")


def _checked_clip(given: Any, gradient: Gradient) -> tuple[float, float]:
    if given is None:
        return 0.0, math.inf
    if gradient != "ratio":
        raise ValueError(f'clip_ratio belongs to gradient="ratio", but gradient={gradient!r}')
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"clip_ratio must be a pair (low, high), got {shown(given)}")
    low, high = (number("clip_ratio", bound) for bound in given)
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"clip_ratio=({low}, {high}) must be 0 <= low <= 1 <= high")
    return low, high
