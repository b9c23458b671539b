"""Peak memory, measured: no [N, V] temporaries, and budgets that hold."""

import resource
import sys

import pytest
import torch
import torch.nn.functional as F
from peak import peak_of

import kdkernels as kd
from benchmarks.inputs import handed
from benchmarks.variants import eager_kl
from kdkernels.core.rows import HeadRows

N, V, H = 256, 65536, 128
UNIT = N * V * 4
SLACK = 24 * 2**20  # allocator and huge-page rounding


def gradient_of(loss, s, t):
    leaf = s.detach().requires_grad_()
    loss(leaf, t).backward()
    return leaf.grad


@pytest.mark.parametrize("divergence", [kd.ForwardKL(), kd.JSD(0.5)], ids=str)
def test_logits_cost_one_gradient(divergence):
    s, t = torch.randn(N, V), torch.randn(N, V)
    loss = lambda a, b: kd.distillation_loss(a, b, divergence=divergence, chunk_bytes=2**24)  # noqa: E731
    assert peak_of(lambda: gradient_of(loss, s, t)) <= UNIT + SLACK + 2**24
    assert peak_of(lambda: gradient_of(eager_kl, s, t)) >= 3 * UNIT, "the measurement sees nothing"


def test_inplace_costs_nothing():
    s, t = torch.randn(N, V), torch.randn(N, V)
    run = lambda: kd.kl_div(handed(s), t, inplace=True, chunk_bytes=2**24).backward()  # noqa: E731
    assert peak_of(run) <= SLACK + 2**24


CHUNK = 2**22


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def logits_of_another(form, dtype):
    """(dense buffer, a view of it as the form says, the teacher for it)."""
    if form == "shifted":  # as labels want them; the teacher is cut likewise
        shape = 2, N // 2 + 1, V
        return torch.randn(shape).to(dtype), lambda x: x[:, :-1], torch.randn(shape).to(dtype)[:, 1:]
    if form == "transposed":
        return torch.randn(V, N).to(dtype), lambda x: x.t(), torch.randn(V, N).to(dtype).t()
    if form == "flattened":
        return torch.randn(2, N // 2, V).to(dtype), lambda x: x.view(-1, V), torch.randn(N, V).to(dtype)
    teacher = torch.randn(N, V).to(dtype)
    if form == "head beside":
        teacher = kd.LinearHead(torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype))
    return torch.randn(N, V).to(dtype), lambda x: x, teacher


@pytest.mark.parametrize("form", ["plain", "transposed", "flattened", slow("shifted"), slow("head beside")])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["none", slow("mean")])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, slow(torch.float16), slow(torch.float64)], ids=str
)
def test_logits_cost_one_gradient_of_their_own_dtype(dtype, reduction, inplace, form):
    """Nothing in place: no half-precision gradient is widened to be scaled, and no layout copied whole.

    In place the backward goes through the view, but not through a slice, of which torch makes a gradient of the whole.
    """
    buffer, view, teacher = logits_of_another(form, dtype)
    labels = torch.randint(0, V, view(buffer).shape[:-1])
    labels[..., ::2] = -100

    def run():
        if not inplace:
            student = view(buffer).detach().requires_grad_()
        else:
            student = handed(view(buffer)) if form == "shifted" else view(handed(buffer))
        loss = kd.kl_div(student, teacher, labels, reduction=reduction, inplace=inplace, chunk_bytes=CHUNK)
        return (loss.sum() * 0.5).backward() if inplace else torch.autograd.grad(loss.sum() * 0.5, student)

    unit = buffer.numel() * buffer.element_size()
    assert unit > SLACK + CHUNK, "a copy would fit"
    assert peak_of(run) <= (0 if inplace else unit) + SLACK + CHUNK


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)], ids=str)
def test_a_kept_gradient_costs_one_more(dtype):
    """retain_graph=True: the gradient stays, and what is handed over is scaled into memory of its own."""
    logits, teacher = torch.randn(N, V).to(dtype).requires_grad_(), torch.randn(N, V).to(dtype)

    def run():
        loss = kd.kl_div(logits, teacher, reduction="none", chunk_bytes=CHUNK)
        return loss, torch.autograd.grad(loss.sum(), logits, retain_graph=True)

    assert peak_of(run) <= 2 * N * V * 2 + SLACK + CHUNK


@pytest.mark.parametrize("reduction", ["mean", slow("none")])
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16), slow(torch.float16)], ids=str)
@pytest.mark.parametrize("chunk_bytes", [slow(2**25), 2**22])
def test_heads_stay_in_the_budget(dtype, chunk_bytes, reduction):
    hidden, weight, teacher, t_weight = (
        torch.randn(*shape).to(dtype) for shape in ((N, H), (V, H), (N, H), (V, H))
    )
    hidden.requires_grad_(), weight.requires_grad_()

    def run():
        hidden.grad = weight.grad = None
        student = kd.LinearHead(hidden, weight)
        loss = kd.kl_div(
            student, kd.LinearHead(teacher, t_weight), reduction=reduction, chunk_bytes=chunk_bytes
        )
        loss.sum().backward()

    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    accumulator = 0 if dtype == torch.float32 else weight.numel() * 4
    assert peak_of(run) <= gradients + accumulator + chunk_bytes + SLACK
    assert UNIT > chunk_bytes + SLACK, "the logits would have fitted anyway"


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults")
def test_later_chunks_take_no_new_pages():
    """Four chunks of tokens, each of two tiles of 64 MiB: too large for malloc to keep, so new ones would be new pages."""
    tokens, vocab, width, tile = 1024, 65536, 8, 2**26
    student, teacher = (kd.LinearHead(torch.randn(tokens, width), torch.randn(vocab, width)) for _ in "ab")
    student.hidden.requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kd.kl_div(student, teacher, chunk_bytes=2 * tile).backward()
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert pages * resource.getpagesize() < 4 * tile


WALKS = {
    "vocabulary chunks": lambda s, t, y: kd.js_divergence(s, t, y, hard_weight=0.5, chunk_bytes=3000),
    "token chunks": lambda s, t, y: kd.kl_div(s, t, y, chunk_bytes=100_000),
    "several": lambda s, t, y: sum(
        kd.distillation_loss(
            s, t, y, divergence=(kd.JSD(), kd.ReverseKL()), reduction="none", chunk_bytes=3000
        )
    ).sum(),
    "both learn": lambda s, t, y: sum(kd.codistillation_loss(s, t, y, chunk_bytes=100_000)),
    "a live teacher's top tokens": lambda s, t, y: kd.kl_div(
        s, kd.top_k_target(t, 5, chunk_bytes=100_000), y, entropy_weight=0.1, chunk_bytes=3000
    ),
    "log-probabilities": lambda s, t, y: sum(
        of.sum() for of in kd.token_log_probs(s, y, entropy=True, chunk_bytes=3000)[:2]
    ),
    "log-probabilities of a frozen head": lambda s, t, y: kd.token_log_probs(
        kd.LinearHead(s.hidden, s.weight.detach()), y, entropy=True, chunk_bytes=100_000
    ).entropy.sum(),
}


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_nobody_reads_a_tile_after_the_next_one(backend, walk, monkeypatch):
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((70, 6), (500, 6), (70, 8), (500, 8))]
    labels, many = torch.randint(0, 500, (70,)), []

    def made():
        loss = walk(kd.LinearHead(*tensors[:2]), kd.LinearHead(*tensors[2:]), labels)
        return [loss, *torch.autograd.grad(loss, tensors, allow_unused=True)]

    def room(self, rows, columns):
        if self.memory is not None:
            self.memory.fill_(torch.nan)
            many.append(self)
        self.memory = self.hidden.new_empty(rows, columns, dtype=self.tile_dtype)
        return self.memory

    with kd.use_backend(backend):
        expected = made()
        monkeypatch.setattr(HeadRows, "_room", room)
        for ours, theirs in zip(made(), expected, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)
    assert many, "there was one tile"


def test_gathered_rows_take_no_more_than_logits():
    """Of "conditional": K gathered rows for each token would be 128 MiB, and as much in products."""
    tokens, vocab, width, slots = 256, 8192, 512, 256
    leaves = [torch.randn(tokens, width).requires_grad_(), torch.randn(vocab, width).requires_grad_()]
    target = kd.top_k_target(torch.randn(tokens, vocab), slots, tail="conditional")
    logits, grads = tokens * vocab * 4, sum(t.nbytes for t in leaves)
    peak = peak_of(lambda: kd.kl_div(kd.LinearHead(*leaves), target).backward())
    assert peak <= 2 * logits + grads + SLACK


def test_plain_heads_do_not_fit():
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H)
    teacher = torch.randn(N, V)
    run = lambda: eager_kl(F.linear(hidden, weight), teacher).backward()  # noqa: E731
    assert peak_of(run) >= 2 * UNIT
