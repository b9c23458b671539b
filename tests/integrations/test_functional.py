"""kl_div beside F.kl_div: values, both gradients, dtypes; the differences are asserted."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, outcome, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from peak import peak_of
from torch.autograd import forward_ad

from kdkernels.integrations import functional

REDUCTIONS = ["none", "sum", "mean", "batchmean"]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # F.kl_div on "mean" and on the deprecated arguments
        yield


def sides(shape, log_target, dtype=torch.float64):
    """Not normalised: F.kl_div does not ask for that."""
    x = torch.randn(shape).log_softmax(-1) + 0.1 * torch.randn(shape)
    t = torch.randn(shape).log_softmax(-1) - 0.3
    return x.to(dtype), (t if log_target else t.exp()).to(dtype)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 11), (9,), (1, 1, 1)])
def test_values_and_both_gradients(log_target, reduction, shape):
    x, t = sides(shape, log_target)
    options = dict(reduction=reduction, log_target=log_target)
    assert_same(outcome(functional.kl_div, [x, t], **options), outcome(F.kl_div, [x, t], **options), 1e-12)
    assert_same(outcome(functional.kl_div, [x], t, **options), outcome(F.kl_div, [x], t, **options), 1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    log_target=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    piece=st.integers(1, 50),
)
def test_any_shape_in_any_pieces(seed, log_target, reduction, shape, piece):
    torch.manual_seed(seed)
    x, t = sides(shape, log_target)
    x, t = x.transpose(0, -1), t.transpose(0, -1)
    options = dict(reduction=reduction, log_target=log_target)
    whole = functional._PIECE["cpu"]
    functional._PIECE["cpu"] = piece
    try:
        ours = outcome(functional.kl_div, [x, t], **options)
    finally:
        functional._PIECE["cpu"] = whole
    theirs = outcome(F.kl_div, [x, t], **options)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"size_average": a, "reduce": r} for a in (None, True, False) for r in (None, True, False)],
    ids=str,
)
def test_deprecated_arguments(options):
    x, t = sides((4, 6), False)
    assert_same(outcome(functional.kl_div, [x, t], **options), outcome(F.kl_div, [x, t], **options), 1e-12)


def test_signature():
    ours, theirs = (
        [(p.name, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (functional.kl_div, F.kl_div)
    )
    assert ours == theirs


def test_the_rest_is_torchs():
    """One import changes: every other name is torch's own object."""
    for name in dir(F):
        if not name.startswith("__") and name != "kl_div" and name not in vars(functional):
            assert getattr(functional, name) is getattr(F, name)
    assert set(dir(F)) <= set(dir(functional))
    for name in {n for n, x in vars(functional).items() if callable(x)} & {
        n for n, x in vars(F).items() if callable(x)
    }:
        assert name == "kl_div" or getattr(functional, name) is getattr(F, name), f"{name} hides torch's"
    from kdkernels.integrations.functional import log_softmax

    assert log_softmax is F.log_softmax
    with pytest.raises(AttributeError, match="no attribute 'log_softmin'"):
        functional.log_softmin  # noqa: B018


@pytest.mark.parametrize("shapes", [((3, 5), (5,)), ((1, 5), (4, 5)), ((3, 1), (3, 4))])
def test_broadcasting(shapes):
    x, t = torch.randn(shapes[0], dtype=torch.float64), torch.rand(shapes[1], dtype=torch.float64)
    assert_same(
        outcome(functional.kl_div, [x, t], reduction="batchmean"),
        outcome(F.kl_div, [x, t], reduction="batchmean"),
        1e-12,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(reduction):
    x, t = torch.randn(0, 5), torch.rand(0, 5)
    ours, theirs = (f(x, t, reduction=reduction) for f in (functional.kl_div, F.kl_div))
    if reduction == "batchmean":  # theirs is 0 / 0
        assert ours == 0 and theirs.isnan()
    else:
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_refusals():
    x, t = sides((2, 3), False)
    with pytest.raises(ValueError, match="not a valid value for reduction"):
        functional.kl_div(x, t, reduction="average")
    with pytest.raises(ValueError, match="must be floating"):
        functional.kl_div(x, torch.ones(2, 3, dtype=torch.int64))
    value = functional.kl_div(x.requires_grad_(), t)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="forward-mode"), forward_ad.dual_level():
        functional.kl_div(forward_ad.make_dual(x.detach(), x.detach()), t)


def test_nested_tensors_are_refused():
    x, t = sides((6, 5), False)
    offsets = torch.tensor([0, 2, 6])
    nested = [torch.nested.nested_tensor_from_jagged(z, offsets) for z in (x, t)]
    theirs = F.kl_div(*nested, reduction="sum")
    with pytest.raises(ValueError, match=r"takes no nested tensors; give their values\(\)"):
        functional.kl_div(*nested, reduction="sum")
    torch.testing.assert_close(functional.kl_div(*(z.values() for z in nested), reduction="sum"), theirs)


def test_dtensors_are_refused(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    x, t = sides((4, 5), False)
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = [distribute_tensor(z, mesh, [Shard(0)]) for z in (x, t)]
        with pytest.raises(ValueError, match=r"takes no DTensors; give their full_tensor\(\)"):
            functional.kl_div(*sharded, reduction="sum")
        ours = functional.kl_div(*(z.to_local() for z in sharded), reduction="sum")
        torch.testing.assert_close(ours, F.kl_div(*sharded, reduction="sum").full_tensor())
    finally:
        destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"log_target": True}, {"reduction": "none"}], ids=str)
def test_many_backwards_at_once(options):
    """As jacobian(vectorize=True) asks for them; torch.func is refused by name."""
    x, t = sides((3, 4), "log_target" in options)
    arriving = torch.randn(5, *F.kl_div(x, t, **options).shape, dtype=x.dtype)

    def gradients(function):
        leaves = [z.clone().requires_grad_() for z in (x, t)]
        return torch.autograd.grad(function(*leaves, **options), leaves, arriving, is_grads_batched=True)

    for ours, theirs in zip(gradients(functional.kl_div), gradients(F.kl_div)):
        assert theirs.norm() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for transformed in (torch.func.grad(functional.kl_div), torch.func.vmap(functional.kl_div)):
        with pytest.raises(RuntimeError, match="cannot transform this loss"):
            transformed(x, t)


@pytest.mark.parametrize("log_target", [False, True])
def test_difference_half_precision_is_rounded_once(log_target):
    x, t = (z.bfloat16() for z in sides((64, 1024), log_target))
    options = dict(reduction="batchmean", log_target=log_target)
    truth = outcome(F.kl_div, [x.double()], t.double(), **options)
    ours, theirs = outcome(functional.kl_div, [x], t, **options), outcome(F.kl_div, [x], t, **options)
    assert ours[0][0].dtype == theirs[0][0].dtype == ours[1][0].dtype == torch.bfloat16
    assert relative(ours[0][0], truth[0][0]) <= 2**-8 and relative(ours[1][0], truth[1][0]) <= 2**-8
    assert relative(ours[0][0], truth[0][0]) <= relative(theirs[0][0], truth[0][0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float64,) * 2]
)
def test_autocast(dtypes, reduction):
    """Which widens half precision, and leaves fp64 alone."""
    x, t = (z.to(dtype) for z, dtype in zip(sides((5, 7), False), dtypes))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (outcome(f, [x, t], reduction=reduction) for f in (functional.kl_div, F.kl_div))
    assert ours[0][0].dtype == theirs[0][0].dtype == torch.promote_types(dtypes[0], torch.float32)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    assert [g.dtype for g in ours[1]] == list(dtypes)
    assert_same(([], ours[1]), ([], theirs[1]), 1e-2)


def test_difference_zero_log_zero_is_zero():
    x = torch.tensor([[-1.0, -torch.inf, -2.0]], dtype=torch.float64)
    p = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64)
    expected = 0.5 * (torch.tensor(0.5).log() + 1) + 0.5 * (torch.tensor(0.5).log() + 2)
    for t, log_target in ((p, False), (p.log(), True)):
        options = dict(reduction="sum", log_target=log_target)
        (value,), (gradient,) = outcome(functional.kl_div, [x], t, **options)
        assert value == pytest.approx(expected.item(), rel=1e-6)
        assert torch.equal(gradient, -p)
        assert F.kl_div(x, t, **options).isnan()
    to_target = outcome(lambda t: functional.kl_div(torch.zeros(1, 3), t, reduction="sum"), [p.float()])[1][0]
    assert to_target[0, 1] == -torch.inf
    theirs = outcome(lambda t: F.kl_div(torch.zeros(1, 3), t, reduction="sum"), [p.float()])[1][0]
    assert theirs[0, 1].isnan()


def test_nan_is_never_hidden():
    x, p = torch.zeros(1, 2), torch.tensor([[torch.nan, 1.0]])
    assert functional.kl_div(x, p, reduction="sum").isnan()
    assert functional.kl_div(x * torch.nan, p.nan_to_num(0.5), reduction="sum").isnan()
    for t, log_target in ((torch.zeros(1, 2), False), (torch.full((1, 2), -torch.inf), True)):
        assert functional.kl_div(x * torch.nan, t, reduction="sum", log_target=log_target).isnan()


def test_memory_is_the_gradient():
    x, t = (torch.randn(256, 65536).log_softmax(-1) for _ in range(2))

    def peak(function):
        def step():
            leaf = x.detach().requires_grad_()
            function(leaf, t, reduction="batchmean", log_target=True).backward()

        return peak_of(step) / (x.numel() * 4)

    # The gradient, and what the allocator makes of pieces of 4 MiB.
    ours, theirs = peak(functional.kl_div), peak(F.kl_div)
    assert ours <= 1.8 and theirs >= 2.5, (ours, theirs)
