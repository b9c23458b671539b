"""How many operations of torch a call starts around its kernels. On a GPU each is a launch of its own, small beside the
kernels of many rows and not beside those of few."""

import pytest
import torch

import kdkernels as kd

#: Views, memory and Python: nothing that a GPU would run.
FREE = {
    *(
        "alias",
        "as_strided",
        "detach",
        "detach_",
        "expand",
        "lift_fresh",
        "narrow",
        "permute",
        "reshape",
        "resolve_conj",
    ),
    *(
        "select",
        "slice",
        "split",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
        "result_type",
        "to",
    ),
    *(
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "resize_",
        "item",
        "is_nonzero",
        "_local_scalar_dense",
    ),
    *("as_strided_", "advise_huge_pages"),
}
TOKENS, VOCAB, HIDDEN, SLOTS = 16, 1000, 64, 8


def launches(call) -> list[str]:
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    made = []
    for event in profile.events():
        namespace, _, name = event.name.partition("::")
        inner = (child.name.partition("::")[2] for child in event.cpu_children)
        if namespace in ("aten", "kdkernels_native") and name not in FREE and FREE.issuperset(inner):
            made.append(name)
    return made


def calls() -> dict:
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, VOCAB, requires_grad=True)
    teacher, ids = torch.randn(TOKENS, VOCAB), torch.randint(VOCAB, [TOKENS])
    labels = ids.index_fill(0, torch.tensor([3]), -100)
    hidden, weight = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN)
    top = teacher.log_softmax(-1).topk(SLOTS)

    def sparse(tail):
        target = kd.SparseTarget(top.indices, logprobs=top.values, tail=tail)
        return lambda: kd.kl_div(logits, target)

    def log_probs(student, ids):
        return lambda: kd.token_log_probs(student, ids).log_probs.sum()

    return {
        "dense": lambda: kd.kl_div(logits, teacher),
        "hard term": lambda: kd.distillation_loss(logits, teacher, labels, hard_weight=0.5),
        "hidden": lambda: kd.kl_div(kd.LinearHead(hidden, weight), teacher),
        "log_probs": log_probs(logits, ids),
        "log_probs of hidden": log_probs(kd.LinearHead(hidden, weight), ids),
        "log_probs of several": log_probs(logits, top.indices),
        **{tail: sparse(tail) for tail in ("bucket", "conditional", "renormalize", "truncate")},
    }


#: Of a forward and a backward on a CPU, whose checks look at values where a GPU's assert. Another torch may have a few more.
MOST = {
    "dense": 18,
    "hard term": 41,
    "hidden": 27,
    "log_probs": 108,
    "log_probs of hidden": 159,
    "log_probs of several": 146,
    "bucket": 113,
    "conditional": 96,
    "renormalize": 60,
    "truncate": 73,
}


@pytest.mark.skipif(kd.backends()["native"] is not None, reason="counts the native backend's")
@pytest.mark.parametrize("name", MOST)
def test_a_call_starts_few_operations(monkeypatch, name):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # tests/conftest.py
    call = calls()[name]
    started = launches(lambda: call().backward())
    assert any(one in ("fused", "fused_sparse", "accumulate") for one in started)
    assert len(started) <= 1.05 * MOST[name], started
