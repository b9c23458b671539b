"""Numbers that change while training: given as tensors, one for each token, and under torch.compile."""

import pytest
import torch
from problems import Problem, assert_exact, relative
from sparse_problems import FORWARD_ONLY, TAILS, SparseProblem
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd

TOKENS = (2, 5)
VALUES = dict(temperature=1.5, soft_weight=0.7, hard_weight=0.4)


def per_token(**scales):
    """Another number for each token, some of the weights 0."""
    made = {name: torch.rand(TOKENS).double() + scale for name, scale in scales.items()}
    for name in made:
        if name != "temperature":
            made[name][0, 1] = 0.0
    return made


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("chunk_bytes", [None, 2_000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_per_token(backend, divergence, form, chunk_bytes, reduction):
    problem = Problem(student=form, teacher=form, vocab=70, shape=TOKENS)
    options = dict(
        divergence=divergence, label_smoothing=0.1, z_loss=0.01, reduction=reduction, **per_token(**VALUES)
    )
    given = problem.run(backend, chunk_bytes=chunk_bytes, **options)
    assert_exact(
        given,
        problem.oracle(**options),
        problem.plain(**options),
        dtype=torch.float32,
        projected=form == "head",
    )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("chunk_bytes", [None, 2_000])
@pytest.mark.filterwarnings("ignore:a temperature other than 1")
def test_sparse_per_token(backend, tail, form, chunk_bytes):
    problem = SparseProblem(student=form, tail=tail, vocab=70, shape=TOKENS)
    divergence = kd.ForwardKL() if tail in FORWARD_ONLY else kd.JSD(0.3)
    options = dict(divergence=divergence, temperature_squared=True, **per_token(**VALUES))
    value, grads = problem.run(backend, chunk_bytes=chunk_bytes, **options)
    truth, true_grads = problem.oracle(**options)
    assert relative(value, truth) < 3e-6
    for mine, true in zip(grads, true_grads):
        assert true.norm() > 1e-3 and relative(mine, true) < 1e-5


def test_each_row_is_the_row_with_that_number(backend):
    """The oracle alone would not see a temperature that is read from another row by both."""
    problem = Problem(vocab=70, shape=TOKENS)
    numbers = per_token(**VALUES)
    whole = problem.run(backend, reduction="none", **numbers)[0].flatten()
    for row in range(whole.numel()):
        own = {name: given.flatten()[row].item() for name, given in numbers.items()}
        assert relative(problem.run(backend, reduction="none", **own)[0].flatten()[row], whole[row]) < 1e-6


@pytest.mark.parametrize(
    "kind", [torch.tensor, lambda v: torch.tensor([v]), lambda v: torch.tensor(v).bfloat16()]
)
def test_one_number_as_a_tensor(backend, kind):
    problem = Problem(shape=TOKENS)
    tensors = {name: kind(value) for name, value in VALUES.items()}
    numbers = {name: given.item() for name, given in tensors.items()}
    for mine, expected in zip(*(problem.run(backend, **given) for given in (tensors, numbers))):
        for a, b in zip(mine, expected) if isinstance(mine, (list, tuple)) else [(mine, expected)]:
            assert relative(a, b) < 1e-6


@pytest.mark.parametrize("form", ["logits", "head"])
def test_masked_tokens_may_have_any_number(backend, form):
    problem = Problem(student=form, shape=TOKENS)
    assert (problem.labels == -100).any()
    numbers = per_token(**VALUES)
    expected = problem.run(backend, **numbers)
    for given in numbers.values():
        given[problem.labels == -100] = torch.nan
    value, grads = problem.run(backend, **numbers)
    assert torch.equal(value, expected[0]) and all(torch.equal(a, b) for a, b in zip(grads, expected[1]))


def compilations(step, values):
    """How often ``step(student, number)`` is compiled, each result being that without a compiler."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in values:
        s = torch.randn(4, 20)
        results = []
        for function in (compiled, step):
            leaf = s.clone().requires_grad_()
            loss = function(leaf, value)
            loss.backward()
            results.append((loss, leaf.grad))
        (mine, grad), (expected, true) = results
        assert relative(mine, expected) < 1e-6 and relative(grad, true) < 1e-6
    return counter.frame_count


T, Y = torch.randn(4, 20), torch.tensor([1, -100, 3, 4])


def every_number(s, v):
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]) * v
    return kd.distillation_loss(
        s, T, Y, temperature=1 + v, soft_weight=0.3 + v, hard_weight=1 - v, token_weights=weights
    )


def test_numbers_that_change_are_compiled_once_or_twice():
    inside = [0.05 * step + 0.01 for step in range(12)]
    assert compilations(every_number, inside) <= 2
    assert compilations(every_number, [*inside, 1.0, 0.5]) <= 3  # hard_weight 0 is another loss


@pytest.mark.parametrize(
    "step",
    [
        lambda s, v: kd.distillation_loss(s, T, divergence=kd.JSD(v)),
        lambda s, v: kd.distillation_loss(s, T, divergence=kd.AlphaBeta(v, 0.4), temperature=2.0),
        lambda s, v: kd.cross_entropy(s, Y, label_smoothing=v, z_loss=v),
    ],
)
def test_parameters_that_change_are_compiled_once_or_twice(step):
    assert compilations(step, [0.05 * at + 0.02 for at in range(19)]) <= 2


def test_tensors_are_compiled_once():
    def step(s, v):
        return kd.distillation_loss(s, T, Y, temperature=v + 1, soft_weight=v.mean(), hard_weight=v)

    assert compilations(step, [torch.rand(4) for _ in range(4)]) == 1
