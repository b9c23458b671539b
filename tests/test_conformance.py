"""Every backend x divergence x input form x dtype x option against the fp64 oracle."""

import math

import pytest
import torch
from problems import Problem, assert_exact, relative

import kdkernels as kd

FORMS = [("logits", "logits"), ("head", "head"), ("head", "logits"), ("logits", "head")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_divergences(backend, divergence, form, dtype):
    problem = Problem(student=form[0], teacher=form[1], dtype=dtype)
    options = dict(divergence=divergence, temperature=1.5, hard_weight=0.5)
    assert_exact(
        problem.run(backend, **options),
        problem.oracle(**options),
        problem.plain(**options),
        dtype=dtype,
        projected="head" in form,
    )


@pytest.mark.parametrize("vocab", [1, 2, 15, 127, 2048, 2049, 5000])
def test_widths(backend, divergence, vocab):
    problem = Problem(vocab=vocab, shape=(4, 15))
    ours, oracle = problem.run(backend, divergence=divergence), problem.oracle(divergence=divergence)
    if vocab == 1:
        assert ours[0] == float(divergence == kd.Overlap()) and ours[1][0].abs().max() == 0
    else:
        assert_exact(ours, oracle, problem.plain(divergence), dtype=torch.float32)


@pytest.mark.parametrize("chunk_bytes", [1_000, 20_000, 400_000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_budgets(backend, divergence, chunk_bytes, reduction):
    """Token chunks and vocabulary chunks give the same loss and gradient."""
    problem = Problem(student="head", teacher="head", vocab=700, shape=(2, 3), logit_scale=0.5, softcap=5.0)
    options = dict(
        divergence=divergence,
        temperature=2.0,
        hard_weight=0.5,
        reduction=reduction,
        label_smoothing=0.1,
        z_loss=0.01,
    )
    value, grads = problem.run(backend, chunk_bytes=chunk_bytes, **options)
    true_value, true_grads = problem.oracle(**options)
    assert torch.allclose(value.double(), true_value, rtol=1e-5, atol=1e-6)
    for mine, truth in zip(grads, true_grads):
        assert relative(mine, truth) < 3e-6


OPTIONS = [
    dict(reduction="sum"),
    dict(reduction="batchmean"),
    dict(num_items=7),
    dict(num_items=torch.tensor(7)),
    dict(temperature=3.0, temperature_squared=True),
    dict(soft_weight=0.3, hard_weight=0.7),
    dict(soft_weight=0.0, hard_weight=1.0),
    dict(hard_weight=1.0, label_smoothing=0.2, z_loss=1e-2),
    dict(token_weights=True),
    dict(vocab_size=250),
    dict(labels=False),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_options(backend, form, options):
    problem = Problem(student=form[0], teacher=form[1])
    if "token_weights" in options:
        options = dict(token_weights=torch.rand(3, 5))
    if "vocab_size" in options:
        problem.labels.clamp_(max=249)
    value, grads = problem.run(backend, **options)
    true_value, true_grads = problem.oracle(**options)
    assert torch.isclose(value.double(), true_value, rtol=1e-5, atol=1e-6)
    for mine, truth in zip(grads, true_grads):
        assert mine.shape == truth.shape and truth.norm() > 1e-6
        assert relative(mine, truth) < 3e-6


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_mixed_dtypes(backend, form, pair):
    problem = Problem(student=form[0], teacher=form[1], dtype=pair[0], teacher_dtype=pair[1])
    options = dict(divergence=kd.JSD(0.5))
    assert_exact(
        problem.run(backend, **options),
        problem.oracle(**options),
        problem.plain(**options),
        dtype=min(pair, key=lambda d: -torch.finfo(d).eps),
        projected="head" in form,
    )


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1), dict(z_loss=0.01)], ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 3_000])
def test_cross_entropy(backend, form, options, chunk_bytes):
    problem = Problem(student=form)

    def loss(student, teacher, labels, **options):
        return kd.cross_entropy(student, labels, **options)

    value, grads = problem.run(backend, loss=loss, chunk_bytes=chunk_bytes, **options)
    true_value, true_grads = problem.oracle(loss=loss, **options)
    assert torch.isclose(value.double(), true_value, rtol=1e-6)
    for mine, truth in zip(grads, true_grads):
        assert relative(mine, truth) < 2e-6


HARD_TERMS = [dict(soft_weight=0.0), dict(label_smoothing=0.1, z_loss=1e-6)]


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4, -1e4])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("options", HARD_TERMS, ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 3_000])
def test_terms_under_an_offset(backend, offset, temperature, options, chunk_bytes):
    """A number added to all logits means nothing: no digits are lost to it, in loss or gradient, in one tile
    or in chunks of the vocabulary."""
    problem = Problem(shape=(1, 5), vocab=300, ignored=1)
    problem.student, problem.teacher = [problem.student[0] + offset], [problem.teacher[0] - offset]
    options = dict(options, hard_weight=1.0, temperature=temperature, reduction="none")
    oracle, plain = problem.oracle(**options), problem.plain(**options)

    def loss(student, teacher, labels, **options):
        if chunk_bytes:  # these very logits, made a chunk at a time
            student = kd.LinearHead(student, torch.eye(300), logit_scale=1.0)
        return kd.distillation_loss(student, teacher, labels, chunk_bytes=chunk_bytes, **options)

    ours = problem.run(backend, loss=loss, **options)
    assert_exact(ours, oracle, plain, dtype=torch.float32)
    assert relative(ours[0], oracle[0]) <= 2 * relative(plain[0], oracle[0]) + 2e-7


@pytest.mark.parametrize("divergence", [kd.ForwardKL(), kd.JSD(0.5)], ids=str)
def test_terms_in_fp64_under_an_offset(backend, divergence):
    problem = Problem(shape=(1, 5), vocab=300, ignored=1, dtype=torch.float64)
    problem.student, problem.teacher = [problem.student[0] + 1e4], [problem.teacher[0] - 1e4]
    options = dict(divergence=divergence, hard_weight=1.0, temperature=3.0)
    assert_exact(
        problem.run(backend, **options),
        problem.oracle(**options),
        problem.plain(**options),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("offset", [1e3, -1e4])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_codistillation_under_an_offset(backend, offset, temperature):
    """The teacher's own cross entropy, as the student's."""
    problem = Problem(shape=(1, 5), vocab=300, ignored=1)
    teacher = problem.teacher[0] + offset
    leaf, wide, other = (
        teacher.clone().requires_grad_(),
        teacher.double().requires_grad_(),
        teacher.clone().requires_grad_(),
    )
    loss = kd.codistillation_loss(problem.student[0], leaf, problem.labels, temperature=temperature).teacher
    with kd.use_backend("reference"):
        truth = kd.cross_entropy(wide, problem.labels)
    plain = torch.nn.functional.cross_entropy(other.flatten(0, 1), problem.labels.flatten())
    ours, oracle, theirs = (
        (value, torch.autograd.grad(value, x)) for value, x in ((loss, leaf), (truth, wide), (plain, other))
    )
    assert_exact(ours, oracle, theirs, dtype=torch.float32)
    assert relative(ours[0], oracle[0]) <= 2 * relative(theirs[0], oracle[0]) + 2e-7


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("chunk_bytes", [None, 20_000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_codistillation(backend, form, chunk_bytes, reduction, temperature):
    problem = Problem(student=form[0], teacher=form[1])

    def grads_of(name, double):
        convert = (lambda t: t.double()) if double else (lambda t: t.clone())
        leaves = [[convert(t).requires_grad_() for t in side] for side in (problem.student, problem.teacher)]
        with kd.use_backend(name):
            losses = kd.codistillation_loss(
                *(problem.side(side) for side in leaves),
                problem.labels,
                divergence=kd.JSD(0.5),
                temperature=temperature,
                hard_weight=0.5,
                chunk_bytes=chunk_bytes,
                reduction=reduction,
            )
        total = losses.student.sum() * 2 + losses.teacher.sum() * 3
        return losses, torch.autograd.grad(total, leaves[0] + leaves[1])

    ours, oracle = grads_of(backend, False), grads_of("reference", True)
    for mine, truth in zip(ours[0], oracle[0]):
        assert torch.allclose(mine.double(), truth, rtol=1e-5, atol=1e-6)
    for mine, truth in zip(ours[1], oracle[1]):
        assert truth.norm() > 1e-6 and relative(mine, truth) < 3e-6


def test_stats(backend):
    problem = Problem()
    with kd.use_backend("reference"):
        _, truth = kd.distillation_loss(
            problem.student[0],
            problem.teacher[0],
            problem.labels,
            hard_weight=1.0,
            temperature=2.0,
            return_stats=True,
        )
    with kd.use_backend(backend):
        _, stats = kd.distillation_loss(
            problem.student[0],
            problem.teacher[0],
            problem.labels,
            hard_weight=1.0,
            temperature=2.0,
            return_stats=True,
        )
    assert stats.tokens == 13 and not stats.soft.requires_grad
    for mine, true in zip(stats, truth):
        assert torch.isclose(mine.double(), true.double(), rtol=1e-5, atol=1e-6)


def test_adversarial_rows(backend, divergence):
    """+-1e4 logits, one-hot teachers, ties and padding: finite where the oracle is, and equal."""
    v = 300
    student, teacher = torch.randn(6, v), torch.randn(6, v)
    student[0] *= 1e4
    teacher[1] *= 1e4
    student[2], teacher[2] = 1e4, -1e4
    teacher[3] = 0.0
    student[4, 200:] = teacher[4, 200:] = -torch.inf
    student[5, :150] = teacher[5, :150] = -torch.inf
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    ours = kd.distillation_loss(leaf, teacher, divergence=divergence, reduction="none")
    with kd.use_backend("reference"):
        truth = kd.distillation_loss(wide, teacher.double(), divergence=divergence, reduction="none")
    (mine,), (true,) = (torch.autograd.grad(x.sum(), y) for x, y in ((ours, leaf), (truth, wide)))
    comparable = truth.isfinite() & (truth.abs() < 1e30)
    assert comparable.sum() >= 3
    for row in comparable.nonzero()[:, 0].tolist():
        assert torch.isclose(ours[row].double(), truth[row], rtol=1e-4, atol=1e-5), row
        assert (mine[row].double() - true[row]).norm() <= 1e-5 * (1 + true[row].norm()), row


def test_equal_models_have_exactly_no_gradient(backend, divergence):
    logits = torch.randn(4, 3001) * 5
    leaf = logits.clone().requires_grad_()
    kd.distillation_loss(leaf, logits, divergence=divergence).backward()
    assert leaf.grad.abs().max() == 0


def test_models_that_agree(backend, divergence):
    """Logits that differ by 1e-3: the gradient is a small difference and must keep its digits."""
    problem = Problem(vocab=3001, shape=(32,), ignored=0, scale=4.0)
    problem.teacher = [problem.student[0] + 1e-3 * torch.randn(32, 3001)]
    ours, oracle = problem.run(backend, divergence=divergence), problem.oracle(divergence=divergence)
    by_term = isinstance(divergence, (kd.JSD, kd.TotalVariation))
    by_term |= isinstance(divergence, (kd.SkewKL, kd.SkewReverseKL)) and backend != "eager"
    if by_term:  # every term is small: so is its error
        assert relative(ours[0], oracle[0]) < 3e-4
    if not isinstance(
        divergence, (kd.TotalVariation, kd.Overlap)
    ):  # whose gradient jumps where p and q are an ulp apart
        assert_exact(ours, oracle, problem.plain(divergence), dtype=torch.float32)


@pytest.mark.parametrize(
    "divergence", [kd.JSD(0.99), kd.JSD(0.01), kd.SkewKL(1e-3), kd.SkewReverseKL(1e-3)], ids=str
)
@pytest.mark.parametrize("sharp", ["student", "teacher"])
def test_mixtures_of_little_of_one_side(backend, divergence, sharp):
    """Where the other side has next to nothing, the little counts: m must not be a difference of large numbers."""
    problem = Problem(vocab=3001, shape=(32,), ignored=0, scale=1.0)
    getattr(problem, sharp)[0].mul_(8)
    assert_exact(
        problem.run(backend, divergence=divergence),
        problem.oracle(divergence=divergence),
        problem.plain(divergence),
        dtype=torch.float32,
    )


@pytest.mark.parametrize(
    "divergence", [kd.SkewKL(1e-3), kd.SkewKL(0.5), kd.ForwardKL(), kd.JSD(0.5), kd.Overlap()], ids=str
)
@pytest.mark.parametrize("sure", ["student", "teacher", "both"])
def test_sure_models(backend, divergence, sure):
    """All but 1e-3 of one side are one token's, or of both sides but another's: what is left keeps its digits."""
    problem = Problem(vocab=2049, shape=(8,), ignored=0, scale=1.0)
    for name, column in (("student", 7), ("teacher", 1500)):
        if sure in (name, "both"):
            logits = getattr(problem, name)[0]
            logits[:, column] = logits.logsumexp(-1) + 7
    assert_exact(
        problem.run(backend, divergence=divergence),
        problem.oracle(divergence=divergence),
        problem.plain(divergence),
        dtype=torch.float32,
    )


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("apart", [12.0, 25.0, 50.0])
def test_little_in_common_keeps_its_digits(backend, form, apart):
    """Each model is sure of another token: the overlap is e^-apart, of which 1 - TV has no digit left in fp32. Nor
    has a gradient that is a difference of what is near 1/2."""
    problem = Problem(student=form, vocab=1025, shape=(4,), ignored=0, scale=1.0, bias=False)
    columns = torch.arange(1025) % 2
    shift = apart * columns.float(), apart * (1 - columns.float())
    if form == "logits":
        problem.student[0].add_(shift[0])
    else:
        problem.student.append(shift[0])
    problem.teacher[0].add_(shift[1])
    ours, oracle = (
        run(divergence=kd.Overlap(), reduction="none")
        for run in (lambda **o: problem.run(backend, **o), problem.oracle)
    )
    assert (oracle[0] < 100 * math.exp(-apart)).all()
    torch.testing.assert_close(ours[0].double(), oracle[0], rtol=2e-5, atol=0.0)
    for mine, true in zip(ours[1], oracle[1]):
        assert relative(mine, true) < 2e-5


def test_same_inputs_same_bits(backend):
    problem = Problem(student="head", teacher="head")
    first, second = (problem.run(backend, divergence=kd.JSD(0.5)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


def test_impossible_teacher_token_is_infinite(backend):
    student, teacher = torch.zeros(1, 40), torch.zeros(1, 40)
    student[0, 7] = -torch.inf
    assert kd.kl_div(student, teacher).item() == float("inf")


def compare_row_losses(student, teacher, divergence, **options):
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, divergence=divergence, **options)
    with kd.use_backend("reference"):
        truth = kd.distillation_loss(wide, teacher.double(), divergence=divergence)
    (mine,), (true,) = (torch.autograd.grad(x, y) for x, y in ((loss, leaf), (truth, wide)))
    assert torch.isclose(loss.double(), truth, rtol=1e-5) and relative(mine, true) < 1e-6


def test_leading_block_without_mass(backend):
    """One side padded with -inf, the other with -1e4, in the first block that is folded."""
    student, teacher = torch.randn(2, 4096), torch.randn(2, 4096)
    student[:, :2048], teacher[:, :2048] = -torch.inf, -1e4
    compare_row_losses(student, teacher, kd.ForwardKL())
    compare_row_losses(teacher, student, kd.ReverseKL())
    if backend == "eager":
        compare_row_losses(student, teacher, kd.ForwardKL(), chunk_bytes=2**14)


@pytest.mark.parametrize("chunk_bytes", [None, 300, 2000, 20_000])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_leading_chunk_of_padding(backend, chunk_bytes, temperature):
    """Biases of -inf over whole vocabulary chunks, in distillation and in co-distillation."""
    problem = Problem(student="head", teacher="head", vocab=200)
    for side in (problem.student, problem.teacher):
        side[2][:100] = -torch.inf
    problem.labels = torch.where(problem.labels >= 0, 100 + problem.labels % 100, -100)
    options = dict(temperature=temperature, hard_weight=0.5)
    value, grads = problem.run(backend, chunk_bytes=chunk_bytes, **options)
    truth, true_grads = problem.oracle(**options)
    assert torch.isclose(value.double(), truth, rtol=1e-5)
    assert all(relative(mine, true) < 3e-6 for mine, true in zip(grads, true_grads))
    both = [[t.clone().requires_grad_() for t in side] for side in (problem.student, problem.teacher)]
    losses = kd.codistillation_loss(
        *(problem.side(side) for side in both), problem.labels, chunk_bytes=chunk_bytes, **options
    )
    with kd.use_backend("reference"):
        expected = kd.cross_entropy(problem.side(problem.teacher), problem.labels)
    assert torch.isclose(losses.teacher, expected, rtol=1e-5)
    made = torch.autograd.grad(losses.student + losses.teacher, both[0] + both[1])
    assert all(g.isfinite().all() and g.any() for g in made)


@pytest.mark.parametrize("temperature", [1e-12, 1e12])
@pytest.mark.parametrize("divergence", [kd.ForwardKL(), kd.ReverseKL(), kd.JSD()], ids=repr)
def test_the_ends_of_temperatures(backend, divergence, temperature):
    """The argmax alone, and nothing but 1/V."""
    problem, options = Problem(vocab=60), dict(divergence=divergence, temperature=temperature)
    (value, (grad,)), (truth, (true,)) = problem.run(backend, **options), problem.oracle(**options)
    assert torch.isclose(value.double(), truth, rtol=1e-5, atol=1e-6)
    rounding = 1e-6 / temperature
    if (
        divergence == kd.ReverseKL()
    ):  # its gradient holds log(q / p) - D, two numbers as large as the divergence
        rounding *= max(1.0, truth.item())
    assert grad.isfinite().all() and (grad - true).norm() <= 1e-5 * true.norm() + rounding


@pytest.mark.parametrize("columns,value", [(slice(5, 6), torch.nan), (slice(None), -torch.inf)])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_without_a_softmax_are_seen(backend, divergence, side, columns, value):
    """NaN logits, and nothing but -inf, in the row's loss and in its gradient, and nowhere else."""
    student, teacher = torch.randn(3, 300), torch.randn(3, 300)
    (student if side == "student" else teacher)[1, columns] = value
    student.requires_grad_()
    loss = kd.distillation_loss(student, teacher, divergence=divergence, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert student.grad.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("teacher_begins", [1, 6])
def test_rows_that_begin_anywhere(backend, dtype, inplace, teacher_begins):
    """Views into wider tensors: hardly a row begins at 16 bytes, the teacher's where the student's does or
    elsewhere, and what lies beside it stays as it was."""
    wide, teacher = torch.randn(5, 1103).to(dtype), torch.randn(5, 1103 + 8 * (teacher_begins > 1)).to(dtype)
    teacher = teacher[:, teacher_begins : teacher_begins + 1100]
    leaf = wide[:, 1:1101].double().requires_grad_()
    with kd.use_backend("reference"):
        truth = kd.js_divergence(leaf, teacher.double())
    (true,) = torch.autograd.grad(truth, leaf)
    given = wide.clone().requires_grad_()
    before = given.detach().clone()
    loss = kd.js_divergence((given * 1)[:, 1:1101] if inplace else given[:, 1:1101], teacher, inplace=inplace)
    (grad,) = torch.autograd.grad(loss, given)
    assert torch.isclose(loss.double(), truth, rtol=1e-5)
    assert true.norm() > 1e-6 and relative(grad[:, 1:1101], true) < 4 * torch.finfo(dtype).eps
    assert not grad[:, 0].any() and not grad[:, 1101:].any() and torch.equal(given, before)
