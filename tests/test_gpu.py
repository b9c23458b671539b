"""What only a GPU has: graphs, streams, and compiled code on it. With ``--device cuda``; elsewhere they are skipped."""

import pytest
import torch

import kdkernels as kd


@pytest.fixture(autouse=True)
def on_a_gpu(request):
    if not request.config.getoption("--device").startswith("cuda"):
        pytest.skip("needs a GPU: --device cuda")


@pytest.fixture(params=["native", "triton"])
def kernels(request):
    if problem := kd.backends()[request.param]:
        pytest.skip(f"{request.param}: {problem}")
    with kd.use_backend(request.param):
        yield request.param


def problem(dtype=torch.bfloat16):
    """(student, teacher, labels, what F.kl_div makes of them in fp64: loss and gradient)."""
    student, teacher = torch.randn(64, 5003, dtype=dtype), torch.randn(64, 5003, dtype=dtype)
    labels = torch.randint(0, 5003, (64,))
    labels[::5] = -100
    return student, teacher, labels


def truth(student, teacher, labels):
    wide = student.double().requires_grad_()
    with kd.use_backend("reference"):
        loss = kd.distillation_loss(wide, teacher, labels, hard_weight=0.5)
    return loss, *torch.autograd.grad(loss, wide)


def run(student, teacher, labels):
    leaf = student.detach().requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, labels, hard_weight=0.5)
    return loss, *torch.autograd.grad(loss, leaf)


def assert_right(found, expected):
    for mine, theirs in zip(found, expected):
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert theirs.norm() > 1e-3 and error < 4e-3, error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_a_cuda_graph(kernels, dtype):
    """Captured once, replayed on other numbers."""
    static = problem(dtype)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run(*static)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(*static)
    for _ in range(2):
        for tensor, other in zip(static, problem(dtype)):
            tensor.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert_right(found, truth(*static))


def test_on_two_streams_at_once(kernels):
    """Rows that several blocks share must not meet those of the other stream."""
    problems, streams, found = [problem(), problem()], [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for _ in range(20):
        found.clear()
        for given, stream in zip(problems, streams):
            with torch.cuda.stream(stream):
                found.append(run(*given))
    torch.cuda.synchronize()
    for mine, given in zip(found, problems):
        assert_right(mine, truth(*given))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_as_one_graph(kernels, backend):
    given = problem()
    leaf = given[0].requires_grad_()
    compiled = torch.compile(
        lambda x, y, z: kd.distillation_loss(x, y, z, hard_weight=0.5), backend=backend, fullgraph=True
    )
    loss = compiled(leaf, *given[1:])
    assert_right((loss, *torch.autograd.grad(loss, leaf)), truth(leaf.detach(), *given[1:]))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_head_over_chunks_of_tokens(kernels, compiled):
    """dW is added up in fp32 by the products themselves."""
    hidden, weight = torch.randn(300, 64, dtype=torch.bfloat16), torch.randn(5003, 64) / 4
    head, labels = [hidden, weight.bfloat16()], torch.randint(0, 5003, (300,))
    teacher = [torch.randn_like(hidden), head[1].roll(1, 0)]

    def loss(*student, chunk_bytes=None):
        pair = kd.LinearHead(*student), kd.LinearHead(*teacher)
        return kd.distillation_loss(*pair, labels, hard_weight=0.5, chunk_bytes=chunk_bytes)

    wide = [t.double().requires_grad_() for t in head]
    with kd.use_backend("reference"):
        expected = torch.autograd.grad(loss(*wide), wide)
    leaves = [t.requires_grad_() for t in head]
    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    for chunk_bytes in (None, 5003 * 10 * 64, 5003 * 10 * 8):  # one chunk, several, and the vocabulary cut
        assert_right(torch.autograd.grad(run(*leaves, chunk_bytes=chunk_bytes), leaves), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nothing_waits(kernels, dtype):
    """Forward and backward only enqueue: a synchronisation would be an error here."""
    given = problem(dtype)
    run(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_beyond_2_to_the_31_entries(kernels):
    """Offsets are 64 bits wide: the last row is as right as the first."""
    rows, vocab = 2**31 // 131072 + 2, 131072
    if torch.cuda.mem_get_info()[0] < 4 * rows * vocab * 2:
        pytest.skip("needs 18 GB of free memory")
    student = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    student[-1].normal_()
    teacher = torch.zeros_like(student)
    teacher[-1].normal_()
    last = student[-1:].clone(), teacher[-1:].clone(), None
    leaf = student.requires_grad_()
    (gradient,) = torch.autograd.grad(kd.kl_div(leaf, teacher, reduction="sum"), leaf)
    wide = last[0].double().requires_grad_()
    with kd.use_backend("reference"):
        (expected,) = torch.autograd.grad(kd.kl_div(wide, last[1]), wide)
    assert_right([gradient[-1:]], [expected])
    assert not gradient[:-1].any()
