"""Every divergence against mpmath's 60 digits: value and gradient, at its limits and where models disagree.

The truth is the textbook formula. Neither it nor its precision is shared with anything in the package.
"""

import mpmath as mp
import pytest
import torch

import kdkernels as kd

LIMITS = [
    (0.3, -(0.1 + 0.2)),
    (0.1 + 0.2, -0.3),
    (1e-12, -1e-12),
    (0.5, -0.5 + 1e-6),
    (0.5, -0.5),
    (0.0, 0.0),
    (1e-4, 1e-4),
    (1e-3, 0.7),
    (1e-6, 0.7),
    (1e-9, 0.7),
    (1e-17, 0.5),
    (0.0, 0.5),
    (0.7, 1e-6),
    (0.7, 1e-9),
    (0.7, 1e-40),
    (0.5, 0.0),
    (1 - 1e-7, 1e-7),
    (0.2, 0.7),
    (1.0, 1.0),
    (-1.0, 0.5),
    (-0.5, 1.0),
    (-0.3, -0.4),
    (2.0, -1.0),
]
SMALL = [
    kd.JSD(1e-6),
    kd.JSD(1 - 1e-6),
    kd.SkewKL(1e-6),
    kd.SkewKL(0.5),
    kd.SkewReverseKL(1e-5),
    kd.SkewReverseKL(1e-6, detach_mixture=True),
    kd.Overlap(),
]
DIVERGENCES = [*(kd.AlphaBeta(a, b) for a, b in LIMITS), *SMALL]


def log_over_mixture(own, other, share):
    return mp.log(own / (share * own + (1 - share) * other))


def terms(divergence, p, q):
    """phi(p, q) and q d phi / d q."""
    if isinstance(divergence, kd.JSD):
        beta = mp.mpf(divergence.beta)
        reverse = (1 - beta) * q * log_over_mixture(q, p, 1 - beta)
        return beta * p * log_over_mixture(p, q, beta) + reverse, reverse
    if isinstance(divergence, kd.SkewKL):
        alpha = mp.mpf(divergence.alpha)
        return p * log_over_mixture(p, q, alpha), -(1 - alpha) * p * q / (alpha * p + (1 - alpha) * q)
    if isinstance(divergence, kd.SkewReverseKL):
        alpha = mp.mpf(divergence.alpha)
        phi = q * log_over_mixture(q, p, alpha)
        return phi, phi + q - (
            0 if divergence.detach_mixture else alpha * q * q / (alpha * q + (1 - alpha) * p)
        )
    if isinstance(divergence, kd.Overlap):
        return min(p, q), q if q < p else mp.mpf(0)
    a, b, x = mp.mpf(divergence.alpha), mp.mpf(divergence.beta), mp.log(p / q)
    s = a + b
    q_psi = (q**s - p**a * q**b) / a if a else -(q**s) * x
    if not a and not b:
        return x**2 / 2, q_psi
    if not b:
        return (a * x * p**a - p**a + q**a) / a**2, q_psi
    if not a:
        return (-b * x * q**b - q**b + p**b) / b**2, q_psi
    if not s:
        return (mp.exp(a * x) - 1 - a * x) / a**2, q_psi
    return (a / s * p**s + b / s * q**s - p**a * q**b) / (a * b), q_psi


def softmax(logits):
    e = [mp.exp(mp.mpf(z)) for z in logits]
    return [each / mp.fsum(e) for each in e]


def truth(divergence, student, teacher):
    """Value and gradient of each row, rounded to fp64."""
    values, grads = [], []
    with mp.workdps(60):
        for s, t in zip(student.tolist(), teacher.tolist()):
            p, q = softmax(t), softmax(s)
            phi, q_psi = zip(*(terms(divergence, *pair) for pair in zip(p, q)))
            slope = mp.fsum(q_psi)
            values.append(float(mp.fsum(phi)))
            grads.append([float(mine - each * slope) for mine, each in zip(q_psi, q)])
    return torch.tensor(values, dtype=torch.float64), torch.tensor(grads, dtype=torch.float64)


def rows():
    """Models that are apart, that nearly agree, and of which one is sure; the last two share their first token."""
    student, teacher = 2 * torch.randn(2, 6, 12)
    teacher[1] = student[1] + 1e-3 * torch.randn(12)
    student[2] *= 6
    student[3], teacher[3] = 0.1 * student[3], 6 * teacher[3]
    student[4, 3] = teacher[4, 3] = 6
    student[5, 3], teacher[5, 3] = 8, 2
    return student, teacher


def made(student, teacher, divergence, dtype):
    leaf = student.to(dtype).requires_grad_()
    value = kd.distillation_loss(leaf, teacher.to(dtype), divergence=divergence, reduction="none")
    return value.detach().double(), torch.autograd.grad(value.sum(), leaf)[0].double()


def errors(mine, true):
    """Of each row's value and gradient, relative to the truth."""
    return (mine[0] / true[0] - 1).abs(), (mine[1] - true[1]).norm(dim=-1) / true[1].norm(dim=-1)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", ["reference", "eager"])
def test_in_fp64(name, divergence):
    student, teacher = rows()
    with kd.use_backend(name):
        value, grad = errors(
            made(student, teacher, divergence, torch.float64), truth(divergence, student, teacher)
        )
    assert value.max() < 1e-11 and grad.max() < 1e-11, (value, grad)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_in_fp32(backend, divergence):
    """Between models that agree within 1e-3 the rounding of log p and log q is up to 1e-3 of what they differ by."""
    student, teacher = rows()
    value, grad = errors(
        made(student, teacher, divergence, torch.float32), truth(divergence, student, teacher)
    )
    near = torch.arange(len(value)) == 1
    assert value[~near].max() < 1e-5 and grad[~near].max() < 1e-5, (value, grad)
    assert value[near] < 2e-3 and grad[near] < 2e-3, (value, grad)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", ["reference", "eager"])
def test_a_tie_among_others(name, divergence):
    """p == q in one column to the last bit, and not in the others."""
    student = torch.tensor([[0.0, 1.0, -2.0, 0.5]])
    teacher = torch.tensor([[0.0, 0.5, -2.0, 1.0]])
    with kd.use_backend(name):
        value, grad = errors(
            made(student, teacher, divergence, torch.float64), truth(divergence, student, teacher)
        )
    assert value.max() < 1e-13 and grad.max() < 1e-13, (value, grad)


#: What mpmath says of two rows; in fp32 the formula as it is written gives 0, 8.54 and 2.49 for the first three.
PINNED = {
    (0.3, -(0.1 + 0.2)): 288.080,
    (1e-6, 0.7): 8.65935,
    (1e-9, 0.7): 8.65939,
    (1e-17, 0.5): 16.8297,
    (0.7, 1e-9): 10.3855,
}


@pytest.mark.parametrize("limit", PINNED, ids=str)
def test_pinned(backend, limit):
    student, teacher = (2 * torch.randn(2, 40) for _ in range(2))
    for name in (backend, "reference"):
        with kd.use_backend(name):
            value = kd.distillation_loss(student, teacher, divergence=kd.AlphaBeta(*limit)).item()
        assert value == pytest.approx(PINNED[limit], rel=1e-5)
