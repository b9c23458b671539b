"""Arguments with one entry a token, or one for the batch: mask, num_items; class weights."""

import warnings

import pytest
import torch
from problems import Problem

import kdkernels as kd

MASKS = {
    "bool": lambda live: live,
    "int64": lambda live: live.long(),
    "float": lambda live: live.float(),
    "strided": lambda live: live.repeat_interleave(2, -1)[..., ::2],
}


def same(one, two):
    return torch.equal(one[0], two[0]) and all(torch.equal(a, b) for a, b in zip(one[1], two[1]))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_mask_is_labels_of_ignore_index(backend, kind, form, reduction):
    """The same bits: without labels, and beside labels that lie out of range where the mask hides them."""
    problem = Problem(student=form, ignored=4)
    live = problem.labels != -100
    assert 0 < live.sum() < live.numel()
    mask = MASKS[kind](live)
    expected = problem.run(backend, reduction=reduction, divergence=kd.JSD(0.3))
    assert same(
        problem.run(backend, labels=False, mask=mask, reduction=reduction, divergence=kd.JSD(0.3)), expected
    )
    options = dict(reduction=reduction, hard_weight=0.5)
    expected = problem.run(backend, **options)
    problem.labels = torch.where(live, problem.labels, 10**6)
    assert same(problem.run(backend, mask=mask, **options), expected)


def test_mask_and_ignore_index_add_up(backend):
    problem = Problem(ignored=2)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    both = torch.where(mask, problem.labels, -100)
    ours = problem.run(backend, mask=mask, hard_weight=0.5)
    problem.labels = both
    assert same(ours, problem.run(backend, hard_weight=0.5)) and (both == -100).sum() == 7


@pytest.mark.parametrize("name", [None, "reference"])
def test_mask_of_every_loss(name):
    """The mean is over the tokens that it leaves: the issue's 1.000, and not 0.941 or 0.500."""
    s, t = torch.randn(2, 4, 30, requires_grad=True), torch.randn(2, 4, 30)
    y, mask = torch.randint(0, 30, (2, 4)), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    live = mask.bool()
    with kd.use_backend(name or "auto"):
        kl = kd.kl_div(s, t, reduction="none")[live].mean()
        assert torch.allclose(kd.kl_div(s, t, mask=mask), kl)
        assert torch.allclose(
            kd.js_divergence(s, t, mask=mask), kd.js_divergence(s, t, reduction="none")[live].mean()
        )
        ce = torch.nn.functional.cross_entropy(s[live], y[live])
        assert torch.allclose(kd.cross_entropy(s, y, mask=mask), ce)
        assert torch.allclose(kd.KLDivLoss()(s, t, mask=mask), kl)
        head = torch.randn(2, 4, 8), torch.randn(30, 8)
        linear = kd.linear_cross_entropy(*head, y, mask=mask)
        assert torch.allclose(linear, kd.cross_entropy(head[0] @ head[1].t(), y, mask=mask))
        losses = kd.codistillation_loss(s, t, y, mask=mask)
        assert torch.allclose(losses.student, kl + ce)
        assert torch.allclose(losses.teacher, torch.nn.functional.cross_entropy(t[live], y[live]))
        target = kd.top_k_target(t, 5)
        expected = kd.kl_div(s, target, reduction="none")[live].mean()
        assert torch.allclose(kd.kl_div(s, target, mask=mask), expected)
        assert kd.kl_div(s, t, mask=torch.zeros(2, 4)) == 0
        stats = kd.kl_div(s, t, mask=mask, return_stats=True)[1]
        assert stats.tokens == 3 and torch.allclose(stats.soft.to(kl.dtype), kl)


def test_mask_compiles():
    torch._dynamo.reset()
    s, t, mask = torch.randn(4, 30), torch.randn(4, 30), torch.tensor([True, False, True, True])
    loss = lambda s, mask: kd.kl_div(s, t, mask=mask, num_items=mask.sum())  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(s, mask), loss(s, mask))
    with pytest.raises(ValueError, match="num_items"):
        torch.compile(lambda n: kd.kl_div(s, t, num_items=n), fullgraph=True, backend="aot_eager")(
            torch.tensor(0)
        )


@pytest.mark.parametrize(
    "labels,warns",
    [
        ([1, 1, 0, 0], True),
        ([1, 1, 1, 1], True),
        ([1, 1, 0, -100], False),
        ([1, 1, 0, 2], False),
    ],
)
def test_labels_that_look_like_a_mask(labels, warns):
    s, t = torch.randn(2, 4, 30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            kd.kl_div(s, t, torch.tensor(labels))
        kd.kl_div(s[:, :2], t[:, :2], torch.tensor([0, 1, 1, 0]))  # two classes: what else should they hold
        kd.kl_div(s[:0], t[:0], torch.tensor(labels)[:0])
    assert [str(w.message).split("mask ")[-1] for w in caught] == ["of tokens goes in mask="] * warns
    assert all(w.filename == __file__ for w in caught)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_num_items_of_a_tensor(backend, dtype, reduction):
    s, t = torch.randn(4, 30).to(dtype), torch.randn(4, 30).to(dtype)
    for given in (torch.tensor(7), torch.tensor(7.0), torch.tensor([7]), torch.tensor(7, dtype=torch.int32)):
        mine = kd.kl_div(s, t, num_items=given, reduction=reduction)
        assert mine > 0 and torch.equal(mine, kd.kl_div(s, t, num_items=7, reduction=reduction))
    for bad in (0, -3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="num_items must be > 0"):
            kd.kl_div(s, t, num_items=torch.tensor(bad), reduction=reduction)
    nothing = torch.zeros(4, dtype=torch.bool)
    assert kd.kl_div(s, t, mask=nothing, num_items=torch.tensor(0), reduction=reduction) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_class_weights_are_torchs(backend, reduction, masked):
    s, y, w = torch.randn(6, 30, requires_grad=True), torch.randint(0, 30, (6,)), torch.rand(30)
    w[y[3]] = 0.0
    if masked:
        y[:2] = -100
    mine = kd.cross_entropy(s, y, class_weights=w, reduction=reduction)
    theirs = torch.nn.functional.cross_entropy(s, y, weight=w, reduction=reduction)
    assert theirs.sum() > 0.1 and torch.allclose(mine, theirs, rtol=1e-5)
    grads = [torch.autograd.grad(loss.sum(), s)[0] for loss in (mine, theirs)]
    assert grads[1].norm() > 1e-2 and torch.allclose(*grads, atol=1e-6)
    assert kd.cross_entropy(s, torch.full((6,), -100), class_weights=w) == 0


def test_class_weights_move_with_their_module():
    """As torch.nn.CrossEntropyLoss's weight does."""
    loss = kd.CrossEntropyLoss(class_weights=torch.rand(30), reduction="sum")
    assert not loss.state_dict() and not kd.CrossEntropyLoss().state_dict()
    s, y = torch.randn(6, 30), torch.randint(0, 30, (6,))
    assert torch.equal(loss(s, y), kd.cross_entropy(s, y, class_weights=loss.class_weights, reduction="sum"))
    assert loss.to("meta").class_weights.is_meta


def test_one_token_is_no_mask(recwarn):
    for label in (0, 1):
        kd.cross_entropy(torch.randn(1, 30), torch.tensor([label]))
    assert not [w for w in recwarn if "nothing but 0 and 1" in str(w.message)]


def test_probabilities_are_a_teacher(backend):
    """F.cross_entropy's gradient, and its value less their entropy; 0 is log -inf."""
    s, p = torch.randn(6, 30, requires_grad=True), torch.randn(6, 30).softmax(-1)
    p[:, :4] = 0.0
    p = p / p.sum(-1, keepdim=True)
    mine, theirs = kd.kl_div(s, p.log()), torch.nn.functional.cross_entropy(s, p)
    assert torch.isclose(mine, theirs - torch.special.entr(p).sum(-1).mean(), rtol=1e-5)
    grads = [torch.autograd.grad(loss, s)[0] for loss in (mine, theirs)]
    assert grads[1].norm() > 1e-2 and torch.allclose(*grads, atol=1e-6)


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("chunk_bytes", [None, 20_000])
def test_codistillation_smooths_the_students_labels_only(backend, form, chunk_bytes):
    problem = Problem(student=form, teacher=form)
    options = dict(hard_weight=0.5, label_smoothing=0.2, z_loss=0.01)
    sides = [[t.clone().requires_grad_() for t in side] for side in (problem.student, problem.teacher)]
    losses = kd.codistillation_loss(
        *(problem.side(side) for side in sides), problem.labels, chunk_bytes=chunk_bytes, **options
    )
    grads = torch.autograd.grad(losses.student + losses.teacher, sides[0] + sides[1])
    value, expected = problem.oracle(**options)
    problem.student = problem.teacher
    teachers = problem.oracle(loss=lambda s, t, y: kd.cross_entropy(s, y))
    assert torch.isclose(losses.student.double(), value, rtol=1e-5)
    assert torch.isclose(losses.teacher.double(), teachers[0], rtol=1e-5)
    for mine, truth in zip(grads, [*expected, *teachers[1]], strict=True):
        assert truth.norm() > 1e-3 and (mine.double() - truth).norm() < 3e-6 * truth.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_are_finite_where_they_count(bad):
    s, t, y = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, -100, 2])
    weights = torch.tensor([1.0, bad, 2.0])
    assert kd.kl_div(s, t, y, token_weights=weights).isfinite()
    with pytest.raises(ValueError, match=r"token_weights must be finite, got (nan|inf) at token 2"):
        kd.kl_div(s, t, y, token_weights=weights.roll(1))
    classes = torch.tensor([1.0, bad, 1.0, 1.0, 1.0])
    assert kd.cross_entropy(s, y, class_weights=classes).isfinite()
    with pytest.raises(ValueError, match=r"class_weights must be finite, got (nan|inf) at token 2"):
        kd.cross_entropy(s, y, class_weights=classes.roll(1))
