"""Peak memory, measured: no [N, V] temporaries, and budgets that hold."""

import pytest
import torch
import torch.nn.functional as F
from peak import peak_of

import kdkernels as kd
from benchmarks.inputs import handed
from benchmarks.variants import eager_kl

N, V, H = 256, 65536, 128
UNIT = N * V * 4
SLACK = 24 * 2**20  # allocator and huge-page rounding


def gradient_of(loss, s, t):
    leaf = s.detach().requires_grad_()
    loss(leaf, t).backward()
    return leaf.grad


@pytest.mark.parametrize("divergence", [kd.ForwardKL(), kd.JSD(0.5)], ids=str)
def test_logits_cost_one_gradient(divergence):
    s, t = torch.randn(N, V), torch.randn(N, V)
    loss = lambda a, b: kd.distillation_loss(a, b, divergence=divergence, chunk_bytes=2**24)  # noqa: E731
    assert peak_of(lambda: gradient_of(loss, s, t)) <= UNIT + SLACK + 2**24
    assert peak_of(lambda: gradient_of(eager_kl, s, t)) >= 3 * UNIT, "the measurement sees nothing"


def test_inplace_costs_nothing():
    s, t = torch.randn(N, V), torch.randn(N, V)
    run = lambda: kd.kl_div(handed(s), t, inplace=True, chunk_bytes=2**24).backward()  # noqa: E731
    assert peak_of(run) <= SLACK + 2**24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_bytes", [2**25, 2**22])
def test_heads_stay_in_the_budget(dtype, chunk_bytes):
    hidden, weight, teacher, t_weight = (
        torch.randn(*shape).to(dtype) for shape in ((N, H), (V, H), (N, H), (V, H))
    )
    hidden.requires_grad_(), weight.requires_grad_()

    def run():
        hidden.grad = weight.grad = None
        student = kd.LinearHead(hidden, weight)
        kd.kl_div(student, kd.LinearHead(teacher, t_weight), chunk_bytes=chunk_bytes).backward()

    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    accumulator = weight.numel() * 4 if dtype == torch.bfloat16 else 0
    assert peak_of(run) <= gradients + accumulator + chunk_bytes + SLACK
    assert UNIT > chunk_bytes + SLACK, "the logits would have fitted anyway"


def test_plain_heads_do_not_fit():
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H)
    teacher = torch.randn(N, V)
    run = lambda: eager_kl(F.linear(hidden, weight), teacher).backward()  # noqa: E731
    assert peak_of(run) >= 2 * UNIT
