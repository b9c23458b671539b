"""Every backend x tail x divergence x form x dtype x option of sparse targets against the fp64 oracle."""

import pytest
import torch
from problems import assert_exact, assert_refused, relative
from sparse_problems import FORWARD_ONLY, TAILS, SparseProblem

import kdkernels as kd
from kdkernels.commands.verify.scenario import DIVERGENCES

pytestmark = pytest.mark.filterwarnings("ignore:a temperature other")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEFINED = [(t, d) for t in TAILS for d in DIVERGENCES if t not in FORWARD_ONLY or d == kd.ForwardKL()]


def conforms(problem, backend, **options):
    value, grads = problem.run(backend, **options)
    options.pop("chunk_bytes", None)
    true_value, true_grads = problem.oracle(**options)
    assert torch.allclose(value.double(), true_value, rtol=1e-5, atol=2e-6)
    for mine, truth in zip(grads, true_grads):
        assert mine.shape == truth.shape and truth.norm() > 1e-6
        assert relative(mine, truth) < 4e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("tail,divergence", DEFINED, ids=str)
def test_divergences(backend, tail, divergence, form, dtype):
    problem = SparseProblem(student=form, tail=tail, dtype=dtype)
    for hard_weight in (0.0, 0.5):
        options = dict(divergence=divergence, temperature=1.5, hard_weight=hard_weight)
        assert_exact(
            problem.run(backend, **options),
            problem.oracle(**options),
            problem.plain(**options),
            dtype=dtype,
            projected=form == "head",
        )


@pytest.mark.parametrize("chunk_bytes", [30_000, 400_000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
@pytest.mark.parametrize("tail", TAILS)
def test_budgets(backend, tail, hard_weight, reduction, chunk_bytes):
    """Token chunks and vocabulary chunks give the same loss and gradient."""
    problem = SparseProblem(student="head", tail=tail, vocab=700, logit_scale=0.5, softcap=5.0)
    options = dict(temperature=2.0, hard_weight=hard_weight, reduction=reduction)
    if hard_weight:
        options |= dict(label_smoothing=0.1, z_loss=0.01)
    if tail not in FORWARD_ONLY:
        options["divergence"] = kd.JSD(0.3)
    conforms(problem, backend, chunk_bytes=chunk_bytes, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_terms_under_an_offset(backend, tail, dtype):
    """A number added to all of the student's logits means nothing, at a temperature and without."""
    problem = SparseProblem(tail=tail, dtype=dtype, vocab=60, shape=(1, 6), ignored=1)
    problem.student = [problem.student[0] + 1e4]
    for temperature in (1.0, 3.0):
        options = dict(temperature=temperature, hard_weight=0.5)
        (_, (mine,)), (_, (true,)) = problem.run(backend, **options), problem.oracle(**options)
        assert true.norm() > 1e-2 and relative(mine, true) < 8 * torch.finfo(dtype).eps


def test_a_budget_below_one_token(backend):
    problem = SparseProblem(student="head", vocab=300, shape=(1, 6), ignored=1)
    conforms(problem, backend, chunk_bytes=1_000, hard_weight=0.5)


@pytest.mark.parametrize("given", ["logprobs", "weights"])
@pytest.mark.parametrize("values", DTYPES, ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_what_is_stored(backend, tail, values, given):
    conforms(SparseProblem(tail=tail, values=values, given=given), backend, hard_weight=0.5)


@pytest.mark.parametrize(
    "vocab,slots", [(1, 1), (2, 1), (2, 2), (127, 127), (2048, 1), (2049, 64), (5000, 5000)]
)
@pytest.mark.parametrize("tail", TAILS)
def test_widths(backend, tail, vocab, slots):
    problem = SparseProblem(tail=tail, vocab=vocab, slots=slots, messy=False)
    options = {} if tail in FORWARD_ONLY else dict(divergence=kd.ReverseKL())
    value, (grad,) = problem.run(backend, **options)
    truth, (true_grad,) = problem.oracle(**options)
    assert torch.isclose(value.double(), truth, rtol=1e-5, atol=2e-6)
    assert (grad.double() - true_grad).norm() <= 4e-6 * true_grad.norm() + 1e-9
    assert true_grad.norm() > 1e-6 or slots == 1


OPTIONS = [
    dict(reduction="sum"),
    dict(reduction="batchmean"),
    dict(num_items=7),
    dict(temperature=3.0, temperature_squared=True),
    dict(soft_weight=0.3, hard_weight=0.7),
    dict(soft_weight=0.0, hard_weight=1.0),
    dict(hard_weight=1.0, label_smoothing=0.2, z_loss=1e-2),
    dict(hard_weight=1.0, label_smoothing=0.2, z_loss=1e-2, temperature=0.7),
    dict(token_weights=True),
    dict(vocab_size=250),
    dict(labels=False),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("tail", TAILS)
def test_options(backend, tail, form, options):
    problem = SparseProblem(student=form, tail=tail)
    if "token_weights" in options:
        options = dict(token_weights=torch.rand(3, 5))
    if "vocab_size" in options:
        problem.labels.clamp_(max=249)
        problem.target.ids.clamp_(max=249)
        problem.target.logprobs.sub_(1.0)  # clamped ids add up
    conforms(problem, backend, **options)


@pytest.mark.parametrize(
    "map_options", [dict(softcap=5.0), dict(logit_scale=0.3), dict(softcap=4.0, logit_scale=-2.0)]
)
@pytest.mark.parametrize("tail", TAILS)
def test_logit_maps(backend, tail, map_options):
    conforms(
        SparseProblem(student="head", tail=tail, **map_options), backend, temperature=1.7, hard_weight=0.5
    )


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("tail", TAILS)
def test_stats(backend, tail, form):
    problem = SparseProblem(student=form, tail=tail, ignored=2)
    if form == "logits":  # half of the tokens agree with the teacher
        given = torch.where(problem.target.ids >= 0, problem.target.logprobs, -torch.inf)
        given = torch.where(problem.target.mask, given, -torch.inf)
        top = problem.target.ids.gather(-1, given.argmax(-1, keepdim=True)).clamp(min=0)
        problem.student[0][1:] += 20 * torch.zeros_like(problem.student[0]).scatter_(-1, top, 1.0)[1:]
    options = dict(labels=problem.labels, hard_weight=0.5, temperature=2.0, return_stats=True)
    results = []
    for name in ("reference", backend):
        with kd.use_backend(name):
            results.append(kd.distillation_loss(problem.side(problem.student), problem.target, **options))
    (truth, expected), (loss, stats) = results
    assert torch.isclose(loss, truth, rtol=1e-5) and not stats.soft.requires_grad
    assert form == "head" or 0.3 < stats.agreement < 1
    for name, mine, true in zip(stats._fields, stats, expected):
        assert torch.isclose(mine.double(), true.double(), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("tail", ["conditional", "truncate"])
@pytest.mark.parametrize("others", [-torch.inf, -1e4])
def test_hard_term_where_the_rest_is_nothing(backend, tail, others):
    """The student's mass is all on the kept ids."""
    problem = SparseProblem(tail=tail, vocab=40, slots=8, messy=False, ignored=0)
    student = problem.student[0]
    kept = torch.zeros_like(student).scatter_(-1, problem.target.ids, 1.0).bool()
    problem.student[0] = torch.where(kept, student, others)
    problem.labels = problem.target.ids[..., 0].clone()
    conforms(problem, backend, hard_weight=0.5)


@pytest.mark.parametrize("temperature", [3.0, 6.0, 7.0])
@pytest.mark.parametrize("tail", ["renormalize", "truncate"])
def test_ties_at_a_temperature(backend, tail, temperature):
    """The student's top logit is both a kept one and, earlier, one of the rest."""
    student = torch.zeros(1, 40)
    student[0, [1, 2]] = 5.0
    target = kd.SparseTarget(torch.tensor([[2, 9]]), logprobs=torch.tensor([[0.7, 0.2]]).log(), tail=tail)
    _, stats = kd.distillation_loss(student, target, temperature=temperature, return_stats=True)
    assert stats.agreement == 0


def masked_alike(values=torch.float32, share=1.0):
    """Both models masked to the eight ids that are stored, which have ``share`` of the teacher's mass."""
    problem = SparseProblem(tail="bucket", vocab=40, slots=8, messy=False, ignored=0)
    ids, student = problem.target.ids, problem.student[0]
    kept = torch.zeros_like(student).scatter_(-1, ids, 1.0).bool()
    problem.student[0] = torch.where(kept, student, -torch.inf)
    logprobs = problem.target.logprobs.log_softmax(-1) + torch.tensor(share).log()
    problem.target = kd.SparseTarget(ids, logprobs=logprobs.to(values), tail="bucket")
    problem.teacher = [problem.target]
    return problem


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_bucket_where_both_models_are_masked(backend, divergence, values):
    """What rounding leaves of the teacher's mass is no outcome where the student has none either."""
    problem = masked_alike(values)
    conforms(problem, backend, divergence=divergence, temperature=1.5, hard_weight=0.5)
    value, (grad,) = problem.run(backend, divergence=divergence, labels=False)
    assert value.isfinite() and grad.isfinite().all()


def test_bucket_where_both_models_are_masked_is_dense(backend):
    """The loss, its gradient and the metrics are those of the teacher's whole distribution."""
    problem, given = masked_alike(torch.float64), []
    target = problem.target
    dense = torch.full_like(problem.student[0], -torch.inf).scatter_(-1, target.ids, target.logprobs.float())
    for teacher in (target, dense):
        with kd.use_backend(backend):
            student = problem.student[0].clone().requires_grad_()
            loss, stats = kd.distillation_loss(student, teacher, divergence=kd.JSD(0.3), return_stats=True)
            given.append((loss, *stats, *torch.autograd.grad(loss, student)))
    for mine, truth in zip(*given):
        assert torch.allclose(mine, truth, rtol=1e-5, atol=1e-6)


def test_bucket_where_only_the_student_is_masked(backend):
    """A rest that the teacher has and the student has not is an infinite forward KL, as with dense targets."""
    problem = masked_alike(share=0.9)
    assert problem.run(backend, labels=False)[0] == torch.inf
    conforms(problem, backend, divergence=kd.JSD(0.3))


def test_bucket_without_a_rest_needs_all_mass():
    """Every id of the vocabulary is stored, but a tenth is missing: no outcome is left that could have it."""
    target = kd.SparseTarget(torch.tensor([[2, 0, 1, 1]]), weights=torch.tensor([[0.3, 0.3, 0.2, 0.1]]))
    assert_refused(lambda: kd.kl_div(torch.randn(1, 3), target), "all 3 ids.*0.9.*token 0")
    assert kd.kl_div(torch.randn(1, 4), target).isfinite()
