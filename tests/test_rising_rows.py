"""Rows whose maximum comes late, early, or never: native folds a block again that turns out to have a higher logit
than all before it (csrc/cpu/fold.h)."""

import pytest
import torch
from problems import Problem, assert_exact, relative

import kdkernels as kd

#: Several blocks of any instruction set, and a rest that fills no vector.
VOCAB = 6 * 2048 + 5


def steps(*rises):
    """What is added to the thirds of a row."""
    return torch.cat(
        [torch.full((len(part),), rise) for part, rise in zip(torch.arange(VOCAB).chunk(3), rises)]
    )


def last_block(rise):
    bump = torch.zeros(VOCAB)
    bump[-20:] = rise
    return bump


NONE, FLAT = -torch.inf, torch.zeros(VOCAB)
SLOPE = torch.linspace(-60, 60, VOCAB)
#: What is added to the student's and to the teacher's random logits.
SHAPES = {
    "flat": (FLAT, FLAT),
    "by 11 in the last block": (last_block(11.0), last_block(12.0)),
    "by 30": (steps(0.0, 30.0, 60.0), steps(-30.0, 0.0, 30.0)),
    "by 1e4": (steps(-1e4, 0.0, 1e4), steps(-1e4, 0.0, 1e4)),
    "from far below": (steps(-1e30, -1e30, 0.0), steps(-1e30, -1e30, 0.0)),
    "ascending": (SLOPE, SLOPE),
    "descending": (-SLOPE, -SLOPE),
    "apart": (SLOPE / 4, -SLOPE / 4),
    "only the student": (steps(0.0, 0.0, 20.0), FLAT),
    "only the teacher": (FLAT, steps(0.0, 20.0, 0.0)),
    "first blocks empty": (steps(NONE, 0.0, 15.0), steps(NONE, 0.0, 15.0)),
    "last blocks empty": (steps(0.0, 15.0, NONE), steps(0.0, 0.0, NONE)),
    "only the teacher's empty": (FLAT, steps(NONE, 0.0, 15.0)),
}
#: Of each shape: at a low temperature one row's gradient cancels, and its digits are luck, ours and the plain formula's.
ROWS = 16
DIVERGENCES = [kd.ForwardKL(), kd.ReverseKL(), kd.JSD(0.3), kd.SkewKL(0.1), kd.AlphaBeta(0.2, 0.7)]


def problem_of(names, dtype=torch.float32, scale=2.0):
    problem = Problem(shape=(len(names),), vocab=VOCAB, ignored=0, scale=scale, dtype=dtype)
    for side, logits in enumerate((problem.student, problem.teacher)):
        shape = torch.stack([SHAPES[name][side] for name in names])
        logits[0] = (logits[0].float() + shape).to(dtype)
    problem.labels = (problem.labels % 20) + VOCAB - 20  # in the last block
    problem.labels[problem.student[0].gather(1, problem.labels[:, None])[:, 0] == NONE] = VOCAB // 2
    return problem


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.25, 3.0])
def test_every_shape(backend, divergence, dtype, temperature):
    if backend != "native" and (temperature != 1.0 or dtype != torch.float32):
        pytest.skip("the others look for the maximum first; once is enough")
    names = [name for name in SHAPES if dtype != torch.float16 or name != "from far below"]
    problem = problem_of(names * ROWS, dtype)
    options = dict(divergence=divergence, temperature=temperature, hard_weight=0.5, reduction="none")
    ours, oracle, plain = problem.run(backend, **options), problem.oracle(**options), problem.plain(**options)
    compared = 0
    for i, name in enumerate(names):
        rows = slice(i, None, len(names))
        ours_here, truth, theirs = ((value[rows], [grads[0][rows]]) for value, grads in (ours, oracle, plain))
        if not truth[0].isfinite().all() or truth[0].abs().max() > 1e20:
            continue
        compared += 1
        try:
            assert_exact(ours_here, truth, theirs, dtype=dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    assert compared >= len(names) - 3


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chunk_bytes", [60_000, 200_000])
def test_in_vocabulary_chunks(backend, name, chunk_bytes):
    """The same by a head's bias, folded a chunk at a time."""
    if backend not in ("native", "eager"):
        pytest.skip("two backends with states of their own; the rest is slow here")
    problem = Problem(student="head", teacher="head", shape=(4,), vocab=VOCAB, ignored=0)
    problem.student[2], problem.teacher[2] = SHAPES[name]
    problem.labels = torch.tensor([VOCAB // 2, VOCAB // 2 + 1, VOCAB // 2, VOCAB // 2 + 7])
    options = dict(divergence=kd.ForwardKL(), temperature=2.0, hard_weight=0.5)
    ours, oracle = problem.run(backend, chunk_bytes=chunk_bytes, **options), problem.oracle(**options)
    if oracle[0].abs() < 1e20:
        assert_exact(ours, oracle, problem.plain(**options), dtype=torch.float32, projected=True)


def test_statistics(backend):
    names = [name for name in SHAPES if "far" not in name]
    problem = problem_of(names)
    for i in range(len(names)):
        leaf, other = problem.student[0][i : i + 1], problem.teacher[0][i : i + 1]
        with kd.use_backend("reference"):
            _, truth = kd.distillation_loss(leaf.double(), other.double(), return_stats=True)
        with kd.use_backend(backend):
            _, stats = kd.distillation_loss(leaf, other, return_stats=True)
        for mine, true in zip(stats, truth):
            assert torch.isclose(mine.double(), true.double(), rtol=1e-5, atol=1e-6, equal_nan=True), names[i]


@pytest.mark.parametrize("at", [3, VOCAB // 2, VOCAB - 1])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_nan_wherever_it_is(backend, at, side, odd):
    """It and +inf are seen in the row's loss and gradient, whether the reference rises before or after it."""
    problem = problem_of(["flat", "by 30", "descending"])
    getattr(problem, side)[0][1, at] = odd
    value, (grad,) = problem.run(backend, reduction="none")
    assert value.isfinite().tolist() == [True, False, True]
    assert grad.isfinite().all(-1).tolist() == [True, False, True]


def test_nothing_but_padding(backend):
    """A row of -inf has no distribution, and leaves its neighbours alone."""
    problem = problem_of(["flat", "flat", "by 30"])
    problem.student[0][1] = problem.teacher[0][1] = -torch.inf
    value, (grad,) = problem.run(backend, reduction="none")
    truth, (true,) = problem.oracle(reduction="none")
    assert not truth[1].isfinite() and not value[1] > 0
    assert torch.allclose(value[[0, 2]].double(), truth[[0, 2]], rtol=1e-5)
    assert relative(grad[[0, 2]], true[[0, 2]]) < 1e-6
