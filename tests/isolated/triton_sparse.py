"""Triton's passes over rows with sparse targets against the fp64 oracle.

``tests/test_triton.py`` runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import interpreter  # noqa: F401
import pytest
import torch
import triton
from problems import assert_exact, relative
from sparse_problems import FORWARD_ONLY, TAILS, SparseProblem
from test_far_logits import test_a_teacher_that_learns, test_losses  # noqa: F401
from test_sparse import (  # noqa: F401
    conforms,
    test_bucket_where_both_models_are_masked_is_dense,
    test_bucket_where_only_the_student_is_masked,
    test_hard_term_where_the_rest_is_nothing,
    test_ties_at_a_temperature,
)
from test_sparse import test_logit_maps as logit_maps
from test_sparse_laws import (  # noqa: F401
    test_impossible_stored_token_is_infinite,
    test_masked_garbage_stays_out,
    test_nan_is_not_hidden,
    test_tokens_without_slots_count_and_cost_nothing,
)

import kdkernels as kd
from kdkernels.backends.triton import rows

pytestmark = pytest.mark.filterwarnings("ignore:a temperature other")
SMALL = dict(shape=(1, 4), ignored=1)
FULL = dict(temperature=2.0, hard_weight=0.5, label_smoothing=0.1, z_loss=0.01)


@pytest.fixture
def backend():
    with kd.use_backend("triton"):
        yield "triton"


@pytest.mark.parametrize(
    "hard_weight,dtype",
    [
        (0.0, torch.float32),
        (0.5, torch.bfloat16),
        pytest.param(0.0, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(0.5, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("tail", TAILS)
def test_tails(backend, tail, hard_weight, dtype):
    problem = SparseProblem(tail=tail, dtype=dtype, vocab=1500, shape=(1, 6), ignored=1)
    options = dict(temperature=1.5, hard_weight=hard_weight)
    if tail not in FORWARD_ONLY:
        options["divergence"] = kd.JSD(0.3)
    options.setdefault("divergence", kd.ForwardKL())
    assert_exact(
        problem.run(backend, **options), problem.oracle(**options), problem.plain(**options), dtype=dtype
    )


@pytest.mark.parametrize("chunk_bytes", [30_000, pytest.param(400_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tail", TAILS)
def test_budgets(backend, tail, chunk_bytes):
    problem = SparseProblem(student="head", tail=tail, vocab=700, logit_scale=0.5, softcap=5.0, **SMALL)
    conforms(problem, backend, chunk_bytes=chunk_bytes, **FULL)


@pytest.mark.parametrize("vocab,slots", [(2, 1), (127, 120), (2049, 64), (9000, 40)])
@pytest.mark.parametrize("tail", ["bucket", "truncate"])
def test_widths(backend, tail, vocab, slots):
    problem = SparseProblem(tail=tail, vocab=vocab, slots=slots, **SMALL)
    conforms(problem, backend, hard_weight=0.5, label_smoothing=0.1)


def test_logit_maps(backend):
    logit_maps(backend, "bucket", dict(softcap=4.0, logit_scale=-2.0))


def test_whole_vocabulary_is_stored(backend):
    problem = SparseProblem(vocab=40, slots=40, messy=False, shape=(1, 6), ignored=1)
    conforms(problem, backend, hard_weight=0.5)


@pytest.mark.parametrize("gap", [20.0, 200.0])
def test_stored_mass_near_one(backend, gap):
    """Stored logits far above the rest, which keeps its digits."""
    student = torch.randn(3, 3000)
    student[:, 5:9] += gap
    ids = torch.tensor([[5, 6, 7, 8]] * 3)
    target = kd.SparseTarget(ids, logprobs=torch.tensor([[-2.0, -1.0, -1.5, -1.9]] * 3), tail="bucket")

    def run(name, convert):
        leaf = convert(student).requires_grad_()
        with kd.use_backend(name):
            loss = kd.distillation_loss(leaf, target, torch.tensor([5, 9, 7]), hard_weight=0.5)
        return loss, torch.autograd.grad(loss, leaf)[0]

    (loss, grad), (truth, true_grad) = run("triton", torch.clone), run("reference", torch.Tensor.double)
    assert torch.isclose(loss.double(), truth, rtol=1e-5) and relative(grad, true_grad) < 3e-6


def test_ties_between_stored_and_rest(backend):
    """The student's top-1 token is the first of equals, wherever they are."""
    student = torch.zeros(4, 600)
    student[0, [3, 4]] = student[1, [4, 5]] = student[2, [100, 590]] = student[3, [4, 599]] = 9.0
    ids = torch.tensor([[4, 10], [4, 10], [590, 1], [4, 10]])
    target = kd.SparseTarget(ids, logprobs=torch.tensor([[-0.1, -3.0]] * 4), tail="bucket")
    found = []
    for name in ("triton", "reference"):
        with kd.use_backend(name):
            found.append(kd.distillation_loss(student, target, return_stats=True)[1].agreement)
    assert found[0] == found[1] == 0.5


@triton.jit
def nothing_left_out(z, columns, at, slot, end):
    return z, slot


@triton.jit
def nothing_stored(g, columns, at, slot, begin, weight):
    return g, slot


@pytest.mark.parametrize(
    "name,mutation", [("_without_stored", nothing_left_out), ("_with_stored", nothing_stored)]
)
def test_mutation_is_seen(backend, monkeypatch, name, mutation):
    problem = SparseProblem(vocab=1500, **SMALL)
    conforms(problem, backend)
    monkeypatch.setattr(rows, name, mutation)
    with pytest.raises(AssertionError):
        conforms(problem, backend)
