"""Liger's losses beside its own: the Triton ones through Triton's interpreter, the chunked one as it is."""

import ast
import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, outcome, relative
from liger_originals import call

import kdkernels as kd
from kdkernels.integrations import liger as dropin

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
ISOLATED, SUPPORT = (Path(__file__).parents[1] / name for name in ("isolated", "support"))
N, V, H = 7, 65, 16


def log_probs():
    return (2 * torch.randn(N, V)).log_softmax(-1)


def labels():
    made = torch.randint(0, V, (N,))
    made[[1, 4]] = -100
    return made


def hidden(width=H):
    return [torch.randn(N, width), torch.randn(V, width) * 0.5]


def cases():
    torch.manual_seed(0)
    transformers = "liger_kernel.transformers"
    for beta in (0.0, 0.3, 1.0):
        for mask in (None, labels()):
            yield {
                "original": f"{transformers}.jsd:LigerJSD",
                "options": {"beta": beta},
                "leaves": [0],
                "arguments": [log_probs(), log_probs(), mask],
                "log_softmax": True,
            }
            for temperature in (1.0, 2.0):
                yield {
                    "original": f"{transformers}.fused_linear_jsd:LigerFusedLinearJSD",
                    "leaves": [0, 1],
                    "options": {"jsd_beta": beta, "temperature": temperature},
                    "arguments": [*hidden(), *hidden(24), mask],
                }
    for reduction in ("batchmean", "mean", "sum"):
        for temperature, mask in ((1.0, None), (2.0, labels())):
            yield {
                "original": f"{transformers}.fused_linear_kl_div:LigerFusedLinearKLDivLoss",
                "leaves": [0, 1],
                "options": {"reduction": reduction, "temperature": temperature},
                "arguments": [*hidden(), log_probs().exp(), mask],
            }
    yield {
        "original": f"{transformers}.fused_ce_tvd:LigerFusedCETVDLoss",
        "options": {},
        "leaves": [0],
        "arguments": [2 * torch.randn(N, V), 2 * torch.randn(N, V), labels()],
        "both": True,
    }
    for options in ({}, {"label_smoothing": 0.1}, {"lse_square_scale": 1e-2}, {"reduction": "sum"}):
        yield {
            "original": f"{transformers}.cross_entropy:LigerCrossEntropyLoss",
            "options": options,
            "leaves": [0],
            "arguments": [3 * torch.randn(N, V), labels()],
        }
        h, w = hidden()
        yield {
            "original": f"{transformers}.fused_linear_cross_entropy:LigerFusedLinearCrossEntropyLoss",
            "options": options,
            "leaves": [0, 1, 3],
            "arguments": [w, h, labels(), torch.randn(V)],
        }


CASES = list(cases())


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Liger's kernels need triton, if only its interpreter")
    folder = tmp_path_factory.mktemp("liger")
    torch.save(CASES, folder / "cases.pt")
    subprocess.run(
        [sys.executable, ISOLATED / "liger_originals.py", folder / "cases.pt", folder / "outcomes.pt"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{SUPPORT}{os.pathsep}{ISOLATED}"},
        check=True,
        timeout=300,
    )
    return torch.load(folder / "outcomes.pt")


def to_logits(case, result):
    """Gradients for log-probabilities, carried through the log_softmax that made them."""
    if not case.get("log_softmax"):
        return result
    values, (gradient,) = result
    return values, [gradient - case["arguments"][0].exp() * gradient.sum(-1, keepdim=True)]


@pytest.mark.parametrize(
    "index", range(len(CASES)), ids=[f"{c['original'].split(':')[1]}-{i}" for i, c in enumerate(CASES)]
)
def test_beside_the_original(index, originals):
    case, theirs = CASES[index], originals[index]
    loss = getattr(dropin, case["original"].split(":")[1])(**case["options"])
    leaves = [case["arguments"][i] for i in case["leaves"]]
    ours = outcome(lambda *given: call(loss, case, given), leaves)
    assert_same(to_logits(case, ours), to_logits(case, theirs), 3e-5)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_is_torchs(reduction, log_target):
    """Triton's interpreter cannot run Liger's kernel; it says that it is nn.KLDivLoss."""
    x, t = log_probs(), log_probs() if log_target else log_probs().exp()
    ours = outcome(dropin.LigerKLDIVLoss(reduction=reduction, log_target=log_target), [x], t)
    assert_same(ours, outcome(torch.nn.KLDivLoss(reduction=reduction, log_target=log_target), [x], t), 1e-5)
    again = outcome(dropin.liger_kl_div, [x], t, reduction=reduction, log_target=log_target)
    assert_same(again, ours, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_half_precision_is_not_rounded_at_the_end(dtype, reduction):
    """Liger's kernels write fp32, which interpreting them would not show."""
    x, t = (2000 * log_probs()).clamp(min=-20000).to(dtype), log_probs().exp().to(dtype)
    for function, given in ((dropin.liger_kl_div, x), (dropin.liger_tvd, t.flip(0) * 3000)):
        ours = outcome(lambda z, f=function: f(z, t, reduction=reduction), [given])
        truth = outcome(lambda z, f=function: f(z, t.double(), reduction=reduction), [given.double()])
        assert ours[0][0].dtype == torch.float32 and ours[1][0].dtype == dtype
        assert relative(ours[0][0], truth[0][0]) < 1e-6
        assert relative(ours[1][0], truth[1][0]) < 2**-8


def test_the_target_of_kl_div_is_a_constant():
    x, t = log_probs().requires_grad_(), log_probs().exp().requires_grad_()
    for loss in (dropin.liger_kl_div, dropin.LigerKLDIVLoss(reduction="sum")):
        given, told = torch.autograd.grad(loss(x, t), [x, t], allow_unused=True)
        assert given.any() and told is None


def test_softcap():
    """Another kernel that the interpreter cannot run."""
    h, w = hidden()
    targets = labels()
    capped = outcome(lambda h, w: F.cross_entropy(5 * torch.tanh(h @ w.T / 5), targets), [h, w])
    fused = dropin.LigerFusedLinearCrossEntropyLoss(softcap=5.0)
    assert_same(outcome(lambda h, w: fused(w, h, targets), [h, w]), capped, 1e-5)
    plain = dropin.LigerCrossEntropyLoss(softcap=5.0)
    assert_same(outcome(lambda h, w: plain(h @ w.T, targets), [h, w]), capped, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_softcap_of_half_precision_is_not_rounded_again(dtype, reduction):
    """The cap is part of the pass: in the logits' dtype it would move them by 2^-9 of their size."""
    logits, targets = (20 * torch.randn(N, V)).to(dtype), labels()
    options = dict(softcap=30.0, label_smoothing=0.1, lse_square_scale=1e-3, reduction=reduction)
    truth = outcome(dropin.liger_cross_entropy, [logits.double()], targets, **options)
    ours = outcome(dropin.liger_cross_entropy, [logits], targets, **options)
    formula = lambda z: F.cross_entropy(30 * torch.tanh(z / 30), targets, label_smoothing=0.1)  # noqa: E731
    assert relative(ours[0][0], truth[0][0]) < 1e-6 and relative(ours[1][0], truth[1][0]) < 2 ** (
        -8 if dtype == torch.bfloat16 else -10
    )
    rounded = outcome(formula, [logits])
    assert relative(rounded[1][0], outcome(formula, [logits.double()])[1][0]) > 2 * relative(
        ours[1][0], truth[1][0]
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("masked", [False, True])
def test_total_variation(reduction, masked):
    p, q, mask = log_probs().exp(), log_probs().exp(), labels() if masked else None
    kept = torch.ones(N, 1) if mask is None else (mask != -100).float()[:, None]

    def formula(p):
        each = 0.5 * (p - q).abs() * kept
        return {
            "none": each,
            "sum": each.sum(),
            "batchmean": each.sum() / kept.sum(),
            "mean": each.sum() / kept.sum() / V,
        }[reduction]

    assert_same(outcome(dropin.LigerTVDLoss(reduction), [p], q, mask), outcome(formula, [p]), 1e-6)
    with pytest.raises(ValueError, match="unknown reduction"):
        dropin.liger_tvd(p, q, reduction="average")


def chunked(module, student, teacher, true_labels, bias, **options):
    loss = module.LigerFusedLinearJSDLoss(compiled=False, **options)
    t_bias = torch.linspace(-1, 1, teacher[1].shape[0]) if bias else None
    call = lambda h, w, b=None: loss(h, w, *teacher, true_labels, b, t_bias)  # noqa: E731
    return outcome(call, student + [torch.linspace(0, 1, V)] if bias else student)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("parts", [False, True])
def test_chunked_jsd(beta, temperature, weights, parts):
    given = hidden(), hidden(24), labels()
    options = dict(
        beta=beta,
        temperature=temperature,
        weight_hard_loss=weights[0],
        weight_soft_loss=weights[1],
        return_soft_hard_loss=parts,
    )
    for bias in (False, True):
        ours, theirs = (chunked(m, *given, bias, **options) for m in (dropin, chunked_loss))
        assert_same(ours, theirs, 3e-5)


def test_chunked_jsd_all_masked():
    given = hidden(), hidden(24), torch.full((N,), -100)
    assert_same(*(chunked(m, *given, False) for m in (dropin, chunked_loss)), 0.0, zero_gradient=True)


def test_difference_zero_padding():
    """A teacher padded by rows that no tokenizer reaches: its logits there are far below the others."""
    student, teacher = hidden(), hidden(24)
    padded = [teacher[0], torch.cat([teacher[1], torch.zeros(15, 24)])]
    given = dict(beta=0.5, weight_hard_loss=0.0, weight_soft_loss=1.0)
    exact = chunked(chunked_loss, student, teacher, labels(), False, **given)
    assert_same(chunked(dropin, student, padded, labels(), False, **given), exact, 3e-5)
    theirs = chunked(chunked_loss, student, padded, labels(), False, **given)
    assert relative(theirs[0][0], exact[0][0]) > 1e-2 and relative(theirs[1][1], exact[1][1]) > 1e-2
    with pytest.raises(ValueError, match="vocabulary"):
        chunked(dropin, student, [teacher[0], teacher[1][:-1]], labels(), False)


def test_difference_chunks_are_added_in_fp32():
    """bf16 weights and many chunks: Liger adds their gradients up in bf16."""
    h, w = torch.randn(512, H).bfloat16(), (torch.randn(V, H) * 0.5).bfloat16()
    th, tw = torch.randn(512, 24).bfloat16(), (torch.randn(V, 24) * 0.5).bfloat16()
    targets = torch.randint(0, V, (512,))
    leaf = w.double().requires_grad_()
    truth = torch.autograd.grad(
        kd.js_divergence(kd.LinearHead(h.double(), leaf), kd.LinearHead(th.double(), tw.double())), leaf
    )[0]
    options = dict(weight_hard_loss=0.0, weight_soft_loss=1.0, chunk_size=8)
    ours, theirs = (
        chunked(m, [h, w], [th, tw], targets, False, **options)[1][1] for m in (dropin, chunked_loss)
    )
    assert 2 * relative(ours, truth) < relative(theirs, truth)


def test_jsd_takes_logits_as_well():
    s, t = 2 * torch.randn(N, V), 2 * torch.randn(N, V)
    through = outcome(lambda s: dropin.liger_jsd(s.log_softmax(-1), t.log_softmax(-1)), [s])
    assert_same(outcome(dropin.liger_jsd, [s], t), through, 1e-5)


def test_nothing_left_is_zero():
    mask = torch.full((N,), -100)
    for value in (
        dropin.liger_jsd(log_probs(), log_probs(), mask),
        dropin.liger_tvd(log_probs().exp(), log_probs().exp(), mask),
        dropin.liger_fused_linear_jsd(*hidden(), *hidden(), mask),
    ):
        assert value == 0


@pytest.mark.parametrize("asked", ["return_z_loss", "return_token_accuracy", "return_predicted_tokens"])
def test_what_is_not_here_is_refused(asked):
    with pytest.raises(ValueError, match=asked):
        dropin.LigerCrossEntropyLoss(**{asked: True})
    with pytest.raises(ValueError, match=asked):
        dropin.liger_fused_linear_cross_entropy(*hidden(), labels(), **{asked: True})
    with pytest.raises(ValueError, match=r"weight is not .* kd.cross_entropy\(class_weights=\)"):
        dropin.liger_cross_entropy(torch.randn(N, V), labels(), weight=torch.ones(V))


@pytest.mark.parametrize("temperature", [0, -2.0])
@pytest.mark.parametrize("name", ["FusedLinearKLDivLoss", "FusedLinearJSD", "FusedLinearJSDLoss"])
def test_a_temperature_of_nothing_is_refused_at_once(name, temperature):
    with pytest.raises(ValueError, match=f"temperature must be > 0 and finite, got {temperature}"):
        getattr(dropin, "Liger" + name)(temperature=temperature)
    with pytest.raises(ValueError, match=f"temperature must be > 0 and finite, got {temperature}"):
        dropin.liger_fused_linear_kl_div(*hidden(), log_probs().exp(), temperature=temperature)


def signatures(tree, prefix=""):
    """name -> [(argument, default)] of the functions and of the classes' methods in a syntax tree."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= signatures(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            names = [a.arg for a in node.args.args]
            defaults = [ast.unparse(d) for d in node.args.defaults]
            found[prefix + node.name] = list(zip(names, ["-"] * (len(names) - len(defaults)) + defaults))
    return found


def test_signatures():
    """From the source: importing Liger's modules takes Triton."""
    ours = signatures(ast.parse(inspect.getsource(dropin)))
    theirs = {}
    for file in importlib.metadata.files("liger-kernel"):
        wanted = file.parent.name == "transformers" or file.name == "jsd_loss.py"
        if wanted and file.suffix == ".py":
            theirs |= signatures(ast.parse(file.read_text()))
    shared = {
        name for name in ours if name.split(".")[-1] in ("__init__", "forward") or name.startswith("liger_")
    }
    assert len(shared) > 20
    for name in shared - {"LigerKLDIVLoss.__init__"}:
        assert ours[name] == theirs[name], name
