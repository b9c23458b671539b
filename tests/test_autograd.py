"""Autograd, torch.compile and autocast: the operators behave as torch's own do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import Problem, arguments, relative

import kdkernels as kd
from kdkernels.core import autograd, checked, rows


def test_retained_graph_gives_the_same_gradient_twice(backend):
    for form in ("logits", "head"):
        problem = Problem(student=form)
        leaves = [t.clone().requires_grad_() for t in problem.student]
        loss = kd.kl_div(problem.side(leaves), problem.teacher[0], problem.labels) * 3
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(kept, second))
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            torch.autograd.grad(loss, leaves)


def test_double_backward_is_refused_not_wrong(backend):
    leaf = torch.randn(3, 10, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(kd.kl_div(leaf, torch.randn(3, 10)), leaf, create_graph=True)
    arriving = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(kd.kl_div(leaf, torch.randn(3, 10)), leaf, arriving, create_graph=True)


def test_reference_is_twice_differentiable():
    t = torch.randn(2, 5, dtype=torch.float64)
    with kd.use_backend("reference"):
        s = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda x: kd.kl_div(x, t), s)


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("splits", [(1, 1, 1), (1, 2), (3,)])
def test_accumulation_does_not_depend_on_the_split(backend, form, splits):
    problem = Problem(student=form, ignored=4)
    items = int((problem.labels >= 0).sum())
    whole = problem.run(backend)[1]
    leaves = [t.clone().requires_grad_() for t in problem.student]
    start = 0
    for size in splits:
        part = slice(start, start + size)
        student = problem.side([leaves[0][part], *leaves[1:]])
        kd.kl_div(student, problem.teacher[0][part], problem.labels[part], num_items=items).backward()
        start += size
    for leaf, expected in zip(leaves, whole):
        assert relative(leaf.grad, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inplace_writes_the_gradient_over_the_logits(backend, dtype):
    base, teacher = torch.randn(2, 3, 500).to(dtype), torch.randn(2, 3, 500).to(dtype)
    leaf = base.clone().requires_grad_()
    kd.js_divergence(leaf, teacher, vocab_size=490).backward()
    source = base.clone().requires_grad_()
    logits = source * 1
    kd.js_divergence(logits, teacher, vocab_size=490, inplace=True).backward()
    assert torch.equal(source.grad, leaf.grad) and not leaf.grad[..., 490:].any()
    assert torch.equal(logits.detach(), leaf.grad) or dtype == torch.float16


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_that_was_written_to_is_an_error(backend, reduction):
    """The logits hold it until the backward; a second loss would take them for logits."""
    leaf, teacher = torch.randn(3, 10, requires_grad=True), torch.randn(3, 10)

    def lost(write):
        logits = leaf * 1
        loss = kd.kl_div(logits, teacher, inplace=True, reduction=reduction).sum()
        write(logits)
        with pytest.raises(RuntimeError, match="inplace=True has left their gradient.*clone them before"):
            loss.backward()

    lost(lambda logits: logits.detach().zero_())
    lost(lambda logits: kd.kl_div(logits, teacher, inplace=True))


def test_parts_of_a_tensor_in_place(backend):
    """Rows, columns and what lies beside them: each part is written by its own loss."""
    leaf, teacher = torch.randn(4, 20, requires_grad=True), torch.randn(4, 10)

    def gradient(inplace):
        logits = leaf * 1
        parts = logits[:2, :10], logits[2:, :10], logits[:, 10:]
        losses = [kd.kl_div(part, t, inplace=inplace) for part, t in zip(parts, (*teacher.split(2), teacher))]
        return torch.autograd.grad(sum(losses), leaf)[0]

    assert torch.equal(gradient(True), gradient(False)) and gradient(True).norm() > 1e-3


def test_only_inplace_overwrites(backend):
    problem = Problem()
    before = problem.student[0].clone(), problem.teacher[0].clone()
    leaf = problem.student[0].requires_grad_()
    kd.js_divergence(leaf, problem.teacher[0], problem.labels).backward()
    assert torch.equal(leaf.detach(), before[0]) and torch.equal(problem.teacher[0], before[1])


@pytest.mark.parametrize("ours", ["kl_div", "token_log_probs"])
@pytest.mark.parametrize("view", [lambda y: y, lambda y: y.view(2, 3, 5)], ids=["whole", "view"])
def test_overwriting_what_autograd_needs_is_an_error(backend, ours, view):
    """tanh saves its output, and log_softmax another loss's: overwriting them must not give a wrong gradient silently."""
    source, teacher, ids = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5), torch.arange(6) % 5

    def loss(inplace, logits):
        given = view(logits)
        if ours == "kl_div":
            return kd.kl_div(given, view(teacher), inplace=inplace)
        return kd.token_log_probs(given, ids.view(given.shape[:-1]), inplace=inplace).log_probs.sum()

    def refused(made):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made.backward()

    refused(loss(True, source.tanh()))
    if ours == "kl_div":  # which overwrites in the forward
        for other in (lambda y: y.square().sum(), lambda y: kd.token_log_probs(y, ids).log_probs.sum()):
            logits = source * 1
            refused(other(logits) + loss(True, logits))


class Viewed(torch.autograd.Function):
    """A view of which torch knows nothing, as DTensor.to_local() makes them."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("view", [lambda y: y.view(-1, 10), Viewed.apply], ids=["view", "Function"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_view_in_place_is_differentiated_as_a_view(backend, view, reduction):
    """torch would differentiate one that was written to as as_strided, which takes a gradient more."""
    source, teacher = torch.randn(2, 3, 10, requires_grad=True), torch.randn(2, 3, 10)
    gradients = []
    for inplace in (False, True):
        logits = view(source * 1)
        of = logits.grad_fn
        loss = kd.kl_div(logits, teacher.view(logits.shape), inplace=inplace, reduction=reduction).sum()
        nodes, found = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            found.add(node)
            nodes += [each for each, _ in node.next_functions if each is not None]
        assert of in found
        gradients += torch.autograd.grad(loss, source)
    assert torch.equal(*gradients) and gradients[0].any()


def test_a_hook_on_a_view_that_was_overwritten():
    """FSDP sets one on what a module returns; torch's own state of such a view ends the process. In one of its own."""
    for view in ("y[:, 1:]", "y.view(2, -1)", "Viewed.apply(y)"):
        code = f"""
import torch, kdkernels as kd
from test_autograd import Viewed
source = torch.randn(2, 3, 10, requires_grad=True)
gradients = []
for inplace, before in ((False, True), (True, False), (True, True)):
    y = source * 1
    logits = {view}
    called = []
    if before:
        logits.register_hook(lambda gradient: called.append("before"))
    loss = kd.kl_div(logits, torch.zeros_like(logits), inplace=inplace)
    try:
        logits.register_hook(lambda gradient: called.append("after"))
    except RuntimeError as error:
        assert inplace and "modified inplace" in str(error), error
    gradients += torch.autograd.grad(loss, source)
    assert ("before" in called) == before
assert all(torch.equal(gradients[0], each) for each in gradients) and gradients[0].any()
"""
        where = dict(os.environ, PYTHONPATH=f"{Path(__file__).parent}:{Path(__file__).parent / 'support'}")
        made = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True)
        assert made.returncode == 0, (view, made.returncode, made.stderr)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_parts_get_no_gradient(backend, frozen):
    problem = Problem(student="head")
    whole = problem.run(backend)[1]
    hidden, weight, bias = (t.clone() for t in problem.student)
    live = hidden if frozen == "weight" else weight
    live.requires_grad_()
    kd.kl_div(kd.LinearHead(hidden, weight, bias), problem.teacher[0], problem.labels).backward()
    assert relative(live.grad, whole[0 if frozen == "weight" else 1]) < 1e-6


def test_frozen_head_costs_no_weight_product(backend, monkeypatch):
    from kdkernels.core.head_gradient import WeightGradient

    monkeypatch.setattr(WeightGradient, "add", lambda *a, **o: pytest.fail("dW was computed"))
    problem = Problem(student="head")
    hidden = problem.student[0].requires_grad_()
    kd.kl_div(kd.LinearHead(hidden, *problem.student[1:]), problem.teacher[0]).backward()


def test_no_grad_computes_no_gradient(backend, monkeypatch):
    from kdkernels.core.rows import HeadRows

    monkeypatch.setattr(HeadRows, "backward", lambda *a: pytest.fail("a gradient was computed"))
    problem = Problem(student="head")
    with torch.no_grad():
        kd.kl_div(problem.side([t.requires_grad_() for t in problem.student]), problem.teacher[0])


@pytest.mark.parametrize("divergence", [kd.JSD, kd.Mixed, kd.AlphaBeta])
def test_compile_a_divergence_that_changes(divergence):
    """A second value makes a compiler take the number as unknown: its check must not stop it."""
    torch._dynamo.reset()
    s, t = torch.randn(2, 3, 20)

    def loss(number):
        return kd.distillation_loss(s, t, divergence=divergence(number))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for number in (0.25, 0.5):
        assert torch.allclose(compiled(number), loss(number))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_losses_of_a_frozen_head_are_projected_once(backend, monkeypatch, dtype):
    problem = Problem(student="head", dtype=dtype, softcap=5.0)
    tiles, tile = [], rows.HeadRows.tile
    monkeypatch.setattr(rows.HeadRows, "tile", lambda *given: tiles.append(1) or tile(*given))
    options = dict(temperature=1.7, hard_weight=0.5, reduction="none", divergence=kd.JSD(0.3))

    def losses(student, teacher, labels):
        frozen = kd.LinearHead(
            student.hidden, *(t.detach() for t in student.tensors()[1:]), softcap=student.softcap
        )
        return kd.distillation_loss(frozen, teacher, labels, **options)

    def of(name, double=False):
        leaves = [t.double() if double else t.clone() for t in (*problem.student, *problem.teacher)]
        hidden = leaves[0].requires_grad_()
        with kd.use_backend(name):
            value = losses(problem.side(leaves[:-1]), leaves[-1], problem.labels)
        arriving = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
        return value.detach(), torch.autograd.grad(value, hidden, arriving)[0]

    value, grad = of(backend)
    assert len(tiles) == 1
    truth, true_grad = of("reference", double=True)
    ulp = torch.finfo(dtype).eps
    assert torch.allclose(value.double(), truth, rtol=4 * ulp, atol=4 * ulp)
    assert true_grad.norm() > 1e-3 and relative(grad, true_grad) < 4 * ulp


@pytest.mark.parametrize("form", ["logits", "head"])
def test_opcheck(form):
    def tensors(grad):
        if form == "logits":
            return [torch.randn(4, 20, requires_grad=grad)]
        return [torch.randn(4, 6, requires_grad=grad), torch.randn(20, 6, requires_grad=grad)]

    detached = [t.detach() for t in tensors(True)], *arguments(tensors(True), torch.randn(4, 20))[1:]
    torch.library.opcheck(autograd.rows, detached)
    torch.library.opcheck(autograd.deferred, arguments(tensors(True), torch.randn(4, 20)))
    gradients = [torch.randn_like(t) for t in tensors(False)]
    torch.library.opcheck(autograd.attach, (torch.randn(()), tensors(True), gradients))
    labels, mask = torch.tensor([[1, -100, 2]]), torch.tensor([[1, 1, 0]])
    for given in ((labels, None), (labels, mask), (None, mask)):
        torch.library.opcheck(checked.checked_labels, (*given, 20, -100))
    torch.library.opcheck(checked.checked_items, (torch.tensor(3), torch.rand(4)))
    for given in ((torch.rand(4), torch.tensor([1, -1, 2, 3])), (torch.rand(1), None)):
        torch.library.opcheck(checked.checked_numbers, (*given, "temperature"))
    if form == "logits":
        student, *rest = arguments(tensors(False), torch.randn(4, 20))
        torch.library.opcheck(autograd.rows_, (student[0], *rest[:-2]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_teacher_from_inference_mode(backend, reduction):
    """As teachers usually are: hidden states and a head that autograd cannot save."""
    problem = Problem(student="head", teacher="head")
    with torch.inference_mode():
        inference = problem.side([t.clone() for t in problem.teacher])
    leaves = [t.clone().requires_grad_() for t in problem.student]
    loss = kd.kl_div(problem.side(leaves), inference, problem.labels, reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), leaves)
    value, same = problem.run(backend, reduction=reduction)
    assert torch.equal(loss, value) and all(torch.equal(a, b) for a, b in zip(grads, same))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_backwards_at_once(backend, dtype, reduction):
    """is_grads_batched, jacobian(vectorize=True), and torch.func.vmap over torch.autograd.grad."""
    s, t = torch.randn(4, 30).to(dtype), torch.randn(4, 30).to(dtype)
    loss = lambda x: kd.kl_div(x, t, torch.tensor([1, 2, -100, 3]), reduction=reduction)  # noqa: E731
    jacobian = lambda **options: torch.autograd.functional.jacobian(loss, s, **options)  # noqa: E731
    one_by_one, at_once = jacobian(), jacobian(vectorize=True)
    leaf = s.clone().requires_grad_()
    value = loss(leaf)
    each = torch.eye(4) if reduction == "none" else torch.tensor([1.0, 2.0])
    (batched,) = torch.autograd.grad(value, leaf, each, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda g: torch.autograd.grad(value, leaf, g, retain_graph=True)[0])(each)
    assert one_by_one.norm() > 1e-2 and torch.equal(at_once, one_by_one)
    expected = torch.stack([torch.autograd.grad(value, leaf, g, retain_graph=True)[0] for g in each])
    assert expected.norm() > 1e-2 and torch.equal(batched, expected) and torch.equal(mapped, expected)


HEAD = kd.LinearHead(torch.randn(4, 6), torch.randn(10, 6))
TRANSFORMS = {
    "grad": lambda s, t: torch.func.grad(lambda x: kd.kl_div(x, t))(s),
    "grad of a head": lambda s, t: torch.func.grad(lambda h: kd.kl_div(kd.LinearHead(h, HEAD.weight), t))(
        HEAD.hidden
    ),
    "vmap": lambda s, t: torch.func.vmap(lambda x: kd.kl_div(x, t[0]))(s),
    "vmap of both": lambda s, t: torch.func.vmap(kd.js_divergence)(s, t),
    "jacrev": lambda s, t: torch.func.jacrev(lambda x: kd.kl_div(x, t, reduction="none"))(s),
    "per sample": lambda s, t: torch.func.vmap(torch.func.grad(kd.kl_div))(s, t),
    "co": lambda s, t: torch.func.grad(
        lambda x: kd.codistillation_loss(x, t, torch.tensor([1, 2, 3, 4])).student
    )(s),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms_name_us_and_the_way_out(backend, transform):
    s, t = torch.randn(2, 4, 10)
    with pytest.raises(
        RuntimeError, match="kdkernels.*use torch.autograd.grad.*use_backend\\('reference'\\)"
    ) as caught:
        TRANSFORMS[transform](s, t)
    assert "\n" not in str(caught.value)
    with kd.use_backend("reference"):
        assert TRANSFORMS[transform](s, t).norm() > 1e-3


def test_vmap_over_what_is_said_of_tokens_is_refused(backend):
    s, t, y = torch.randn(4, 10), torch.randn(4, 10), torch.tensor([[1, 2, 3, 4]] * 2)
    sparse = torch.func.vmap(
        lambda ids: kd.kl_div(s, kd.SparseTarget(ids[:, None], s[:, :1].log_softmax(-1)))
    )
    for call, name in [
        (torch.func.vmap(lambda y: kd.cross_entropy(s, y)), "labels"),
        (torch.func.vmap(lambda y: kd.kl_div(s, t, token_weights=y)), "token_weights"),
        (torch.func.vmap(lambda y: kd.token_log_probs(s, y).log_probs), "ids"),
        (sparse, "SparseTarget's tensors"),
        (torch.func.vmap(lambda y: kd.kl_div(s, t, temperature=y[0])), "temperature"),
        (torch.func.vmap(lambda y: kd.kl_div(s, t, num_items=y[0])), "num_items"),
        (torch.func.vmap(lambda y: kd.top_k_target(y.float(), 2).ids), "teacher"),
    ]:
        with pytest.raises(RuntimeError, match=f"vmap over {name} cannot see through kdkernels"):
            call(y)
    slopes = torch.func.vmap(torch.func.grad(lambda x, y: kd.cross_entropy(x, y)), in_dims=(None, 0))
    with kd.use_backend("reference"), pytest.raises(RuntimeError, match="vmap over labels cannot see"):
        slopes(s, y)


def test_what_cannot_be_recorded_names_us(backend):
    s, t = torch.randn(2, 4, 10)
    with pytest.raises(RuntimeError, match="jit.trace cannot record kdkernels.*torch.export"):
        torch.jit.trace(lambda x: kd.kl_div(x, t), s)
    hidden = torch.randn(4, 6, requires_grad=True)
    losses = kd.kl_div(kd.LinearHead(hidden, HEAD.weight.clone().requires_grad_()), t, reduction="none")
    with pytest.raises(RuntimeError, match="kdkernels.*made in the backward.*without is_grads_batched"):
        torch.autograd.grad(losses, hidden, torch.eye(4), is_grads_batched=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_autograd(reduction, compiled):
    """The backward is compiled, whether the forward is or not."""
    weight, teacher = torch.randn(10, 6, requires_grad=True), torch.randn(4, 10)

    def gradients(hidden, compiles):
        def losses():
            head = kd.LinearHead(hidden, weight)
            both = kd.kl_div(head, teacher, reduction=reduction), kd.kl_div(hidden @ weight.T, teacher)
            return both[0].sum() + both[1] + kd.token_log_probs(head, torch.arange(4)).log_probs.sum()

        run = torch.compile(losses, backend="aot_eager") if compiled and compiles else losses
        with torch._dynamo.config.patch(compiled_autograd=compiles):
            torch.compile(lambda: run().backward(), backend="aot_eager")() if compiles else run().backward()
        grads = hidden.grad, weight.grad
        hidden.grad = weight.grad = None
        return grads

    hidden = torch.randn(4, 6, requires_grad=True)
    for mine, expected in zip(gradients(hidden, True), gradients(hidden, False)):
        assert torch.allclose(mine, expected, atol=1e-6) and expected.norm() > 1e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_heads_on_meta(reduction):
    """Shapes and dtypes without memory, as a trainer plans with."""
    with torch.device("meta"):
        hidden, weight = torch.randn(2, 3, 6, requires_grad=True), torch.randn(10, 6, requires_grad=True)
        loss = kd.kl_div(kd.LinearHead(hidden, weight), torch.randn(2, 3, 10), reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert loss.is_meta and loss.shape == (() if reduction == "mean" else (2, 3))
    assert [g.shape for g in grads] == [(2, 3, 6), (10, 6)]


def test_forward_mode_is_refused_not_zero(backend):
    s, t = torch.randn(2, 4, 10)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: kd.kl_div(x, t), (s,), (s,))
    for name in ("temperature", "token_weights", "soft_weight", "num_items"):
        one = torch.ones(4 if name == "token_weights" else ())
        with pytest.raises(ValueError, match=f"{name} has a forward-mode tangent, but it is a constant"):
            torch.func.jvp(lambda x, n=name: kd.kl_div(s, t, **{n: x}), (one,), (one,))


def test_a_subclass_that_arrives_is_no_compilers(backend):
    class Plain(torch.Tensor):
        pass

    leaf, one = torch.randn(4, 10, requires_grad=True), torch.ones(()).as_subclass(Plain)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(kd.kl_div(leaf, torch.randn(4, 10)), leaf, one, create_graph=True)


def test_autocast(backend):
    problem = Problem(student="head", teacher="head")
    leaves = [t.clone().requires_grad_() for t in problem.student]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kd.kl_div(problem.side(leaves), problem.side(problem.teacher), problem.labels)
    grads = torch.autograd.grad(loss, leaves)
    truth = problem.oracle()
    assert loss.dtype == torch.float32 and abs(loss - truth[0]) < 0.02 * truth[0]
    for mine, true in zip(grads, truth[1]):
        assert mine.dtype == torch.float32 and relative(mine, true) < 0.05


@pytest.mark.parametrize(
    "loss",
    [
        lambda head, t, ids: kd.kl_div(head, t, gradient_tolerance=0.25, chunk_bytes=50_000),
        lambda head, t, ids: kd.kl_div(head, kd.top_k_target(t, 5, tail="conditional")),
        lambda head, t, ids: kd.cross_entropy(head, ids, reduction="none").sum(),
        lambda head, t, ids: kd.token_log_probs(head, ids).log_probs.sum(),
    ],
    ids=["tolerance", "conditional", "deferred", "log-probs"],
)
def test_autocast_around_a_backward_changes_nothing(loss, backend):
    """Its cast is made before an operator; the operator's own products are of the tensors that it was given."""
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(500, 32, requires_grad=True)
    teacher = torch.randn(64, 500).index_fill_(1, torch.arange(50), 9.0)
    ids = torch.randint(500, (64,))
    value = loss(kd.LinearHead(hidden, weight), teacher, ids)
    expected = torch.autograd.grad(value, [hidden, weight], retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(value, [hidden, weight])
        narrow = loss(kd.LinearHead(hidden, weight), teacher, ids)
    by_hand = loss(kd.LinearHead(hidden.bfloat16(), weight.bfloat16()), teacher, ids)
    for mine, theirs in zip([*found, narrow], [*expected, by_hand]):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_fp16_gradients_survive_a_late_loss_scale(backend):
    """A GradScaler's factor arrives in the backward: small gradients must not be zero by then."""
    n, v = 256, 4000
    student, teacher = torch.randn(n, v).half(), torch.randn(n, v).half()
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    (grad,) = torch.autograd.grad(kd.kl_div(leaf, teacher) * 2.0**16, leaf)
    with kd.use_backend("reference"):
        (true,) = torch.autograd.grad(kd.kl_div(wide, teacher.double()) * 2.0**16, wide)
    assert relative(grad, true) < 2e-3


def test_modules():
    problem = Problem()
    loss = kd.DistillationLoss(divergence=kd.JSD(0.3), temperature=2.0)
    s, t = problem.student[0], problem.teacher[0]
    assert torch.equal(loss(s, t), kd.distillation_loss(s, t, divergence=kd.JSD(0.3), temperature=2.0))
    assert torch.equal(kd.CrossEntropyLoss()(s, problem.labels), kd.cross_entropy(s, problem.labels))
    assert "JSD(beta=0.3)" in repr(loss)


INPLACE = {
    "plain": ((2, 6, 40), lambda z: z),
    "shifted": ((2, 6, 40), lambda z: z[:, :-1]),
    "middle dimension 1": ((2, 1, 6, 40), lambda z: z[:, :, :-1]),
    "transposed": ((40, 7), lambda z: z.t()),
    "column stride": ((6, 80), lambda z: z[:, ::2]),
}


@pytest.mark.parametrize("teacher", ["logits", "head"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", INPLACE)
def test_inplace_layouts(backend, layout, masked, teacher):
    shape, view = INPLACE[layout]
    source = torch.randn(shape, requires_grad=True)
    tokens, vocab = view(source).shape[:-1], view(source).shape[-1]
    t = (
        torch.randn(*tokens, vocab)
        if teacher == "logits"
        else (kd.LinearHead(torch.randn(*tokens, 8), torch.randn(vocab, 8)))
    )
    labels = torch.randint(0, vocab, tokens)
    if masked:
        labels.view(-1)[1::2] = -100
    results = []
    for inplace in (False, True):
        loss = kd.distillation_loss(view(source * 1), t, labels, hard_weight=0.3, inplace=inplace)
        results.append((loss, torch.autograd.grad(loss, source)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].any() and torch.equal(results[0][1], results[1][1])


def test_inplace_refuses_memory_that_is_not_its_own(backend):
    x = torch.randn(4, 40, requires_grad=True)
    y = x * 1
    with pytest.raises(ValueError, match="views of one tensor"):
        kd.kl_div(y[:-1], y.detach()[1:], inplace=True)
    with pytest.raises(ValueError, match="expanded"):
        kd.kl_div((x[:1] * 1).expand(6, 40), torch.randn(6, 40), inplace=True)
    with pytest.raises(ValueError, match="leaf"):
        kd.kl_div(x.view(4, 40), torch.randn(4, 40), inplace=True)


def test_inductor_with_a_transposed_hidden():
    hidden, weight = torch.randn(8, 6, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    teacher = torch.randn(6, 64)
    torch._dynamo.reset()
    loss = lambda h, w: kd.kl_div(kd.LinearHead(h.t(), w), teacher)  # noqa: E731
    mine = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden, weight), (hidden, weight))
    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    assert all(relative(a, b) < 1e-6 for a, b in zip(mine, expected))
