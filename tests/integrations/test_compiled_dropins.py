"""Every drop-in under torch.compile gives what it gives without, the gradient too."""

from dataclasses import dataclass

import pytest
import torch
from compiled import assert_compiled

from kdkernels.integrations import axolotl, distillkit, functional, liger, modelopt, torchtune, trl, verl

N, V, H, K = 6, 21, 8, 4
REDUCTIONS = ("none", "sum", "mean", "batchmean")


@dataclass
class WithLogits:
    """What a model or a teacher returns."""

    logits: torch.Tensor


def autocast_kl_div(x, t):
    with torch.autocast("cpu", torch.bfloat16):
        return functional.kl_div(x.bfloat16(), t.bfloat16())


def cases():
    """name -> (function, leaves); what is no leaf is a constant of the function."""
    torch.manual_seed(0)
    s, t, u = 3 * torch.randn(3, N, V)
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    teacher = torch.randn(N, H + 4), torch.randn(V, H + 4)
    p, q, log_q = t.softmax(-1), s.softmax(-1), s.log_softmax(-1)
    labels = torch.randint(0, V, (N,))
    labels[[1, 4]] = -100
    kept = labels != -100
    top = t.log_softmax(-1).topk(K, -1)
    both = lambda x: x.view(2, N // 2, *x.shape[1:])  # noqa: E731

    found = {}
    for reduction in REDUCTIONS:
        found[f"kl_div {reduction}"] = (
            (lambda x, t, r=reduction: functional.kl_div(x, t, reduction=r)),
            [log_q, p],
        )
        found[f"tvd {reduction}"] = (lambda x, r=reduction: liger.liger_tvd(x, p, labels, r)), [q]
        found[f"modelopt {reduction}"] = (
            lambda x, r=reduction: modelopt.LogitsDistillationLoss(2.0, r)(x, t),
            [s],
        )
    found |= {
        "kl_div log_target": (lambda x, t: functional.kl_div(x, t, log_target=True), [log_q, p.log()]),
        "kl_div one side": (lambda x: functional.kl_div(x, p), [log_q]),
        "kl_div bf16": (lambda x: functional.kl_div(x.bfloat16(), p, reduction="sum"), [log_q]),
        "kl_div autocast": (autocast_kl_div, [log_q, p]),
        "kl_div beside torch's": (lambda x: functional.kl_div(functional.log_softmax(x, -1), p), [s]),
        "liger kl_div": (lambda x: liger.liger_kl_div(x, p, reduction="batchmean"), [log_q]),
        "liger jsd": (lambda x: liger.liger_jsd(x, t, labels, 0.3), [log_q]),
        "liger tvd, no labels": (lambda x: liger.LigerTVDLoss()(x, p), [q]),
        "liger fused jsd": (
            lambda h, w: liger.liger_fused_linear_jsd(h, w, *teacher, labels),
            [hidden, weight],
        ),
        "liger fused kl": (
            lambda h, w: liger.liger_fused_linear_kl_div(h, w, p, labels, temperature=2.0),
            [hidden, weight],
        ),
        "liger ce": (lambda x: liger.liger_cross_entropy(x, labels, softcap=5.0), [s]),
        "liger fused ce": (
            lambda h, w, b: liger.liger_fused_linear_cross_entropy(h, w, labels, b, softcap=5.0),
            [hidden, weight, bias],
        ),
        "liger ce and tvd": (lambda x: liger.LigerFusedCETVDLoss()(x, t, labels), [s]),
        "liger chunked jsd": (
            lambda h, w, b: liger.LigerFusedLinearJSDLoss(return_soft_hard_loss=True)(
                h, w, *teacher, labels, b
            ),
            [hidden, weight, bias],
        ),
        "modelopt kl": (lambda x: modelopt.LogitsKLLoss(reverse=True)(both(x), both(t))[0], [s]),
        "modelopt top k": (lambda x: modelopt.TopKLogitsKLLoss(top_k=K)(both(x), both(t))[0], [s]),
        "torchtune": (lambda x: torchtune.SymmetricKLLoss()(x, t, labels), [s]),
        "torchtune chunked": (
            lambda x: torchtune.ReverseKLWithChunkedOutputLoss(2)(
                both(x).chunk(2, 1), both(t).chunk(2, 1), both(labels)
            ),
            [s],
        ),
        "axolotl": (
            lambda h, w, b: axolotl.LigerFusedLinearKLTopKLogprobLoss(temperature=2.0)(
                w,
                both(h),
                both(top.indices),
                both(top.values),
                both(kept)[..., None].expand(2, -1, K),
                both(labels),
                b,
            ),
            [hidden, weight, bias],
        ),
        "distillkit": (
            lambda x: distillkit.sparse_kl_div(
                both(x), both(top.indices), both(top.values), both(kept), temperature=2.0
            ),
            [s],
        ),
        "distillkit bucket": (
            lambda x: distillkit.sparse_kl_div(
                both(x),
                both(top.indices),
                both(top.values),
                both(kept),
                missing="symmetric_uniform",
                temperature=2.0,
            ),
            [s],
        ),
        "distillkit dense": (
            lambda x: distillkit.KLDLoss(2.0)(WithLogits(both(x)), WithLogits(both(t)), both(kept)),
            [s],
        ),
        "trl jsd": (lambda x: trl.generalized_jsd_loss(both(x), both(t), both(labels), 0.3), [s]),
        "trl jsd, no labels": (
            lambda x: trl.generalized_jsd_loss(both(x), both(t), beta=0.3, reduction="none"),
            [s],
        ),
        "trl gold": (lambda x: trl.gold_generalized_jsd_loss(both(x), both(p), logits_are_probs=True), [q]),
        "trl log-probabilities": (lambda x: trl.selective_log_softmax(x, labels, row_mask=kept), [s]),
        "verl log-probabilities": (lambda x: verl.logprobs_from_logits(2 * x, labels), [s]),
        "trl minillm": (lambda x: trl.minillm_single_step_loss(None, both(x), both(t), both(kept)), [s]),
    }
    return found


def several_graphs():
    """What no single graph can hold: TRL's shape depends on how many labels there are."""
    s, t = 3 * torch.randn(2, 2, N // 2, V)
    labels = torch.tensor([[0, -100, 0], [-100, 0, 0]])
    return {
        "trl jsd, live rows": (lambda x: trl.generalized_jsd_loss(x, t, labels, 0.3, reduction="none"), [s])
    }


CASES = cases()
FEW = (
    "kl_div none",
    "kl_div mean",
    "kl_div log_target",
    "tvd batchmean",
    "liger fused kl",
    "liger ce",
    "liger chunked jsd",
    "modelopt top k",
    "torchtune chunked",
    "axolotl",
    "distillkit bucket",
    "trl gold",
    "verl log-probabilities",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in CASES]
)
def test_as_one_graph(name):
    assert_compiled(*CASES[name])


@pytest.mark.parametrize("name", ["kl_div batchmean", "tvd none"])
def test_by_inductor(name):
    assert_compiled(*CASES[name], backend="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", [*CASES, "trl jsd, live rows"])
def test_in_any_number_of_graphs(name, backend):
    assert_compiled(*{**CASES, **several_graphs()}[name], backend=backend, fullgraph=False)
