"""Triton's rows against the fp64 oracle, where block edges, dtypes and options meet the kernels.

``tests/test_triton.py`` runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import interpreter  # noqa: F401
import pytest
import test_conformance as conformance
import torch
from problems import Problem, assert_exact, relative
from test_conformance import (  # noqa: F401  (they need nothing but the backend)
    test_adversarial_rows,
    test_codistillation_under_an_offset,
    test_equal_models_have_exactly_no_gradient,
    test_impossible_teacher_token_is_infinite,
    test_leading_block_without_mass,
    test_rows_without_a_softmax_are_seen,
    test_same_inputs_same_bits,
    test_stats,
    test_sure_models,
)
from test_entropy import test_equal_models_feel_the_entropy_alone  # noqa: F401
from test_log_probs import Asked as Policy
from test_log_probs import (  # noqa: F401
    test_one_token_has_all_the_mass,
    test_padding_is_no_outcome,
    test_statistics,
    test_sure_tokens_keep_their_digits,
    test_values_that_must_come_out,
)

import kdkernels as kd
from kdkernels.backends.protocol import Tile
from kdkernels.backends.spec import Asked, Spec
from kdkernels.backends.triton import launch
from kdkernels.commands.verify.scenario import DIVERGENCES

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FULL = dict(temperature=2.0, hard_weight=0.5, label_smoothing=0.1, z_loss=0.01)
SMALL = dict(shape=(1, 3), ignored=1)


FEW = (kd.ForwardKL(), kd.JSD(0.5), kd.SkewReverseKL(0.1), kd.TotalVariation(), kd.AlphaBeta(0.2, 0.7))
ALL = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


@pytest.fixture(
    params=[pytest.param(d, marks=[] if d in FEW else pytest.mark.slow) for d in DIVERGENCES], ids=str
)
def divergence(request):
    """A third of them; the others where a test says ``ALL``, and in the slow part."""
    return request.param


@pytest.fixture
def backend():
    with kd.use_backend("triton"):
        yield "triton"


def tiles(student, teacher, divergence):
    one, numbers = torch.ones(1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    tile = Tile(student, teacher, None, one, numbers, 0, student.shape[1])
    return launch._Tiles(tile, Spec(kind=divergence.kind, asked=Asked.SOFT))


def check(problem, dtype=F32, **options):
    ours, oracle = problem.run("triton", **options), problem.oracle(**options)
    plain = problem.plain(
        **{k: v for k, v in options.items() if k in ("divergence", "temperature", "hard_weight")}
    )
    assert_exact(ours, oracle, plain, dtype=dtype)


def close(problem, **options):
    """For options that the plain formula of problems.py does not have."""
    value, grads = problem.run("triton", **options)
    true_value, true_grads = problem.oracle(**{k: v for k, v in options.items() if k != "chunk_bytes"})
    assert torch.allclose(value.double(), true_value, rtol=1e-5, atol=1e-6)
    for mine, truth in zip(grads, true_grads):
        assert truth.norm() > 1e-6 and relative(mine, truth) < 3e-6


@pytest.mark.parametrize("vocab", [127, 1000, 4097])
def test_widths(divergence, vocab):
    check(Problem(vocab=vocab, **SMALL), divergence=divergence)


def test_models_that_agree(divergence):
    """Logits that differ by 1e-3: the gradient is a small difference and must keep its digits."""
    problem = Problem(vocab=3001, shape=(1, 8), ignored=0, scale=4.0)
    problem.teacher = [problem.student[0] + 1e-3 * torch.randn(1, 8, 3001)]
    if isinstance(
        divergence, (kd.TotalVariation, kd.Overlap)
    ):  # whose gradient jumps where p and q are an ulp apart
        value, truth = (
            problem.run("triton", divergence=divergence)[0],
            problem.oracle(divergence=divergence)[0],
        )
        assert relative(value, truth) < 3e-4
    else:
        check(problem, divergence=divergence)


@pytest.mark.parametrize("vocab", [40_000, 33_001])
@pytest.mark.parametrize("divergence", [kd.ForwardKL(), kd.ReverseKL(), kd.JSD(0.3)], ids=str)
def test_rows_of_many_large_blocks(divergence, vocab):
    assert vocab > tiles(torch.empty(9, vocab), None, divergence).tile
    check(Problem(vocab=vocab, shape=(1, 5), ignored=3), divergence=divergence)


def test_one_token_vocabulary(divergence):
    value, grads = Problem(vocab=1, **SMALL).run("triton", divergence=divergence)
    assert value == float(divergence == kd.Overlap()) and grads[0].abs().max() == 0


@ALL
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_half_precision(divergence, dtype):
    check(Problem(vocab=1500, dtype=dtype, **SMALL), dtype, divergence=divergence, hard_weight=0.5)


@pytest.mark.parametrize("options", conformance.HARD_TERMS, ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 3_000])
def test_terms_under_an_offset(options, chunk_bytes):
    conformance.test_terms_under_an_offset("triton", 1e4, 3.0, options, chunk_bytes)


@pytest.mark.parametrize("pair", [(BF16, F32), (F32, F16)], ids=str)
def test_mixed_dtypes(pair):
    check(
        Problem(vocab=520, dtype=pair[0], teacher_dtype=pair[1], **SMALL),
        min(pair, key=lambda d: -torch.finfo(d).eps),
        divergence=kd.JSD(0.5),
    )


def test_vocabulary_chunks(divergence):
    problem = Problem(student="head", teacher="head", vocab=700, logit_scale=0.5, softcap=5.0, **SMALL)
    close(problem, divergence=divergence, chunk_bytes=6_000, **FULL)


@ALL
def test_whole_rows_with_everything(divergence):
    """Temperature, smoothing, z-loss, softcap and scale in the fused pass."""
    problem = Problem(student="head", teacher="head", vocab=1100, logit_scale=0.5, softcap=5.0, **SMALL)
    close(problem, divergence=divergence, **FULL)


@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_scale_without_softcap(chunk_bytes):
    problem = Problem(student="head", teacher="head", vocab=300, logit_scale=-0.5, **SMALL)
    close(problem, chunk_bytes=chunk_bytes, hard_weight=1.0)


@pytest.mark.parametrize(
    "options",
    [
        dict(reduction="none"),
        dict(reduction="sum"),
        dict(soft_weight=0.0, hard_weight=1.0),
        dict(labels=False),
        dict(temperature=3.0, temperature_squared=True),
        dict(vocab_size=250),
        dict(hard_weight=1.0),
        dict(token_weights=torch.tensor([[0.3, 0.0, 2.0]])),
    ],
    ids=str,
)
def test_options(options):
    problem = Problem(vocab=260, **SMALL)
    problem.labels.clamp_(max=249)
    close(problem, **options)


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1), dict(z_loss=0.01)], ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 3_000])
def test_cross_entropy(form, options, chunk_bytes):
    def loss(student, teacher, labels, **options):
        return kd.cross_entropy(student, labels, **options)

    close(Problem(student=form, vocab=600, **SMALL), loss=loss, chunk_bytes=chunk_bytes, **options)


@pytest.mark.parametrize("chunk_bytes", [None, 4000])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", ["logits", "head"])
def test_codistillation(form, chunk_bytes, temperature):
    problem = Problem(student=form, teacher=form, vocab=600, **SMALL)

    def run(name, convert):
        leaves = [[convert(t).requires_grad_() for t in side] for side in (problem.student, problem.teacher)]
        with kd.use_backend(name):
            losses = kd.codistillation_loss(
                *(problem.side(side) for side in leaves),
                problem.labels,
                divergence=kd.JSD(0.5),
                temperature=temperature,
                hard_weight=0.5,
                chunk_bytes=chunk_bytes,
            )
        return losses, torch.autograd.grad(losses.student * 2 + losses.teacher * 3, leaves[0] + leaves[1])

    ours, oracle = run("triton", torch.clone), run("reference", torch.Tensor.double)
    for mine, truth in zip(ours[0], oracle[0]):
        assert torch.isclose(mine.double(), truth, rtol=1e-5)
    for mine, truth in zip(ours[1], oracle[1]):
        assert truth.norm() > 1e-6 and relative(mine, truth) < 3e-6


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("chunk_bytes", [None, 2000])
def test_leading_chunk_of_padding(chunk_bytes, temperature):
    problem = Problem(student="head", teacher="head", vocab=200, **SMALL)
    for side in (problem.student, problem.teacher):
        side[2][:100] = -torch.inf
    problem.labels = torch.where(problem.labels >= 0, 100 + problem.labels % 100, -100)
    close(problem, chunk_bytes=chunk_bytes, temperature=temperature, hard_weight=0.5)


@pytest.mark.parametrize("divergence", [kd.ForwardKL(), kd.TotalVariation(), kd.AlphaBeta(0.2, 0.7)], ids=str)
def test_nan_is_never_hidden(divergence):
    student, teacher = torch.randn(2, 3, 3000)
    student[0, 2500] = teacher[1, 7] = torch.nan
    leaf = student.clone().requires_grad_()
    with kd.use_backend("triton"):
        loss = kd.distillation_loss(leaf, teacher, divergence=divergence, reduction="none")
        loss.sum().backward()
    assert loss[:2].isnan().all() and loss[2].isfinite()
    assert leaf.grad[:2].isnan().all() and leaf.grad[2].isfinite().all()


class TestInPlace:
    @pytest.mark.parametrize("vocab", [300, 5000])
    def test_the_gradient_takes_the_logits_place(self, divergence, vocab):
        """Rows between other memory, which stays as it was."""
        student, teacher = torch.randn(5, vocab + 9), torch.randn(5, vocab)
        labels = torch.tensor([3, -100, 0, vocab - 1, 7])
        wide = student[:, :vocab].double().requires_grad_()
        with kd.use_backend("reference"):
            kd.distillation_loss(
                wide, teacher.double(), labels, divergence=divergence, hard_weight=1.0
            ).backward()
        given = (student * 1.0).requires_grad_()
        logits = (given * 1.0)[:, :vocab]
        around = logits._base.detach()
        before = around[:, vocab:].clone()
        with kd.use_backend("triton"):
            loss = kd.distillation_loss(
                logits, teacher, labels, divergence=divergence, hard_weight=1.0, inplace=True
            )
        loss.backward()
        assert relative(around[:, :vocab], wide.grad) < 2e-6
        assert torch.equal(around[:, vocab:], before)


class TestFewRows:
    """Rows cut into parts, which are merged in order."""

    def test_parts(self, divergence):
        problem = Problem(vocab=9000, shape=(1, 2), ignored=0)
        made = tiles(problem.student[0][0], problem.teacher[0][0], divergence)
        assert made.few and made.parts[0] > 2
        check(problem, divergence=divergence)

    def test_parts_with_everything(self):
        problem = Problem(student="head", teacher="head", vocab=9000, shape=(1, 3), ignored=1, softcap=30.0)
        close(problem, divergence=kd.JSD(0.3), **FULL)

    def test_an_alternative_cut_gives_the_same(self, monkeypatch):
        student, teacher = torch.randn(2, 3, 9000)
        losses = []
        for multiprocessors in (1, 4, 9):
            monkeypatch.setattr(
                launch, "_chip", lambda device, n=multiprocessors: launch.Chip("nvidia", n, 0, 32)
            )
            with kd.use_backend("triton"):
                losses.append(kd.kl_div(student.double().float(), teacher))
        assert torch.allclose(torch.stack(losses), losses[0], rtol=1e-6)


@pytest.mark.parametrize(
    "divergence, within",
    [(kd.JSD(0.99999), 1e-5), (kd.SkewKL(0.99999), 1e-3), (kd.SkewReverseKL(0.99999), 1e-3)],
    ids=str,
)
def test_what_a_share_leaves_of_1(divergence, within):
    """1 - 0.99999 in fp32 would be wrong by 1.4e-3."""
    student, teacher = torch.randn(2, 5, 300)

    def run(backend, dtype):
        leaf = student.to(dtype).requires_grad_()
        with kd.use_backend(backend):
            loss = kd.distillation_loss(leaf, teacher.to(dtype), divergence=divergence)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    for mine, true in zip(run("triton", F32), run("reference", torch.float64)):
        assert relative(mine, true) < within


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1.0, 2.5, 1 + 1e-9])
def test_scale(dtype, factor):
    wide = torch.promote_types(dtype, F32)
    values, by = torch.randn(3, 50_001, dtype=torch.float64).to(dtype), torch.tensor(factor, dtype=wide)
    scaled, exact = launch.scale_(values.clone(), by), values.to(wide) * by
    assert torch.allclose(scaled.to(wide), exact, rtol=torch.finfo(dtype).eps, atol=0.0)


def test_divergences_are_all_here():
    assert {d.code for d in DIVERGENCES} == {*range(1, 9), kd.Overlap.code}


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("form", ["logits", "head", "frozen"])
def test_log_probs_and_entropies(form, dtype):
    asked = Policy(form, slots=3, dtype=dtype, softcap=6.0)
    options = dict(temperature=torch.rand(2, 4, dtype=torch.float64) + 0.5)
    chunk_bytes = None if form == "logits" else 20_000
    assert_exact(
        asked.run("triton", chunk_bytes=chunk_bytes, **options),
        asked.oracle(**options),
        asked.plain(**options),
        dtype=dtype,
        projected=form != "logits",
    )


@pytest.mark.parametrize("divergence", [kd.ForwardKL(), kd.JSD(0.5)], ids=str)
def test_an_entropy_beside_a_divergence(divergence):
    close(Problem(**SMALL), divergence=divergence, entropy_weight=-0.7, **FULL)
