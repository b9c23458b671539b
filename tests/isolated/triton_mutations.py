"""The suite of ``tests/isolated/triton_rows.py`` can fail: each mutation of the kernels turns it red.

``tests/test_triton.py`` runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import interpreter  # noqa: F401
import pytest
import torch
import triton
import triton.language as tl
from problems import Problem, relative

import kdkernels as kd
from kdkernels.backends.triton import divergences, kernels, rows, state


@triton.jit
def no_tail_mask(side, columns, inside, MAP: tl.constexpr, POLICY: tl.constexpr):
    """What lies beyond a row's end counts, without being touched."""
    raw = tl.load(side.row + columns, mask=inside, other=0.0)
    return rows.mapped(raw.to(tl.float32), side.map, MAP)


@triton.jit
def no_rescale(F: tl.constexpr, old, new, factor):
    return state.Rise(old * 0.0, old * 0.0 + 1.0, old * 0.0 + 1.0)


@triton.jit
def no_rescale_in_the_merge(old, new, temperature):
    return state.Rise(old * 0.0, old * 0.0 + 1.0, old * 0.0 + 1.0)


@triton.jit
def no_shift(total, decay):
    return total


@triton.jit
def no_label(side, label, span, MAP: tl.constexpr):
    return (label * 0).to(tl.float64)


@triton.jit
def no_mask(F: tl.constexpr, labels, row, offset):
    return tl.maximum((tl.load(labels + row) - offset).to(tl.int32), 0), True


@triton.jit
def no_softcap_backward(grad, z, m, MAP: tl.constexpr):
    return grad


@triton.jit
def zero_gradient(F: tl.constexpr, p, q, x, log_p, log_q, parameters, disagree):
    return divergences.terms(F, p, q, x, log_p, log_q, parameters, disagree)[0], q * 0.0


MUTATIONS = {
    "no tail mask": (rows, "_logits", no_tail_mask),
    "no rescale": (state, "lane_rise", no_rescale),
    "no rescale in the merge": (state, "row_rise", no_rescale_in_the_merge),
    "no shift of the moments": (state, "faded", no_shift),
    "no label": (rows, "_label_logit", no_label),
    "no mask": (kernels, "_label", no_mask),
    "no backward of the softcap": (rows, "_through_map", no_softcap_backward),
    "zero gradient": (rows, "terms", zero_gradient),
}


def problems(rows):
    """Logits that rise along the vocabulary, so that every block raises the maximum; a softcap."""
    torch.manual_seed(0)
    climbing = Problem(vocab=4500, shape=(1, rows), ignored=1)
    climb = torch.linspace(0, 9, 4500)
    climbing.student[0] += climb
    climbing.teacher[0] += climb.flip(0)
    capped = Problem(student="head", teacher="head", vocab=300, shape=(1, 5), ignored=1, softcap=5.0)
    return climbing, capped


def answers(problem, backend, convert):
    """Loss, mean divergence and first gradient."""
    leaves = [convert(t).requires_grad_() for t in problem.student]
    teacher = problem.side([convert(t) for t in problem.teacher])
    with kd.use_backend(backend):
        loss, stats = kd.distillation_loss(
            problem.side(leaves), teacher, problem.labels, temperature=1.5, hard_weight=0.5, return_stats=True
        )
    return loss.detach(), stats.soft, torch.autograd.grad(loss, leaves)[0]


def agrees(rows):
    ours = [answers(p, "triton", torch.clone) for p in problems(rows)]
    oracle = [answers(p, "reference", torch.Tensor.double) for p in problems(rows)]
    return all(relative(a, b) < 3e-6 for mine, true in zip(ours, oracle) for a, b in zip(mine, true))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(monkeypatch, name):
    rows = 3 if "merge" in name else 5  # few rows are cut into parts
    assert agrees(rows)
    monkeypatch.setattr(*MUTATIONS[name])
    assert not agrees(rows)
