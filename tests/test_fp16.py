"""fp16 logits, whose gradient waits for the reduction's divisor and a loss scale in a dtype that ends at 65504 and loses
digits below 6e-5."""

import pytest
import torch
from problems import relative

import kdkernels as kd

TOKENS, VOCAB = 16, 4096
LABELS = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(0))
#: What GradScaler multiplies a loss by at first.
LOSS_SCALE = 2.0**16


def weights(value):
    """Each token has its own power of ten around ``value``."""
    return value * 10.0 ** (torch.arange(TOKENS) % 3 - 1)


LOSSES = {
    "T = 20": lambda s, t: kd.kl_div(s, t, temperature=20.0),
    "JSD, T = 20": lambda s, t: kd.js_divergence(s, t, temperature=20.0),
    "T = 1 to 30": lambda s, t: kd.kl_div(s, t, temperature=torch.linspace(1, 30, TOKENS)),
    "T = 1000": lambda s, t: kd.kl_div(s, t, temperature=1000.0, temperature_squared=True),
    "little of the teacher": lambda s, t: kd.distillation_loss(
        s, t, divergence=kd.JSD(1e-3), soft_weight=1e3
    ),
    "light": lambda s, t: (
        kd.distillation_loss(s, t, divergence=kd.ReverseKL(), token_weights=weights(1e-5)) * 1e5
    ),
    "heavy": lambda s, t: kd.kl_div(s, t, token_weights=weights(1e6)) * 1e-6,
    "classes": lambda s, t: (
        kd.cross_entropy(s, LABELS, class_weights=torch.full((VOCAB,), 1e6), reduction="sum") * 1e-7
    ),
    "terms": lambda s, t: (
        kd.distillation_loss(
            s, t, LABELS, soft_weight=1e-4, hard_weight=1e-6, z_loss=1e-3, entropy_weight=1e-5
        )
        * 1e4
    ),
    "entropy": lambda s, t: kd.distillation_loss(
        s, t, soft_weight=0.0, entropy_weight=-1.0, temperature=50.0
    ),
    "top 8": lambda s, t: kd.kl_div(s, kd.top_k_target(t, 8, tail="conditional"), temperature=20.0),
    "some tokens": lambda s, t: kd.kl_div(s, t, temperature=20.0, mask=LABELS % 3 > 0),
}


def gradients(loss, backend, dtype, logits, scale=LOSS_SCALE):
    leaves = [t.to(dtype).requires_grad_() for t in logits]
    with kd.use_backend(backend):
        value = loss(*leaves)
    (value.sum() * scale).backward()
    return value.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("loss", LOSSES)
def test_keeps_its_digits(backend, loss):
    logits = torch.randn(2, TOKENS, VOCAB).half()
    _, (oracle,) = gradients(LOSSES[loss], "reference", torch.float64, logits)
    _, (grad,) = gradients(LOSSES[loss], backend, torch.float16, logits)
    assert relative(grad, oracle) < 6e-4


@pytest.mark.parametrize(
    "options", [{"inplace": True}, {"chunk_bytes": 4000}, {"reduction": "none"}], ids=lambda o: next(iter(o))
)
def test_however_it_is_made(backend, options):
    def loss(student, teacher):
        return kd.kl_div(student * 1, teacher, temperature=20.0, **options).mean()

    logits = torch.randn(2, TOKENS, VOCAB).half()
    expected, (oracle,) = gradients(LOSSES["T = 20"], "reference", torch.float64, logits)
    value, (grad,) = gradients(loss, backend, torch.float16, logits)
    assert relative(value, expected) < 1e-4 and relative(grad, oracle) < 6e-4


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_powers_of_probabilities(backend, weight):
    """Their gradients may be thousands, whatever the weights."""

    def loss(student, teacher):
        options = dict(divergence=kd.AlphaBeta(0.5, -0.5), soft_weight=weight, reduction="none")
        return kd.distillation_loss(2 * student, teacher, **options) / (64 * weight)

    logits = torch.randn(2, TOKENS, VOCAB).half()
    _, (oracle,) = gradients(loss, "reference", torch.float64, logits, scale=1)
    _, (grad,) = gradients(loss, backend, torch.float16, logits, scale=1)
    of_a_token = 64 / 2 * oracle.abs().max()
    assert 2000 < of_a_token < 60000 and relative(grad, oracle) < 3e-3


#: Options with weights, and what undoes them in the student's loss and the teacher's.
CODISTILLATION = {
    "heavy tokens": (dict(temperature=20.0, token_weights=weights(1e6)), 1e-6, 1e-6),
    "light student": (dict(soft_weight=1e-5, hard_weight=0.0), 1e5, 1.0),
}


@pytest.mark.parametrize("case", CODISTILLATION)
def test_both_models_of_a_codistillation(backend, case):
    options, student_scale, teacher_scale = CODISTILLATION[case]

    def loss(student, teacher):
        both = kd.codistillation_loss(student, teacher, LABELS, **options)
        return both.student * student_scale + both.teacher * teacher_scale

    logits = torch.randn(2, TOKENS, VOCAB).half()
    _, oracle = gradients(loss, "reference", torch.float64, logits)
    _, grads = gradients(loss, backend, torch.float16, logits)
    assert len(grads) == 2 and all(relative(a, b) < 6e-4 for a, b in zip(grads, oracle))
