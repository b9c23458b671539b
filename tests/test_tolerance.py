"""``gradient_tolerance``: its bounds on every backend, what it leaves alone, and spectra that were made to break it."""

import dataclasses
import functools
import json

import pytest
import torch
from problems import Problem
from sparse_problems import SparseProblem

import kdkernels as kd
from benchmarks import pages
from benchmarks import tolerance as figures
from kdkernels.backends import native
from kdkernels.core import head_gradient, tiles
from kdkernels.core import tolerance as core_tolerance
from kdkernels.core.tolerance import keep

N, V, H = 48, 500, 24
#: fp32 rounds the squares, and the products.
ROUNDING = 1.001


def spectral(matrix):
    return torch.linalg.matrix_norm(matrix.double(), 2)


class Bounds:
    """A student head whose logit gradient has a spectrum, and the exact gradients in fp64."""

    def __init__(self, shared, loss, vocab=V):
        self.hidden, self.loss = torch.randn(N, H), loss
        # All rows of the lm_head share a component, as those of language models do.
        self.weight = torch.randn(vocab, H) + shared * torch.randn(H)
        self.teacher = 2 * torch.randn(N, vocab) - 1.5 * torch.arange(1, vocab + 1).log()
        self.labels = torch.randint(0, vocab // 10, (N,))

    def run(self, backend, *, double=False, **options):
        convert = (lambda t: t.double()) if double else (lambda t: t.clone())
        leaves = [convert(t).requires_grad_() for t in (self.hidden, self.weight)]
        with kd.use_backend(backend):
            value = self.loss(kd.LinearHead(*leaves), convert(self.teacher), self.labels, **options)
        return value.detach(), torch.autograd.grad(value.sum(), leaves)

    def of_logits(self):
        """The norm of the exact gradient for the logits."""
        logits = (self.hidden.double() @ self.weight.double().t()).requires_grad_()
        with kd.use_backend("reference"):
            return torch.autograd.grad(self.loss(logits, self.teacher.double(), self.labels).sum(), logits)[
                0
            ].norm()


def cross_entropy(student, teacher, labels, **options):
    return kd.cross_entropy(student, labels, **options)


def policy(student, teacher, labels, **options):
    """What arrives differs from token to token, and some have nothing."""
    arriving = torch.linspace(-1.0, 2.0, N).clamp(min=0.0)
    of = kd.token_log_probs(student, torch.stack([labels, 2 * labels], -1), entropy=True, **options)
    return -(of.log_probs.sum(-1) + 0.1 * of.entropy) * arriving.to(of.entropy.dtype)


LOSSES = {
    "kl": kd.kl_div,
    "jsd": functools.partial(kd.js_divergence, beta=0.3),
    "ce": cross_entropy,
    "z_loss": functools.partial(kd.distillation_loss, hard_weight=0.5, z_loss=0.1),
    "log_probs": policy,
}


#: (tokens, columns): all at once, some tokens, some of both. Each is wide enough that columns can be dropped.
TILES = [(N, V), (24, V), (10, 250)]


def cut(monkeypatch, tile):
    plan = tiles.plan

    def planned(**given):
        return dataclasses.replace(plan(**given), rows=tile[0], columns=tile[1])

    monkeypatch.setattr(tiles, "plan", planned)


@pytest.mark.parametrize(
    "tile, most_means", [*((tile, 64) for tile in TILES), (TILES[-1], 2)], ids=str
)  # where more chunks wait than means may, they are added in several passes
@pytest.mark.parametrize("tolerance", [0.3, 2.0**-6])
@pytest.mark.parametrize("shared", [0.0, 10.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_bounds(backend, loss, shared, tolerance, tile, most_means, monkeypatch):
    cut(monkeypatch, tile)
    monkeypatch.setattr(head_gradient, "_MOST_MEANS", most_means)
    problem = Bounds(shared, LOSSES[loss])
    true_value, (true_hidden, true_weight) = problem.run("reference", double=True)
    exact, plain = problem.run(backend)
    value, (hidden, weight) = problem.run(backend, gradient_tolerance=tolerance)
    assert torch.equal(value, exact)
    most = ROUNDING * tolerance * problem.of_logits()
    off = (hidden.double() - true_hidden).norm(), (weight.double() - true_weight).norm()
    assert off[0] <= most * spectral(problem.weight - problem.weight.mean(0))
    assert off[1] <= most * spectral(problem.hidden)
    sums = weight.double().sum(0), true_weight.sum(0)
    assert (sums[0] - sums[1]).norm() <= 1e-5 * weight.abs().sum(0).norm(), "the error's rows sum to 0"
    for mine, other, truth in zip((hidden, weight), plain, (true_hidden, true_weight)):
        assert truth.norm() > 1e-4
        assert (mine.double() - truth).norm() > 20 * (other.double() - truth).norm(), "nothing was dropped"


#: Name -> a gradient [n, V] and what a good choice of columns cannot be.
SPECTRA = {
    "power": lambda: torch.randn(N, V) * torch.arange(1, V + 1) ** -1.0,
    "exponential": lambda: torch.randn(N, V) * 0.9 ** torch.arange(V),
    "one column": lambda: torch.randn(N, V) * 1e-4 + torch.nn.functional.one_hot(torch.tensor(7), V),
    "one row": lambda: torch.cat([torch.randn(1, V) * torch.arange(1, V + 1) ** -2.0, torch.randn(N - 1, V) * 1e-9]),
    "one sign": lambda: torch.rand(N, V) * torch.arange(1, V + 1) ** -1.0,
    "tiny": lambda: 1e-11 * torch.randn(N, V) * torch.arange(1, V + 1) ** -1.0,
    "huge": lambda: 1e16 * torch.randn(N, V) * torch.arange(1, V + 1) ** -1.0,
    "two levels": lambda: torch.where(torch.arange(V) < 100, 1.0, 1e-3).expand(N, V) * torch.randn(N, V).sign(),
}  # fmt: skip


@pytest.mark.parametrize("by", ["native", "torch"])
@pytest.mark.parametrize("tolerance", [0.5, 2.0**-5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("aligned", [1, 64])
def test_spectra(spectrum, dtype, tolerance, by, aligned, monkeypatch):
    monkeypatch.setattr(core_tolerance, "_PLAIN", core_tolerance._PLAIN._replace(aligned=aligned))
    if by == "torch":
        monkeypatch.setattr(native, "serves_columns", lambda gradient: False)
    elif not native.serves_columns(torch.empty(1, 1, dtype=dtype)):
        pytest.skip("native has no columns of this dtype")
    gradient = SPECTRA[spectrum]().to(dtype)
    whole = gradient.double().clone()
    kept = keep(gradient, tolerance)
    assert kept is not None and kept.gradient.data_ptr() == gradient.data_ptr(), (
        "moved to the front of its rows"
    )
    ids, others = kept.ids, torch.ones(V, dtype=torch.bool).index_fill_(0, kept.ids, False)
    assert bool((ids.diff() > 0).all()) and kept.dropped == int(others.sum()) == V - ids.numel()
    assert torch.equal(kept.gradient.double(), whole[:, ids])
    squares = whole.square().sum(0)
    budget = tolerance**2 * squares.sum()
    assert squares[others].sum() <= ROUNDING * budget
    assert ids.numel() % aligned == 0
    least = squares[ids].sort().values[:aligned].sum()
    assert squares[others].sum() + least >= budget / ROUNDING, "so many more could have gone"
    rest = whole[:, others].sum(1)
    assert (kept.rest.double() - rest).norm() <= 1e-6 * whole.abs().sum(1).norm()
    mean = torch.where(others, (kept.rest.double() / kept.dropped)[:, None], whole)
    assert (mean - whole).norm() <= ROUNDING * tolerance * whole.norm()
    assert spectrum == "one row" or rest.norm() > 0


FLAT = torch.randn(N, V).sign()


@pytest.mark.parametrize(
    "gradient, tolerance",
    {
        "flat": (FLAT, 0.3),
        "exact": (SPECTRA["power"](), 0.0),
        "zero": (torch.zeros(N, V), 0.5),
        "NaN": (FLAT.clone().index_fill_(1, torch.tensor(3), torch.nan), 0.9),
        "infinity": (FLAT.clone().index_fill_(1, torch.tensor(3), torch.inf), 0.9),
        "its squares overflow": (1e25 * SPECTRA["power"](), 0.5),
        "its squares underflow": (1e-25 * SPECTRA["power"](), 0.5),
        "one column": (torch.randn(N, 1), 0.9),
    }.values(),
    ids=lambda given: None,
)
def test_dense(gradient, tolerance):
    """Where little can go, and where nothing can be told apart, the products stay whole."""
    before = gradient.clone()
    assert keep(gradient, tolerance) is None
    assert torch.equal(gradient.nan_to_num(7.0), before.nan_to_num(7.0))


def test_the_same_bits_each_time(backend, monkeypatch):
    cut(monkeypatch, TILES[-1])
    problem = Bounds(1.0, kd.kl_div)
    first, second = (problem.run(backend, gradient_tolerance=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


HEADS = {
    "bias": dict(bias=True),
    "softcap": dict(bias=True, softcap=30.0, logit_scale=0.7),
    "bf16": dict(bias=False, dtype=torch.bfloat16),
    "fp16": dict(bias=True, dtype=torch.float16),
}


def test_hidden_states_without_a_width(backend):
    """Only the bias makes logits, and only it learns."""
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((64, 0), (512, 0), (512,)))
    loss = kd.cross_entropy(kd.LinearHead(hidden, weight, bias), torch.arange(64), gradient_tolerance=0.5)
    loss.backward()
    assert bias.grad.norm() > 1e-2 and hidden.grad.shape == (64, 0) and weight.grad.shape == (512, 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("head", HEADS)
def test_forms(backend, head, reduction):
    """Masked tokens, a bias (whose gradient is exact), deferred backwards: near, and not the same."""
    problem = Problem(student="head", teacher="head", shape=(4, 16), scale=5.0, **HEADS[head])
    options = dict(hard_weight=0.3, reduction=reduction)
    _, truth = problem.oracle(**options)
    exact, plain = problem.run(backend, **options)
    value, near = problem.run(backend, gradient_tolerance=0.1, **options)
    assert torch.equal(value, exact)
    for mine, other, true in zip(near[:2], plain[:2], truth[:2]):
        distance = (mine.double() - true).norm() / true.norm()
        assert not torch.equal(mine, other) and distance < 0.3, distance
    assert len(near) == 2 or torch.equal(near[2], plain[2])


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate", "conditional"])
def test_sparse_targets(backend, tail):
    problem = SparseProblem(student="head", tail=tail, shape=(4, 16), scale=5.0, bias=False)
    _, truth = problem.oracle(hard_weight=0.2)
    _, plain = problem.run(backend, hard_weight=0.2)
    _, near = problem.run(backend, hard_weight=0.2, gradient_tolerance=0.1)
    for mine, other, true in zip(near, plain, truth):
        distance = (mine.double() - true).norm() / true.norm()
        assert not torch.equal(mine, other) and distance < 0.3, distance


def test_codistillation(backend):
    """Both models' products."""
    heads = [
        [torch.randn(64, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)] for _ in "st"
    ]
    labels = torch.randint(0, 300, (64,))

    def gradients(**options):
        both = kd.codistillation_loss(*(kd.LinearHead(*head) for head in heads), labels, **options)
        return torch.autograd.grad(both.student + both.teacher, sum(heads, []))

    with kd.use_backend("reference"):
        truth = gradients()
    for mine, other, true in zip(gradients(gradient_tolerance=0.1), gradients(), truth):
        distance = (mine - true).norm() / true.norm()
        assert not torch.equal(mine, other) and 1e-3 < distance < 0.3, distance


@pytest.mark.parametrize("trains", [(True, False), (False, True)])
def test_what_is_frozen_gets_nothing(backend, trains):
    problem = Bounds(1.0, kd.kl_div)
    _, truth = problem.run("reference", double=True)
    leaves = [t.requires_grad_(train) for t, train in zip((problem.hidden, problem.weight), trains)]
    kd.kl_div(kd.LinearHead(*leaves), problem.teacher, gradient_tolerance=0.1).backward()
    for leaf, train, true in zip(leaves, trains, truth):
        assert (leaf.grad is not None) == train
        assert not train or 1e-3 < (leaf.grad - true).norm() / true.norm() < 0.3


@pytest.mark.parametrize("loss", [functools.partial(kd.kl_div, reduction="none"), policy])
def test_token_losses_of_a_frozen_lm_head_are_exact(backend, loss):
    """Their gradient is made before it is known what arrives for each token."""
    problem = Bounds(1.0, loss)
    problem.hidden.requires_grad_()

    def gradient(**options):
        head = kd.LinearHead(problem.hidden, problem.weight)
        losses = loss(head, problem.teacher, problem.labels, **options)
        return torch.autograd.grad(losses.sum(), problem.hidden)[0]

    assert torch.equal(gradient(), gradient(gradient_tolerance=0.3))


def test_weightless_tokens_may_hold_nan(backend):
    problem = Bounds(1.0, kd.kl_div)
    weights = torch.ones(N)
    weights[3] = 0
    clean = problem.run(backend, token_weights=weights, gradient_tolerance=0.1)[1]
    problem.hidden[3] = torch.nan
    dirty = problem.run(backend, token_weights=weights, gradient_tolerance=0.1)[1]
    assert dirty[1].isfinite().all() and torch.equal(clean[1], dirty[1])


def test_a_cut_vocabulary(backend):
    problem = Bounds(1.0, kd.kl_div)
    problem.labels[:5] = -100
    _, (hidden, weight) = problem.run(backend, gradient_tolerance=0.1, vocab_size=V - 50)
    _, (true_hidden, true_weight) = problem.run("reference", double=True, vocab_size=V - 50)
    assert not weight[V - 50 :].any() and not hidden[:5].any()
    assert 1e-3 < (weight - true_weight).norm() / true_weight.norm() < 0.3
    assert 1e-3 < (hidden - true_hidden).norm() / true_hidden.norm() < 0.3


def test_given_logits_stay_exact(backend):
    problem = Problem()
    assert all(
        torch.equal(a, b)
        for a, b in zip(problem.run(backend)[1], problem.run(backend, gradient_tolerance=0.5)[1])
    )


@pytest.mark.slow
def test_compiled():
    problem = Bounds(1.0, kd.kl_div)
    leaves = [t.requires_grad_() for t in (problem.hidden, problem.weight)]
    loss = lambda h, w: kd.kl_div(kd.LinearHead(h, w), problem.teacher, gradient_tolerance=0.1)  # noqa: E731
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))


def test_several_divergences(backend):
    """Token losses whose gradient is made in the backward, as one sum."""
    problem = Bounds(1.0, lambda *given, **options: sum(kd.distillation_loss(*given, **options)))
    options = dict(divergence=(kd.ForwardKL(), kd.JSD(0.5)), reduction="none")
    _, truth = problem.run("reference", double=True, **options)
    _, plain = problem.run(backend, **options)
    _, near = problem.run(backend, gradient_tolerance=0.1, **options)
    for mine, other, true in zip(near, plain, truth):
        assert not torch.equal(mine, other) and (mine - true).norm() / true.norm() < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_columns_of_wide_rows(dtype):
    """More than a block of columns, and of rows, with a rest of each; rows that lie apart."""
    if not native.serves_columns(torch.empty(1, 1, dtype=dtype)):
        pytest.skip("native is not built")
    gradient = torch.randn(67, 9001).to(dtype)[:, :8997]
    whole, ids = gradient.double(), torch.randperm(8997)[:4003].sort().values
    squares = native.column_squares(gradient)
    torch.testing.assert_close(squares, whole.square().sum(0), rtol=1e-5, atol=0)
    rest = native.gather_columns(gradient, ids)
    others = torch.ones(8997, dtype=torch.bool).index_fill_(0, ids, False)
    assert torch.equal(gradient[:, :4003].double(), whole[:, ids])
    torch.testing.assert_close(rest.double(), whole[:, others].sum(1), rtol=1e-5, atol=1e-4)


def test_the_figures_are_of_the_committed_json():
    committed = json.loads((pages.ROOT / "benchmarks" / "results" / "tolerance.json").read_text())
    assert pages.is_filled("tolerance", figures.table(committed))


def test_the_benchmark(tmp_path):
    """On a fixture of random numbers: errors grow with the tolerance, times are there, and the picture is drawn."""
    fixture = {"labels": torch.randint(0, 300, (32,)), "weight": torch.randn(300, 8)}
    fixture |= {name: 2 * torch.randn(32, 8) for name in ("teacher", *figures.STUDENTS)}
    result = figures.measure(fixture, 8, 1)
    for case in result["cases"]:
        errors = case["errors"]
        assert errors[0]["kept"] >= errors[-1]["kept"] and errors[0]["dH"] <= errors[-1]["dH"] < 0.5
        assert errors[-1]["dW"] > 1e-4 and min(case["seconds"].values()) > 0
    assert "2^-8" in figures.table(result) and set(figures.ratios(case)) == {
        "exact",
        "10",
        "9",
        "8",
        "7",
        "6",
    }
    figures.picture(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
