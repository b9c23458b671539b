"""Every public loss under torch.compile gives what it gives without, the gradient too."""

import ast
from pathlib import Path

import pytest
import torch
from compiled import assert_compiled

import kdkernels as kd
from kdkernels.commands.verify.scenario import DIVERGENCES

N, V, H, K = 6, 21, 8, 4


def cases():
    """name -> (function, leaves); what is no leaf is a constant of the function."""
    torch.manual_seed(0)
    s, t = 3 * torch.randn(2, N, V)
    head = [torch.randn(N, H), torch.randn(V, H), torch.randn(V)]
    teacher = kd.LinearHead(torch.randn(N, H + 4), torch.randn(V, H + 4), softcap=9.0)
    labels, weights = torch.randint(0, V, (N,)), torch.rand(N)
    labels[[1, 4]] = -100
    of = lambda h, w, b: kd.LinearHead(h, w, b, logit_scale=0.5)  # noqa: E731

    found = {}
    for divergence in DIVERGENCES:
        found[str(divergence)] = (lambda x, d=divergence: kd.distillation_loss(x, t, divergence=d), [s])
    for tail in ("bucket", "renormalize", "conditional", "truncate"):
        target = kd.top_k_target(t, K, tail=tail)
        for form, function, leaves in (("logits", lambda x: x, [s]), ("head", of, head)):
            found[f"{tail} {form}"] = (lambda *x, f=function, u=target: kd.kl_div(f(*x), u, labels), leaves)
    for reduction in ("none", "sum", "mean", "batchmean"):
        options = dict(
            reduction=reduction,
            hard_weight=0.5,
            label_smoothing=0.1,
            z_loss=1e-2,
            temperature=1.5,
            temperature_squared=True,
            token_weights=weights,
        )
        found |= {
            f"logits {reduction}": (lambda x, o=options: kd.distillation_loss(x, t, labels, **o), [s]),
            f"head {reduction}": (
                lambda *x, o=options: kd.distillation_loss(of(*x), teacher, labels, **o),
                head,
            ),
            f"inplace {reduction}": (
                lambda x, o=options: kd.distillation_loss(x * 1, t, labels, inplace=True, **o),
                [s],
            ),
            f"both {reduction}": (
                lambda x, y, *h, r=reduction: kd.codistillation_loss(
                    of(*h), kd.LinearHead(x, y), labels, reduction=r
                ),
                [teacher.hidden, teacher.weight, *head],
            ),
        }
    return found | {
        "stats": (lambda x: kd.kl_div(x, t, labels, return_stats=True), [s]),
        "both logits": (lambda x, y: kd.codistillation_loss(x, y, labels), [s, t]),
        "fp16": (lambda x: kd.kl_div(x.half(), t, labels), [s]),
        "fp16 inplace": (lambda x: kd.kl_div(x.half(), t, labels, inplace=True), [s]),
        "bf16 head": (lambda *x: kd.kl_div(of(*(y.bfloat16() for y in x)), t, labels), head),
        "num_items": (lambda x: kd.js_divergence(x, t, labels, num_items=(labels >= 0).sum()), [s]),
        "vocab_size": (lambda x: kd.js_divergence(x, t[:, :-2], vocab_size=V - 3), [s]),
        "chunks": (lambda *x: kd.kl_div(of(*x), t, labels, chunk_bytes=300), head),
        "cross_entropy": (lambda x: kd.cross_entropy(x, labels), [s]),
        "linear_cross_entropy": (
            lambda h, w, b: kd.linear_cross_entropy(h, w, labels, b, reduction="none"),
            head,
        ),
        "DistillationLoss": (lambda x: kd.DistillationLoss(temperature=2.0)(x, t), [s]),
        "CodistillationLossModule": (lambda x, y: kd.CodistillationLossModule()(x, y, labels), [s, t]),
        "KLDivLoss": (lambda x: kd.KLDivLoss(reduction="sum")(x, t), [s]),
        "JSDivergenceLoss": (lambda x: kd.JSDivergenceLoss(beta=0.1)(x, t), [s]),
        "CrossEntropyLoss": (lambda x: kd.CrossEntropyLoss()(x, labels), [s]),
        "LinearCrossEntropyLoss": (lambda h, w: kd.LinearCrossEntropyLoss()(h, w, labels), head[:2]),
    }


CASES = cases()
FEW = (
    "logits mean",
    "logits none",
    "head sum",
    "head none",
    "inplace mean",
    "both mean",
    "both logits",
    "bucket logits",
    "conditional head",
    "stats",
    "fp16 inplace",
    "linear_cross_entropy",
)


EACH = [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", EACH)
def test_as_one_graph(name):
    assert_compiled(*CASES[name])


@pytest.mark.parametrize("name", [each for each in EACH if "DistillationLoss" not in each.values])
def test_with_symbols(name):
    """All sizes and numbers are, but not those that a module keeps: the compiler makes tensors of them."""
    assert_compiled(*CASES[name], dynamic=True)


def test_torch_2_10_can_follow():
    """Its compiler, the oldest that pyproject.toml allows, stops at `match`."""
    for path in Path(kd.__file__).parent.rglob("*.py"):
        assert not any(isinstance(node, ast.Match) for node in ast.walk(ast.parse(path.read_text()))), path


@pytest.mark.filterwarnings("ignore:Error detected in")  # the compiler's own trace of it
def test_overwriting_what_autograd_needs_is_an_error():
    def loss(x, inplace):
        logits = x * 1
        return logits.square().sum() + kd.kl_div(logits, torch.zeros_like(x), inplace=inplace)

    x = torch.randn(3, V, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    compiled(x, False).backward()
    with pytest.raises(Exception, match="modified by an inplace operation"):
        compiled(x, True).backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_number_of_tokens_that_depends_on_data(inplace):
    some = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    teacher = torch.randn(N, V)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_compiled(lambda x: kd.kl_div(x[some] * 1, teacher[some], inplace=inplace), [torch.randn(N, V)])


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_rows_that_are_one_are_not_overwritten():
    """How many there are is not known; that each is the same memory is."""
    some, teacher = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool), torch.randn(N, V)

    def loss(x):
        return kd.kl_div((x * 1).expand(some.nonzero().shape[0], V), teacher[some], inplace=True)

    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        pytest.raises(Exception, match="inplace=True needs logits of their own memory"),
    ):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(torch.randn(1, V, requires_grad=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", CASES)
def test_in_any_number_of_graphs(name, backend):
    assert_compiled(*CASES[name], backend=backend, fullgraph=False)
