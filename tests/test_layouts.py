"""Every argument in any layout gives what it gives contiguous, on every backend."""

import random

import pytest
import torch
from problems import relative
from sparse_problems import TAILS, make_target
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels.core.layout import overlap, overlaps_itself
from kdkernels.core.rows import LogitRows

TOKENS, VOCAB, WIDTH = (3, 4), 70, 8


def _offset(shape):
    return (shape[0] + 1, *shape[1:-1], shape[-1] + 5), lambda b: b[1:, ..., 3:-2]


#: Name -> (shape of a dense buffer, a view of it), for a shape of at least two dimensions.
LAYOUTS = {
    "contiguous": lambda shape: (shape, lambda b: b[:]),
    "offset": _offset,
    "transposed": lambda shape: ((*shape[:-2], shape[-1], shape[-2]), lambda b: b.mT),
    "reversed": lambda shape: (shape[::-1], lambda b: b.permute(*range(b.dim())[::-1])),
    "columns apart": lambda shape: ((*shape[:-1], 2 * shape[-1]), lambda b: b[..., 1::2]),
    "all apart": lambda shape: ([2 * n for n in shape], lambda b: b[(slice(None, None, 2),) * b.dim()]),
    "expanded": lambda shape: ((1, *shape[1:]), lambda b: b.expand(shape)),
    "one row": lambda shape: ((*[1] * (len(shape) - 1), shape[-1]), lambda b: b.expand(shape)),
}


def laid_out(values, layout):
    """(dense buffer, view): the view has the layout and the values; what is expanded has the first ones."""
    shape, view = LAYOUTS[layout](tuple(values.shape))
    buffer = values.new_zeros(shape)
    if layout not in OWN_MEMORY:
        buffer.copy_(values[tuple(slice(n) for n in shape)])
    else:
        view(buffer).copy_(values)
    return buffer, view


#: Those that change no values.
OWN_MEMORY = [name for name in LAYOUTS if name not in ("expanded", "one row")]


def strided(values, chance, layouts=tuple(LAYOUTS)):
    """The values in a layout drawn from ``chance``; one dimension as the column of a matrix."""
    if values.dim() == 1:
        return strided(values[:, None], chance, layouts)[:, 0]
    buffer, view = laid_out(values, chance.choice(layouts))
    return view(buffer)


def small_budget(backend, given):
    """Bytes for a few chunks: of tokens in native, of the vocabulary in eager, whose rows are dear."""
    return 60_000 if backend == "eager" or given not in ("logits", "head") else 2000


def head(chance):
    """Rows of the lm_head that are all the same would leave hidden states no gradient."""
    tensors = torch.randn(*TOKENS, WIDTH), torch.randn(VOCAB, WIDTH), torch.randn(VOCAB)
    return [
        strided(t, chance, layouts) for t, layouts in zip(tensors, (list(LAYOUTS), OWN_MEMORY, list(LAYOUTS)))
    ]


def call(student, teacher, labels, weights, *, double=False, **options):
    """(loss, gradients for the student's tensors)."""
    leaves = [(t.double() if double else t).detach().requires_grad_() for t in student]
    side = kd.LinearHead(*leaves) if len(leaves) > 1 else leaves[0]
    loss = kd.distillation_loss(side, teacher, labels, token_weights=weights, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaves)


def call_inplace(buffer, view, teacher, labels, **options):
    """(loss, the gradient for the view of the buffer, what the view's memory holds after the backward)."""
    leaf = buffer.requires_grad_()
    logits = view(leaf * 1)
    loss = kd.distillation_loss(logits, teacher, labels, inplace=True, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), view(gradient), logits.detach()


@pytest.mark.parametrize("seed", range(60))
def test_random_layouts(backend, seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    form, given = chance.choice(["logits", "head"]), chance.choice(["logits", "head", "sparse"])
    dtype = (
        chance.choice([torch.float32, torch.bfloat16, torch.float16]) if form == "logits" else torch.float32
    )
    student = head(chance) if form == "head" else [strided(torch.randn(*TOKENS, VOCAB).to(dtype), chance)]
    tensors = head(chance) if given == "head" else [strided(torch.randn(*TOKENS, VOCAB), chance)]
    if given == "sparse":
        tail = chance.choice(TAILS)
        target = make_target(tensors[0], 6, tail, given=chance.choice(["logprobs", "weights"]))
        tensors = [strided(t, chance, OWN_MEMORY) for t in (target.ids, target.values, target.mask)]
        kind = "logprobs" if target.weights is None else "weights"

    def teacher(of):
        t = [of(x) for x in tensors]
        if given == "sparse":
            return kd.SparseTarget(t[0], mask=t[2], tail=tail, **{kind: t[1]})
        return kd.LinearHead(*t) if given == "head" else t[0]

    labels = torch.where(torch.rand(TOKENS) < 0.2, -100, torch.randint(0, VOCAB, TOKENS))
    labels[0, 0] = 5
    labels = chance.choice([strided(labels, chance), torch.tensor([[3]]).expand(TOKENS), None])
    weights = chance.choice([None, strided(torch.rand(TOKENS), chance), torch.tensor(0.5).expand(TOKENS)])
    options = dict(
        reduction=chance.choice(["mean", "none"]),
        hard_weight=0.0 if labels is None else chance.choice([0.0, 0.5]),
        chunk_bytes=chance.choice([None, small_budget(backend, given)]),
        divergence=kd.ForwardKL() if given == "sparse" else chance.choice([kd.ForwardKL(), kd.JSD(0.3)]),
    )
    loss, grads = call(student, teacher(lambda t: t), labels, weights, **options)
    dense = [None if t is None else t.contiguous() for t in (labels, weights)]
    same, expected = call(
        [t.contiguous() for t in student], teacher(lambda t: t.contiguous()), *dense, **options
    )
    with kd.use_backend("reference"):
        truth, exact = call(
            student,
            teacher(lambda t: t.double() if t.is_floating_point() else t),
            labels,
            weights,
            double=True,
            **options,
        )
    torch.testing.assert_close(loss, same, rtol=1e-6, atol=1e-6)
    assert relative(loss, truth) < 2e-6 and truth.norm() > 1e-2
    for mine, other, true in zip(grads, expected, exact, strict=True):
        assert true.norm() > 1e-3
        assert relative(mine, other) < torch.finfo(dtype).eps * 4
        assert relative(mine, true) < max(4e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", OWN_MEMORY)
@pytest.mark.parametrize("given", ["logits", "head", "bucket", "conditional"])
@pytest.mark.parametrize("dtype,reduction", [(torch.float32, "mean"), (torch.bfloat16, "none")], ids=str)
def test_inplace_layouts(backend, layout, given, dtype, reduction):
    """The gradient is where the logits were, in whole and in small chunks, and nothing else is overwritten."""
    values = torch.randn(*TOKENS, VOCAB).to(dtype)
    buffer, view = laid_out(values, layout)
    logits = torch.randn(*TOKENS, VOCAB)
    heads = kd.LinearHead(torch.randn(*TOKENS, WIDTH), torch.randn(VOCAB, WIDTH))
    teacher = make_target(logits, 6, given) if given in TAILS else {"logits": logits, "head": heads}[given]
    labels = torch.randint(0, VOCAB - 10, TOKENS)
    labels[0, 1:3] = -100
    for chunk_bytes in (None, small_budget(backend, given)):
        options = dict(reduction=reduction, hard_weight=0.3, chunk_bytes=chunk_bytes, vocab_size=None)
        if given != "bucket":
            options["vocab_size"] = VOCAB - 10
            if given == "logits":
                teacher = logits[..., : VOCAB - 5]
        if given == "conditional":
            options["hard_weight"], options["vocab_size"] = 0.0, None
        expected = call([values], teacher, labels, None, **options)
        loss, gradient, left = call_inplace(buffer.clone(), view, teacher, labels, **options)
        torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-6)
        assert expected[1][0].norm() > 1e-3
        assert relative(gradient, expected[1][0]) < torch.finfo(dtype).eps
        assert torch.equal(left, gradient) and not gradient[0, 1:3].any()


@pytest.mark.parametrize("which", ["both", "ids", "values"])
@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
@pytest.mark.parametrize("tail", TAILS)
def test_transposed_targets(backend, tail, hard_weight, form, which):
    """As ``topk(dim=0)`` gives them, and as ``mT`` of a batch of one."""
    student = (
        [torch.randn(1, 6, VOCAB)]
        if form == "logits"
        else [torch.randn(1, 6, WIDTH), torch.randn(VOCAB, WIDTH)]
    )
    values, ids = torch.randn(6, VOCAB).log_softmax(-1).t().topk(5, dim=0)
    values, ids = values[None].mT, ids[None].mT
    labels = torch.randint(0, VOCAB, (1, 6))
    expected = call(
        student,
        kd.SparseTarget(ids.contiguous(), values.contiguous(), tail=tail),
        labels,
        None,
        hard_weight=hard_weight,
    )
    target = kd.SparseTarget(
        ids.contiguous() if which == "values" else ids,
        values.contiguous() if which == "ids" else values,
        tail=tail,
    )
    for chunk_bytes in (None, small_budget(backend, "sparse")):
        mine = call(student, target, labels, None, hard_weight=hard_weight, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(mine[0], expected[0], rtol=1e-6, atol=0)
        for a, b in zip(mine[1], expected[1], strict=True):
            assert b.norm() > 1e-3 and relative(a, b) < 1e-6


HALVES = {
    "of a batch": lambda z: (z[:3], z[3:]),
    "interleaved": lambda z: (z[::2], z[1::2]),
    "of pairs": lambda z: (z.view(3, 2, 8, 40)[:, 0], z.view(3, 2, 8, 40)[:, 1]),
    "of each sequence": lambda z: (z[:, :4], z[:, 4:]),
    "every other position": lambda z: (z[:, ::2], z[:, 1::2]),
    "of the vocabulary": lambda z: (z[..., :20], z[..., 20:]),
}
SHARED = {
    "a step later": lambda z: (z[:, :-1], z[:, 1:]),
    "a row later": lambda z: (z[:4], z[1:5]),
    "some columns": lambda z: (z[..., :25], z[..., 15:]),
    "transposed": lambda z: (z[:, :, :8], z[:, :, :8].mT),
}


@pytest.mark.parametrize("halves", HALVES)
@pytest.mark.parametrize("first", [False, True])
def test_halves_of_one_forward_may_be_written(backend, halves, first):
    """Student and teacher of one batched forward: the student's half becomes its gradient, the teacher's stays."""
    source = torch.randn(6, 8, 40, requires_grad=True)
    results = []
    for inplace in (False, True):
        z = source * 1
        student, teacher = HALVES[halves](z)[:: 1 if first else -1]
        before = teacher.detach().clone()
        loss = kd.kl_div(student, teacher.detach(), inplace=inplace)
        results.append((loss.detach(), torch.autograd.grad(loss, source)[0]))
        assert torch.equal(teacher.detach(), before)
    assert torch.equal(results[0][0], results[1][0]) and results[0][1].norm() > 1e-3
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("views", SHARED)
def test_views_with_memory_in_common_are_refused(backend, views):
    z = torch.randn(6, 8, 40, requires_grad=True) * 1
    student, teacher = SHARED[views](z)
    for s, t in ((student, teacher), (teacher, student)):
        assert overlap(s, t)
        with pytest.raises(ValueError, match="views of one tensor"):
            kd.kl_div(s, t.detach(), inplace=True)


def test_a_teacher_made_of_the_students_logits(backend):
    """An lm_head's rows are read again and again; a column of the same place is read before it is written."""
    z = torch.randn(8, 8, requires_grad=True) * 1
    for hidden, weight in ((torch.randn(8, 8), z.detach()), (z.detach(), torch.randn(8, 8))):
        with pytest.raises(ValueError, match="views of one tensor"):
            kd.kl_div(z, kd.LinearHead(hidden, weight), inplace=True)
    assert kd.kl_div(z, z.detach(), inplace=True) == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_inplace_refuses_logits_that_share_memory(backend, compiled):
    """``unfold`` and ``expand``: a gradient written to one place would be another's too."""
    torch._dynamo.reset()
    loss = lambda s, t: kd.kl_div(s, t, inplace=True)  # noqa: E731
    run = torch.compile(loss, backend="eager", fullgraph=True) if compiled else loss
    for view in (
        lambda z: z.unfold(0, 10, 5),
        lambda z: z[:10].expand(4, 10),
        lambda z: z.as_strided((5, 3), (2, 2)),
    ):
        s = view(torch.randn(40, requires_grad=True) * 1)
        with pytest.raises(Exception, match="inplace=True.*expanded or unfolded"):
            run(s, torch.randn(s.shape))
    apart = (torch.randn(40, requires_grad=True) * 1).unfold(0, 10, 10)
    assert kd.kl_div(apart, torch.randn(4, 10), inplace=True).isfinite()


def test_what_shares_memory_is_known():
    """Against the addresses themselves, for random views of one buffer."""
    chance = random.Random(0)
    storage, found, apart = torch.arange(100), 0, 0
    for _ in range(3000):
        views = []
        for _ in range(2):
            shape = [chance.randint(1, 3) for _ in range(3)]
            stride = [chance.choice([0, 1, 2, 3, 4, 6, 8, 12]) for _ in range(3)]
            views.append(storage.as_strided(shape, stride, chance.randint(0, 20)))
        (a, b), taken = views, [v.flatten().tolist() for v in views]
        if set(taken[0]) & set(taken[1]):
            assert overlap(a, b)
        else:
            apart += 1
            found += not overlap(a, b)
        assert overlaps_itself(a) or len(set(taken[0])) == len(taken[0])
    assert found > apart / 2


class Lifted(TorchDispatchMode):
    """How many tensors were made of numbers: on a GPU each is a copy that is waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.lift_fresh.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (1, 4, 5), (3, 1, 2, 2), (0,), (0, 3), (3, 0)])
def test_tokens_are_found_without_a_copy_of_the_shape(leading):
    """As torch.unravel_index finds them."""
    logits = torch.randn(*leading, 4)
    tokens = torch.arange(logits[..., 0].numel()).flip(0)
    with Lifted() as lifted:
        places = LogitRows(logits, 4, None)._places(tokens)
    assert not lifted.count
    expected = torch.unravel_index(tokens, leading)
    assert len(places) == len(expected) and all(map(torch.equal, places, expected))
