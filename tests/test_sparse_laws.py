"""Laws of sparse targets, odd and bad inputs, autograd, and mutations that must be seen."""

import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BACKENDS, arguments, assert_exact, assert_refused, relative
from sparse_problems import FORWARD_ONLY, TAILS, SparseProblem

import kdkernels as kd
from kdkernels.backends import eager, outcomes, sparse_rows
from kdkernels.core import autograd, checked, rows

quick = settings(max_examples=12, deadline=None)
cases = st.tuples(st.integers(1, 5), st.integers(2, 200), st.integers(0, 10**6), st.floats(0.1, 8.0))


def logits(case):
    tokens, vocab, seed, scale = case
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, vocab, generator=generator) * scale for _ in range(2))


def evaluate(backend, student, target, divergence=kd.ForwardKL(), **options):
    leaf = student.clone().requires_grad_()
    with kd.use_backend(backend):
        value = kd.distillation_loss(leaf, target, divergence=divergence, reduction="none", **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def same(one, other, rtol=1e-4, atol=1e-5):
    return all(torch.allclose(a, b, rtol=rtol, atol=atol) for a, b in zip(one, other))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(case=cases, slots=st.integers(1, 40), seed=st.integers(0, 1000))
def test_order_and_splitting_of_slots_do_not_matter(backend, tail, case, slots, seed):
    student, teacher = logits(case)
    target = kd.top_k_target(teacher, min(slots, teacher.shape[1]), tail=tail)
    expected = evaluate(backend, student, target)
    order = torch.randperm(target.slots, generator=torch.Generator().manual_seed(seed))
    share = torch.rand(target.slots, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1
    ids, logprobs = target.ids[:, order], target.logprobs[:, order]
    assert same(evaluate(backend, student, kd.SparseTarget(ids, logprobs, tail=tail)), expected, atol=1e-6)
    halves = torch.cat([logprobs + share.log(), logprobs + (1 - share).log()], -1)
    split = kd.SparseTarget(torch.cat([ids, ids], -1), halves, tail=tail)
    assert same(evaluate(backend, student, split), expected)
    padded = kd.SparseTarget(
        torch.cat([torch.full_like(ids, -1), ids], -1),
        weights=torch.cat([logprobs, logprobs.exp()], -1).abs(),
        mask=torch.cat([ids < 0, ids >= 0], -1),
        tail=tail,
    )
    assert same(evaluate(backend, student, padded), expected)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(case=cases, temperature=st.floats(0.5, 3.0))
@pytest.mark.filterwarnings("ignore:a temperature other")
def test_whole_vocabulary_is_the_dense_loss(backend, tail, case, temperature):
    student, teacher = logits(case)
    temperature = 1.0 if tail == "truncate" else temperature
    divergence = kd.ForwardKL() if tail in FORWARD_ONLY else kd.JSD(0.3)
    target = kd.top_k_target(teacher, teacher.shape[1], tail=tail)
    expected = evaluate(backend, student, teacher, divergence, temperature=temperature)
    assert same(evaluate(backend, student, target, divergence, temperature=temperature), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "conditional"])
@pytest.mark.filterwarnings("ignore:a temperature other")
def test_equal_models_have_no_gradient(backend, divergence, tail, temperature):
    """As far as log-probabilities stored in fp32 can say; at a temperature too."""
    if divergence in (kd.TotalVariation(), kd.Overlap()):
        pytest.skip("its gradient jumps where p = q")
    teacher = torch.randn(4, 500) * 3
    target = kd.top_k_target(teacher, 20, tail=tail)
    value, grad = evaluate(backend, teacher, target, divergence, temperature=temperature)
    assert value.abs().max() < 1e-5 and grad.abs().max() < 4e-6


@pytest.mark.parametrize(
    "divergence", [kd.ForwardKL(), kd.ReverseKL(), kd.JSD(0.5), kd.AlphaBeta(0.5, 0.0)], ids=str
)
@pytest.mark.parametrize("gap", [0.0, 20.0, 60.0, 200.0])
@pytest.mark.parametrize("stored", [0.0, 1e-6, 1e-12])
def test_kept_mass_near_one(backend, divergence, gap, stored):
    """The rest is tiny on one side or both: finite, and as exact in the rest as anywhere."""
    student = torch.randn(3, 900)
    student[:, :4] += gap
    ids = torch.arange(4).expand(3, 4).contiguous()
    weights = torch.tensor([0.7, 0.2, 0.1, 0.0]).double()
    weights[0] -= stored
    target = kd.SparseTarget(ids, weights=weights.expand(3, 4).contiguous())
    value, grad = evaluate(backend, student, target, divergence)
    truth, true_grad = evaluate("reference", student.double(), target, divergence)
    assert value.isfinite().all() and torch.allclose(value.double(), truth, rtol=1e-5, atol=1e-6)
    assert (grad.double() - true_grad).norm() <= 1e-5 * true_grad.norm() + 1e-9
    if stored and gap <= 60:
        assert relative(grad[:, 4:], true_grad[:, 4:]) < 1e-4


def test_mass_is_stored_to_the_last_digit():
    """1 - a of a log-probability near 0 keeps its digits: 1 - exp(-1e-20) is not 0."""
    student = torch.randn(1, 30, dtype=torch.float64)
    target = kd.SparseTarget(torch.tensor([[3]]), torch.tensor([[-1e-20]], dtype=torch.float64))
    value, _ = evaluate("eager", student, target, kd.ReverseKL())
    log_q = student.log_softmax(-1)[0]
    rest = torch.cat([log_q[:3], log_q[4:]]).logsumexp(0)
    expected = log_q[3].exp() * (log_q[3] + 1e-20) + rest.exp() * (rest - math.log(1e-20))
    assert torch.isclose(value[0], expected, rtol=1e-12)


def test_tokens_without_slots_count_and_cost_nothing(backend):
    student, teacher = torch.randn(4, 50), torch.randn(4, 50)
    for tail in TAILS:
        target = kd.top_k_target(teacher, 5, tail=tail)
        target.ids[2] = -1
        value, grad = evaluate(backend, student, target)
        assert value[2] == 0 and not grad[2].any() and (value[[0, 1, 3]] != 0).all()
        with kd.use_backend(backend):
            assert torch.isclose(kd.kl_div(student, target), value.sum() / 4)


def test_masked_garbage_stays_out(backend):
    student, labels = torch.randn(3, 50), torch.tensor([1, -100, 2])
    student[1] = torch.nan
    ids = torch.tensor([[1, 2], [99, -7], [3, 4]])
    logprobs = torch.tensor([[-1.0, -1.5], [torch.nan, torch.inf], [-2.0, -3.0]])
    for tail in TAILS:
        leaf = student.clone().requires_grad_()
        loss = kd.distillation_loss(leaf, kd.SparseTarget(ids, logprobs, tail=tail), labels, hard_weight=0.5)
        loss.backward()
        assert (
            loss.isfinite() and leaf.grad.isfinite().all() and leaf.grad[0].any() and not leaf.grad[1].any()
        )


def test_nan_is_not_hidden(backend):
    """In a kept logit for every tail, in another where the tail looks at it."""
    for tail in TAILS:
        for at in (3, 30):
            student = torch.randn(2, 50)
            student[0, at] = torch.nan
            value, _ = evaluate(
                backend, student, kd.SparseTarget(torch.tensor([[3], [4]]), -torch.ones(2, 1), tail=tail)
            )
            assert value[0].isnan() == (at == 3 or tail != "conditional") and value[1].isfinite()


def test_impossible_stored_token_is_infinite(backend):
    student = torch.zeros(1, 40)
    student[0, 7] = -torch.inf
    target = kd.SparseTarget(torch.tensor([[7, 8]]), torch.tensor([[-1.0, -2.0]]))
    assert evaluate(backend, student, target)[0].item() == float("inf")


IDS, LOGPROBS = torch.tensor([[1, 2], [3, -1]]), torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])
S = torch.randn(2, 10)


def target_of(ids=IDS, logprobs=LOGPROBS, **options):
    return kd.SparseTarget(ids, logprobs, **options)


BAD = [
    (lambda: kd.SparseTarget(IDS), "exactly one.*neither"),
    (lambda: kd.SparseTarget(IDS, LOGPROBS, LOGPROBS), "exactly one.*both"),
    (lambda: target_of(tail="drop"), "drop.*bucket, conditional, renormalize, truncate"),
    (lambda: target_of(IDS.int()), "int64.*int32"),
    (lambda: target_of(logprobs=IDS), "floating.*int64"),
    (lambda: target_of(logprobs=LOGPROBS[:1]), r"\(2, 2\).*\(1, 2\)"),
    (lambda: target_of(IDS[:, :0], LOGPROBS[:, :0]), r"K >= 1.*\(2, 0\)"),
    (lambda: target_of(mask=torch.ones(2, 3, dtype=torch.bool)), r"\(2, 2\).*mask.*\(2, 3\)"),
    (lambda: target_of(mask=torch.ones(2, 2)), "bool mask.*float32"),
    (lambda: kd.kl_div(S[:1], target_of()), r"\(1,\).*\(2,\)"),
    (lambda: kd.kl_div(S, target_of(IDS + 7)), r"id 10 at token 1.*\[0, 10\)"),
    (lambda: kd.kl_div(S, target_of(), vocab_size=3), r"id 3 at token 1.*\[0, 3\)"),
    (lambda: kd.kl_div(S, target_of(torch.tensor([[1, 2], [3, -2]]))), r"id -2 at token 1"),
    (lambda: kd.kl_div(S, target_of(logprobs=LOGPROBS * torch.nan)), "logprobs of nan at token 0"),
    (lambda: kd.kl_div(S, target_of(logprobs=LOGPROBS + torch.inf)), "logprobs of inf at token 0"),
    (lambda: kd.kl_div(S, kd.SparseTarget(IDS, weights=LOGPROBS)), "weights of -1 at token 0"),
    (lambda: kd.kl_div(S, kd.SparseTarget(IDS, weights=LOGPROBS * torch.nan)), "weights of nan at token 0"),
    (lambda: kd.kl_div(S, target_of(logprobs=-LOGPROBS)), "bucket.*sum to 10.1073 at token 0.*renormalize"),
    (
        lambda: kd.js_divergence(S, target_of(tail="truncate")),
        r"truncate.*ForwardKL\(\).*JSD.*bucket.*conditional",
    ),
    (
        lambda: kd.distillation_loss(S, target_of(tail="renormalize"), divergence=kd.ReverseKL()),
        "renormalize.*ReverseKL",
    ),
    (lambda: kd.top_k_target(S, 11), "k=11.*1..10"),
    (lambda: kd.top_k_target(S, 0), "k=0"),
    (lambda: kd.top_p_target(S, 0.0), "p=0.0"),
    (lambda: kd.top_p_target(S, 0.5, max_k=0), "max_k must be > 0, got 0"),
    (lambda: kd.sample_target(S, 0), "n must be > 0, got 0"),
    (lambda: kd.sample_target(S, 3, -1.0), "proposal_temperature=-1.0"),
    (lambda: kd.top_k_target(S, 3, vocab_size=11), "vocab_size=11.*10"),
]


@pytest.mark.parametrize("call,message", BAD, ids=[m for _, m in BAD])
def test_bad_input(call, message):
    assert_refused(call, message)


def test_wrong_place_for_a_target():
    with pytest.raises(TypeError, match="student must be"):
        kd.kl_div(target_of(), S)
    with pytest.raises(TypeError, match="codistillation_loss"):
        kd.codistillation_loss(S, target_of(), torch.tensor([1, 2]))


def test_temperature_warns_once_per_call_site_where_it_is_an_approximation():
    for tail, expected in (("bucket", 2), ("truncate", 2), ("conditional", 0), ("renormalize", 0)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")
            for temperature in (1.0, 2.0, 3.0):
                kd.kl_div(S, target_of(tail=tail), temperature=temperature)
                kd.DistillationLoss(temperature=temperature)(S, target_of(tail=tail))
        assert len(seen) == expected and all(w.filename == __file__ for w in seen)


def test_explain_names_who_serves():
    assert kd.explain(S.double(), target_of()).splitlines()[-1] == "eager: serves this call"


def test_equal_calls_give_equal_bits(backend):
    problem = SparseProblem(student="head")
    first, second = (problem.run(backend, hard_weight=0.5) for _ in range(2))
    assert torch.equal(first[0], second[0]) and all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


@pytest.mark.parametrize("tail", TAILS)
def test_only_inplace_overwrites(backend, tail):
    problem = SparseProblem(tail=tail)
    before = problem.student[0].clone()
    _, (expected,) = problem.run(backend, hard_weight=0.0)
    with kd.use_backend(backend):
        leaf = problem.student[0].requires_grad_()
        kd.distillation_loss(leaf, problem.target, problem.labels).backward()
        assert torch.equal(leaf.detach(), before) and torch.equal(leaf.grad, expected)
        logits = before.clone().requires_grad_() * 1
        kd.distillation_loss(logits, problem.target, problem.labels, inplace=True)
    assert torch.equal(logits.detach(), expected)


def test_shifted_logits_are_not_copied_but_right(backend):
    base = torch.randn(3, 6, 101)
    target = kd.top_k_target(torch.randn(3, 6, 101)[:, :-1], 4)
    leaf, wide = base.clone().requires_grad_(), base.double().requires_grad_()
    loss = kd.kl_div(leaf[:, :-1], target)
    with kd.use_backend("reference"):
        truth = kd.kl_div(wide[:, :-1], target)
    (mine,), (true,) = (torch.autograd.grad(x, y) for x, y in ((loss, leaf), (truth, wide)))
    assert torch.isclose(loss.double(), truth) and relative(mine, true) < 1e-6


@pytest.mark.parametrize("tail", ["bucket", "conditional"])
@pytest.mark.parametrize("case", ["logits", "head", "none", "inplace"])
def test_compile_fullgraph(case, tail):
    problem = SparseProblem(student="logits" if case in ("logits", "inplace") else "head", tail=tail)
    target = problem.target

    def loss(ids, logprobs, mask, *leaves):
        given = kd.SparseTarget(ids, logprobs, mask=mask, tail=tail)
        return kd.distillation_loss(
            problem.side([t * 1 for t in leaves]),
            given,
            problem.labels,
            hard_weight=0.5,
            reduction="none" if case == "none" else "mean",
            divergence=kd.JSD(0.3),
            inplace=case == "inplace",
        )

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in problem.student]
        value = function(target.ids, target.logprobs, target.mask, *leaves)
        results.append((value, torch.autograd.grad(value.sum() * 2, leaves)))
    assert torch.allclose(results[0][0], results[1][0])
    for mine, expected in zip(results[1][1], results[0][1]):
        assert expected.norm() > 1e-6 and relative(mine, expected) < 1e-6


@pytest.mark.parametrize("tail", TAILS)
def test_opcheck(tail):
    target = kd.SparseTarget(torch.randint(0, 20, (4, 3)), -torch.rand(4, 3) - 2, tail=tail)
    for student in ([torch.randn(4, 20)], [torch.randn(4, 6), torch.randn(20, 6)]):
        given = arguments([t.requires_grad_() for t in student], target)
        torch.library.opcheck(autograd.rows, ([t.detach() for t in student], *given[1:]))
        torch.library.opcheck(autograd.deferred, given)
    _, (ids, values), labels, *_, spec, vocab, _, _, _, _ = given
    torch.library.opcheck(checked.checked_target, (ids, values, ids > 3, labels, vocab, spec))
    torch.library.opcheck(autograd.rows_, (torch.randn(4, 20), *given[1:-2]))


def test_gradcheck(divergence):
    if getattr(divergence, "detach_mixture", False):
        pytest.skip("its gradient is not that of its value, by definition")
    student = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 2])
    hard_term = dict(hard_weight=0.4, z_loss=0.1, label_smoothing=0.1)
    for tail in TAILS:
        if tail in FORWARD_ONLY and divergence != kd.ForwardKL():
            continue
        target = kd.top_k_target(torch.randn(3, 9, dtype=torch.float64), 3, tail=tail)
        for backend in ("reference", "eager"):
            with kd.use_backend(backend):
                loss = partial(
                    kd.distillation_loss, teacher=target, labels=labels, divergence=divergence, **hard_term
                )
                assert torch.autograd.gradcheck(loss, student)


def first_only(ids, log_t):
    order = torch.where(ids < 0, 10**9, ids).argsort(dim=-1, stable=True)
    ids, log_t = ids.gather(1, order), log_t.gather(1, order)
    again = torch.cat([ids[:, :1] < -1, ids[:, 1:] == ids[:, :-1]], 1) | (log_t == -torch.inf)
    return torch.where(again, -1, ids), torch.where(again, -torch.inf, log_t)


def no_tail(log_t, stored):
    rest, slack = MISSING(log_t, stored)
    return torch.zeros_like(rest), slack


def solved(**scales):
    def mutated(*args, **options):
        results, made = SOLVE(*args, **options)
        scaled = {name: getattr(made, name) * by for name, by in scales.items()}
        return sparse_rows.Solved(results, made._replace(**scaled))

    return mutated


MISSING, SOLVE, CHECK, ACCUMULATE = (
    outcomes.missing_mass,
    sparse_rows.solve,
    outcomes.checked_slots,
    eager.accumulate,
)
MUTATIONS = {
    "no tail": (outcomes, "missing_mass", no_tail),
    "duplicates dropped": (outcomes, "_distinct", first_only),
    "mask ignored": (
        outcomes,
        "checked_slots",
        lambda ids, values, mask, *rest, **o: CHECK(ids, values, None, *rest, **o),
    ),
    "zero gradient": (rows.HeadRows, "gradients", lambda self: [torch.zeros_like(t) for t in self.given]),
    "stored gradient lost": (sparse_rows, "solve", solved(stored=0)),
    "rest's gradient lost": (sparse_rows, "solve", solved(rest=0)),
    "stored ids not left out": (eager, "accumulate", lambda *a, skipped=None, **o: ACCUMULATE(*a, **o)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(monkeypatch, name):
    problem = SparseProblem(student="head", tail="bucket", scale=1.0)
    problem.target.logprobs[problem.target.ids < 0] = -1.0  # so that ignoring the mask is not an error
    options = dict(divergence=kd.JSD(0.3), hard_weight=0.5)
    oracle, plain = problem.oracle(**options), problem.plain(**options)
    assert_exact(problem.run("eager", **options), oracle, plain, dtype=torch.float32)
    monkeypatch.setattr(*MUTATIONS[name])
    with pytest.raises((AssertionError, ValueError)):
        assert_exact(problem.run("eager", **options), oracle, plain, dtype=torch.float32)
