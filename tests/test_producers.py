"""Top-k, top-p and sampled targets: what they hold, that samples are unbiased, and peak memory."""

import json

import pytest
import torch
from compiled import assert_compiled
from peak import peak_of
from problems import BACKENDS
from test_memory import SLACK, UNIT, H, N, V

import kdkernels as kd
from benchmarks import pages, sparse_bias
from kdkernels import producers

FORMS = {
    "logits": lambda: torch.randn(3, 4, 60),
    "shifted": lambda: torch.randn(3, 5, 60)[:, :-1],
    "bf16": lambda: torch.randn(3, 4, 60).bfloat16(),
    "head": lambda: kd.LinearHead(torch.randn(3, 4, 8), torch.randn(60, 8), torch.randn(60), 0.5, 10.0),
}


def logprobs_of(teacher, vocab=None):
    if isinstance(teacher, kd.LinearHead):
        z = torch.nn.functional.linear(teacher.hidden, teacher.weight, teacher.bias) * teacher.logit_scale
        teacher = teacher.softcap * torch.tanh(z / teacher.softcap)
    return teacher[..., :vocab].double().log_softmax(-1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_bytes", [None, 5000])
@pytest.mark.parametrize("vocab", [None, 50])
def test_top_k(form, chunk_bytes, vocab):
    teacher = FORMS[form]()
    target = kd.top_k_target(teacher, 7, vocab_size=vocab, chunk_bytes=chunk_bytes)
    values, ids = logprobs_of(teacher, vocab).topk(7, -1)
    assert torch.allclose(target.logprobs.double(), values, atol=2e-6)
    assert torch.allclose(logprobs_of(teacher, vocab).gather(-1, target.ids), values, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [0.3, 0.9, 1.0])
def test_top_p_is_the_smallest_set(form, p):
    teacher = FORMS[form]()
    target = kd.top_p_target(teacher, p, chunk_bytes=5000)
    t = torch.where(target.ids >= 0, target.logprobs.double().exp(), 0.0)
    assert (t.sum(-1) >= p - 1e-6).all()
    smallest = torch.where(t > 0, t, 2.0).amin(-1)
    assert (t.sum(-1) - smallest < p + 1e-6).all()
    assert (target.ids >= 0).flatten(0, -2).any(0).all(), "the target is no wider than its widest token"
    few = kd.top_p_target(teacher, p, max_k=2)
    assert few.slots <= 2 and torch.allclose(few.logprobs[..., 0], target.logprobs[..., 0])


@pytest.mark.parametrize("far", [1e20, -1e20, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_are_uniform_however_far_from_0(backend, far):
    row, wide = torch.full((1, 5), far), torch.full((1, 1000), far)
    with kd.use_backend(backend):
        made = kd.top_k_target(row, 2), kd.target_at(row, torch.tensor([[0, 1]])), kd.top_p_target(wide, 0.5)
        samples = [kd.sample_target(row, 8, t) for t in (1.0, 2.0)]
    assert [t.logprobs.exp().sum().item() for t in made] == pytest.approx([0.4, 0.4, 0.5], rel=1e-2)
    assert made[2].slots in (500, 501)
    assert [s.weights.sum().item() for s in samples] == pytest.approx([1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize("gap", [8.0, 15.0, 30.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mass_left_keeps_its_digits(backend, gap):
    """However near 1 the kept mass is: its distance from 1 is what the bucket's outcome is made of."""
    teacher = torch.randn(4, 500)
    teacher[:, 123] = gap
    rest = logprobs_of(teacher).scatter(-1, torch.full((4, 1), 123), -torch.inf).exp().sum(-1)
    with kd.use_backend(backend):
        for target in (kd.top_k_target(teacher, 1), kd.top_p_target(teacher, 0.1, max_k=1)):
            assert torch.allclose(-target.logprobs[:, 0].double().expm1(), rest, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("proposal_temperature", [1.0, 2.0, 0.8])
def test_samples_are_unbiased(proposal_temperature):
    """Over many draws of one distribution the mean gradient is the dense one's, within five standard
    errors in each entry; that of a truncated top-k is far away."""
    rows, vocab, n = 20_000, 12, 6
    teacher, student = torch.randn(1, vocab) * 1.5, torch.randn(1, vocab)
    many = teacher.expand(rows, vocab)
    target = kd.sample_target(many, n, proposal_temperature, generator=torch.Generator().manual_seed(1))

    def gradients(given):
        leaf = student.expand(rows, vocab).contiguous().double().requires_grad_()
        return torch.autograd.grad(kd.kl_div(leaf, given, reduction="sum"), leaf)[0]

    sampled, dense = gradients(target), gradients(many.contiguous())[0]
    error = (sampled.mean(0) - dense).abs() / (sampled.std(0) / rows**0.5)
    assert error.max() < 5 and sampled.std(0).min() > 1e-3
    kept = gradients(kd.top_k_target(many, n, tail="truncate"))[0]
    assert (kept - dense).norm() > 0.01 and (sampled.mean(0) - dense).norm() < 0.2 * (kept - dense).norm()


@pytest.mark.parametrize("chunk_bytes", [None, 2**17])
def test_top_p_of_wide_vocabularies_looks_further_only_where_it_must(chunk_bytes):
    """Its first look is at 128 entries, the second at 1024: rows that need one, two and three, and some that have no more
    to see."""
    vocab, spread = 3000, torch.tensor([9.0, 4.0, 1.0, 0.1, 4.0, 0.1])
    logits = torch.randn(6, vocab, dtype=torch.float64) * spread[:, None]
    logits[4, 5:], logits[5, 700:] = -torch.inf, -torch.inf
    for p in (0.5, 0.9, 0.999, 1.0):
        target = kd.top_p_target(logits, p, chunk_bytes=chunk_bytes)
        log_p, order = logits.log_softmax(-1).sort(-1, descending=True)
        needed = (log_p.exp().cumsum(-1) - log_p.exp() < p) & (log_p > -torch.inf)
        counts = needed.sum(-1)
        assert target.slots == counts.max() > 128
        for row, count in enumerate(counts.tolist()):
            assert (target.ids[row] >= 0).sum() == count
            assert target.ids[row, :count].equal(order[row, :count])
            assert torch.allclose(target.logprobs[row, :count], log_p[row, :count], rtol=0, atol=1e-12)
            assert (target.logprobs[row, count:] == -torch.inf).all()


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_samples_of_many_rows_are_those_of_each(temperature):
    """More rows than are drawn at a time."""
    teacher = torch.randn(70, 16384)
    assert 70 * 16384 * 8 > 2 * producers._PIECE_BYTES
    draw = lambda chunk_bytes: (  # noqa: E731
        torch.manual_seed(3),
        kd.sample_target(teacher, 5, temperature, chunk_bytes=chunk_bytes),
    )[1]
    at_once, each = draw(2**30), draw(1)
    assert at_once.ids.equal(each.ids) and at_once.weights.equal(each.weights)


def test_samples_are_counts_and_repeatable():
    teacher = torch.randn(5, 30)
    one, two = (kd.sample_target(teacher, 40, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    chunked = kd.sample_target(teacher, 40, generator=torch.Generator().manual_seed(3), chunk_bytes=1)
    for other in (two, chunked):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.weights, other.weights)
    counts = one.weights * 40
    assert torch.allclose(counts, counts.round(), atol=1e-5) and torch.allclose(
        counts.sum(-1), torch.tensor(40.0)
    )
    ids = one.ids.masked_fill(one.ids < 0, 10**6)
    assert ((ids[:, 1:] > ids[:, :-1]) | (one.ids[:, 1:] < 0)).all(), "each id once"


def test_impossible_entries_are_never_drawn():
    teacher = torch.randn(50, 20)
    teacher[:, ::2] = -torch.inf
    target = kd.sample_target(teacher, 200)
    assert (target.ids[target.ids >= 0] % 2 == 1).all()
    assert kd.top_p_target(teacher, 1.0).slots == 10


@pytest.mark.parametrize("frozen", [True, False])
def test_conditional_from_hidden_states_is_never_v_wide(frozen):
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=not frozen)
    target = kd.SparseTarget(torch.randint(0, V, (N, 16)), torch.randn(N, 16), tail="conditional")

    def run():
        hidden.grad = weight.grad = None
        kd.js_divergence(kd.LinearHead(hidden, weight), target).backward()

    assert peak_of(run) <= (0 if frozen else weight.numel() * 4) + N * 16 * H * 8 + SLACK < UNIT


def test_targets_of_hidden_states_stay_in_the_budget():
    teacher = kd.LinearHead(torch.randn(N, H), torch.randn(V, H))
    for make in (
        lambda: kd.top_k_target(teacher, 16, chunk_bytes=2**24),
        lambda: kd.top_p_target(teacher, 0.5, max_k=16, chunk_bytes=2**24),
        lambda: kd.sample_target(teacher, 16, chunk_bytes=2**24),
    ):
        assert peak_of(make) <= 2**24 + SLACK < UNIT


def test_committed_result_fills_the_docs():
    committed = json.loads((pages.ROOT / "benchmarks" / "results" / "sparse-bias.json").read_text())
    assert pages.is_filled("bias", sparse_bias.table(committed))


@pytest.mark.parametrize(
    "produce",
    [lambda t: kd.top_k_target(t, 3), lambda t: kd.top_p_target(t, 0.5), lambda t: kd.sample_target(t, 4)],
)
def test_a_teacher_of_nan_is_refused_where_it_counts(produce):
    """Padding often is NaN: that token is masked or the loss is an error, but never quietly 0."""
    teacher = torch.randn(2, 20)
    teacher[0] = torch.nan
    target, student = produce(teacher), torch.randn(2, 20)
    assert kd.kl_div(student, target, torch.tensor([-100, 1])).isfinite()
    with pytest.raises(ValueError, match="nan at token 0"):
        kd.kl_div(student, target)


@pytest.mark.parametrize("device", ["meta"])
def test_default_devices_do_not_reach_inside(device):
    teacher, student = torch.randn(2, 3, 20)
    made = [
        (lambda: kd.top_k_target(teacher, 4)),
        (lambda: kd.top_p_target(teacher, 0.5)),
        (lambda: kd.sample_target(teacher, 4)),
    ]
    for produce in made:
        torch.manual_seed(0)
        expected = produce()
        torch.manual_seed(0)
        with torch.device(device):
            target, loss = produce(), kd.kl_div(student, expected)
        assert target.device.type == "cpu" and torch.equal(target.ids, expected.ids)
        assert torch.equal(loss, kd.kl_div(student, expected))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens(shape):
    """As wide as they would be with tokens, so that batches fit."""
    for teacher in (torch.randn(*shape, 20), kd.LinearHead(torch.randn(*shape, 8), torch.randn(20, 8))):
        target = kd.top_k_target(teacher, 4)
        assert target.ids.shape == target.logprobs.shape == (*shape, 4)
        assert kd.kl_div(torch.randn(*shape, 20), target) == 0
        assert (
            kd.top_p_target(teacher, 0.5).ids.shape == kd.sample_target(teacher, 3).ids.shape == (*shape, 1)
        )


PRODUCERS = {
    "top k": lambda teacher, tail="truncate": kd.top_k_target(teacher, 4, tail=tail),
    "top p": lambda teacher, tail="truncate": kd.top_p_target(teacher, 0.7, tail=tail),
    "top p, at most 5": lambda teacher, tail="truncate": kd.top_p_target(teacher, 0.9, max_k=5, tail=tail),
    "samples": lambda teacher: kd.sample_target(teacher, 6, 1.5),
}
TAILS = ("bucket", "conditional", "renormalize", "truncate")
STEPS = [
    (name, form, student, tail, reduction)
    for name in PRODUCERS
    for form in FORMS
    for student in ("logits", "head")
    for tail in TAILS
    for reduction in ("mean", "none")
    if name != "samples" or tail == "truncate"
]
FEW = [
    ("top k", "head", "head", "bucket", "mean"),
    ("top p", "shifted", "logits", "renormalize", "none"),
    ("samples", "logits", "logits", "truncate", "mean"),
]


def some(cases, few):
    """All of them; all but the ``few`` are slow."""
    return [pytest.param(case, marks=[] if case in few else pytest.mark.slow) for case in cases]


def step(name, form, student, tail, reduction):
    """(a function of the student that makes the target too, the student's tensors)"""
    teacher, labels = FORMS[form](), torch.randint(0, 60, (3, 4))
    labels[1, 2] = -100
    options = {} if name == "samples" else {"tail": tail}

    def loss(*given):
        target = PRODUCERS[name](teacher, **options)
        given = given[0] if student == "logits" else kd.LinearHead(*given)
        return kd.distillation_loss(given, target, labels, hard_weight=0.5, reduction=reduction)

    logits, head = [3 * torch.randn(3, 4, 60)], [torch.randn(3, 4, 8), torch.randn(60, 8)]
    return loss, logits if student == "logits" else head


def same_draws(function):
    def seeded(*leaves):
        torch.manual_seed(5)
        return function(*leaves)

    return seeded


@pytest.mark.parametrize("case", some(STEPS, FEW), ids=" ".join)
def test_a_compiled_step_makes_its_target(case):
    assert_compiled(*step(*case), around=same_draws)


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW[:2], ids=" ".join)
def test_a_compiled_step_under_inductor(case):
    """Not samples: inductor's random numbers are others. The next test but one is theirs."""
    assert_compiled(*step(*case), backend="inductor")


@pytest.mark.parametrize("name", some(PRODUCERS, ["top p", "samples"]))
def test_a_compiled_target_is_the_same(name):
    """For any number of tokens, none among them."""
    compiled = same_draws(torch.compile(PRODUCERS[name], backend="aot_eager", fullgraph=True))
    for tokens in (3, 5, 1, 0):
        teacher = torch.randn(tokens, 20).requires_grad_()
        mine, expected = compiled(teacher), same_draws(PRODUCERS[name])(teacher)
        assert torch.equal(mine.ids, expected.ids) and torch.equal(mine.values, expected.values)
        assert not mine.values.requires_grad and not expected.values.requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_samples_follow_the_teacher(backend):
    """Each entry as often as its probability says; two calls draw twice."""
    rows, n = 500, 400
    teacher = torch.tensor([0.6, 0.3991, 0.0009]).log().expand(rows, 3)

    def two(student):
        made = [kd.sample_target(teacher, n) for _ in range(2)]
        return made, kd.kl_div(student, made[0])

    student = torch.zeros(rows, 3, requires_grad=True)
    (one, other), loss = torch.compile(two, backend=backend, fullgraph=True)(student)
    expected = kd.kl_div(student, one)
    mine, theirs = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    assert torch.equal(loss, expected) and torch.equal(mine, theirs) and theirs.norm() > 1e-3
    assert one.ids.shape != other.ids.shape or not torch.equal(one.weights, other.weights)
    for target in (one, other):
        weights = torch.zeros(rows, 4).scatter_add_(1, target.ids.where(target.ids >= 0, 3), target.weights)
        p, found = teacher[0].double().exp(), weights[:, :3].double().mean(0)
        assert ((found - p).abs() < 5 * (p * (1 - p) / (rows * n)).sqrt()).all()


def test_a_generator_is_not_compiled():
    teacher = torch.randn(4, 20)

    def draw(teacher, generator):
        return kd.sample_target(teacher, 5, generator=generator).ids

    given = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    assert torch.equal(torch.compile(draw, backend="eager")(teacher, given()), draw(teacher, given()))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="generator cannot be compiled.*torch.manual_seed"):
        torch.compile(draw, backend="eager", fullgraph=True)(teacher, given())


@pytest.mark.parametrize("form", ["logits", "head"])
def test_opcheck(form):
    teacher = producers._given(FORMS[form](), 50, 5000)
    torch.library.opcheck(producers._top_k, (*teacher, 4))
    torch.library.opcheck(producers._top_p, (*teacher, 0.7, 50))
    torch.library.opcheck(producers._sample, (*teacher, torch.randint(2**53, (12, 6)), 1.5))


def test_the_draw_of_a_number_is_its_place_in_the_distribution():
    """The first entry up to and excluding its own mass, the last that has any from there on."""
    draws = torch.tensor([[0, 2**51 - 1, 2**51, 2**52, 2**53 - 1]])
    ids = producers._inverted(torch.tensor([[0.25, 0.0, 0.75, 0.0]], dtype=torch.float64), draws)
    assert ids.tolist() == [[0, 0, 2, 2, 2]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_bytes", [None, 5000])
@pytest.mark.parametrize("vocab", [None, 50])
def test_target_at(form, chunk_bytes, vocab):
    teacher = FORMS[form]()
    ids = torch.randint(0, vocab or 60, (3, 4, 9))
    ids[0, 0] = -1
    ids[1, :, 5] = ids[1, :, 2]
    target = kd.target_at(teacher, ids, vocab_size=vocab, chunk_bytes=chunk_bytes)
    stored = target.ids >= 0
    assert torch.equal(target.ids[stored], ids[stored]) and not stored[0, 0].any()
    exact = logprobs_of(teacher, vocab).gather(-1, ids.clamp(min=0))
    assert torch.allclose(target.logprobs[stored].double(), exact[stored], atol=2e-6)
    assert (target.logprobs[~stored] == -torch.inf).all()
    for token, kept in zip(ids.view(-1, 9).tolist(), target.ids.view(-1, 9).tolist()):
        once = [id for at, id in enumerate(token) if id not in token[:at]]
        assert [id for id in kept if id >= 0] == [id for id in once if id >= 0]


@pytest.mark.parametrize("gap", [8.0, 15.0, 30.0])
@pytest.mark.parametrize("slots", [1, 4, 500])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_target_at_given_ids_leaves_keeps_its_digits(backend, slots, gap):
    teacher = torch.randn(4, 500)
    teacher[:, 123] = gap
    ids = torch.cat([torch.full((4, 1), 123), torch.stack([torch.randperm(500) for _ in range(4)])], 1)
    ids = ids[:, : slots + (slots == 500)]
    rest = logprobs_of(teacher).scatter(-1, torch.full((4, 1), 123), -torch.inf).exp().sum(-1)
    with kd.use_backend(backend):
        target = kd.target_at(teacher.double() if backend == "eager" else teacher, ids)
    assert torch.allclose(-target.logprobs[:, 0].double().expm1(), rest, rtol=1e-5, atol=0.0)


def test_the_students_own_tokens_and_the_teachers():
    """The union is the sparse target of all its ids, however they came together."""
    student, teacher = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40)
    students, teachers = (kd.top_k_target(model, 5).ids for model in (student, teacher))
    target = kd.target_at(teacher, torch.cat([students, teachers], -1))
    assert not target.logprobs.requires_grad and target.slots == 10
    log_p, log_q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    inside = torch.zeros(6, 41, dtype=torch.bool).scatter(-1, torch.cat([students, teachers], -1), True)[
        :, :40
    ]
    assert inside.sum() < 60 and (target.ids >= 0).sum() == inside.sum()
    groups = [torch.where(inside, z, -torch.inf) for z in (log_p, log_q)]
    rests = [torch.where(inside, -torch.inf, z).logsumexp(-1, keepdim=True) for z in (log_p, log_q)]
    p, q = (torch.cat([z, rest], -1) for z, rest in zip(groups, rests))
    exact = torch.where(q.exp() > 0, q.exp() * (q - p), 0.0).sum(-1).mean()
    mine = kd.distillation_loss(student, target, divergence=kd.ReverseKL())
    assert torch.allclose(mine.double(), exact, rtol=1e-5)
    wanted, got = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (exact, mine))
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-7) and wanted.norm() > 1e-2


def test_target_at_memory_and_compiled():
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    ids = torch.randint(0, V, (N, 16))
    assert (
        peak_of(lambda: kd.target_at(kd.LinearHead(hidden, weight), ids, chunk_bytes=UNIT // 16)) < UNIT // 4
    )
    teacher = torch.randn(4, 30)
    few = torch.tensor([[1, 2, 1], [29, 0, 3], [-1, 5, 5], [7, 8, 9]])
    assert_compiled(lambda s: kd.kl_div(s, kd.target_at(teacher, few)), [torch.randn(4, 30)])
    arguments = ([teacher], [1.0, 0.0], 30, 2**20, few)
    torch.library.opcheck(torch.ops.kdkernels.target_at.default, arguments)


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.tensor([[0, 60]]), r"the id 60 at token 0; ids must be in \[0, 60\)"),
        (torch.tensor([[0, -2]]), "the id -2 at token 0"),
        (torch.tensor([[0.0]]), "ids must be int64, got torch.float32"),
        (torch.tensor([0]), r"ids must be \(1, 'K'\) with K >= 1, as the teacher's tokens, got \(1,\)"),
        (torch.zeros(2, 3, dtype=torch.int64), r"got \(2, 3\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"got \(1, 0\)"),
    ],
)
def test_ids_that_cannot_be_meant(ids, message):
    with pytest.raises(ValueError, match=message):
        kd.target_at(torch.randn(1, 60), ids)
