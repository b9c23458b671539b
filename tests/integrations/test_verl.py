"""verl's log-probabilities and entropies beside its own, loaded file by file: its package wants Ray and more."""

import sys
import types

import pytest
import torch
from compare import assert_same, outcome
from source import load

from kdkernels.integrations import verl as dropin

fused = load("verl", "verl/utils/experimental/torch_functional.py")
B, T, V, H = 2, 5, 37, 12


@pytest.fixture(scope="module")
def functional():
    """verl.utils.torch_functional, with names alone in the place of what it imports for other functions."""
    stand_ins = {
        "tensordict": {"TensorDict": object},
        "verl": {},
        "verl.utils": {},
        "verl.utils.device": {"get_device_name": lambda: "cpu", "get_torch_device": lambda: torch},
        "verl.utils.experimental": {},
        "verl.utils.ulysses": {
            "get_ulysses_sequence_parallel_world_size": lambda: 1,
            "slice_input_tensor": None,
        },
        "verl.workers": {},
        "verl.workers.config": {"DistillationConfig": object, "DistillationLossConfig": object},
        "verl.trainer": {},
        "verl.trainer.distillation": {},
        "verl.trainer.distillation.fsdp": {},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, attributes in stand_ins.items():
            module = types.ModuleType(name)
            vars(module).update(attributes)
            patch.setitem(sys.modules, name, module)
        loaded = load("verl", "verl/utils/torch_functional.py")
        patch.setitem(sys.modules, "verl.utils.torch_functional", loaded)
        patch.setitem(sys.modules, "verl.utils.experimental.torch_functional", fused)
        losses = load("verl", "verl/trainer/distillation/fsdp/losses.py")
        patch.setitem(sys.modules, "verl.trainer.distillation.fsdp.losses", losses)
        yield loaded


def weighed(function, *given, **options):
    def call(*leaves):
        torch.manual_seed(5)
        values = function(*leaves, *given, **options)
        values = values if isinstance(values, tuple) else (values,)
        return sum((v * torch.randn(v.shape, dtype=v.dtype)).sum() for v in values), *values

    return call


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_log_probs(functional, dtype, tolerance):
    logits, labels = (2 * torch.randn(B, T, V)).to(dtype), torch.randint(0, V, (B, T))
    ours, theirs = (outcome(weighed(m.logprobs_from_logits, labels), [logits]) for m in (dropin, functional))
    assert_same(ours, theirs, tolerance)


@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
def test_entropies(functional, name):
    logits = 2 * torch.randn(B * T, V)
    ours, theirs = (outcome(weighed(getattr(m, name)), [logits]) for m in (dropin, functional))
    assert_same(ours, theirs, 2e-5)


def test_padding_has_an_entropy(functional):
    logits = torch.randn(B, V, dtype=torch.float64)
    logits[:, 30:] = -torch.inf
    leaf = logits.clone().requires_grad_()
    assert functional.entropy_from_logits(logits).isnan().all()
    mine = dropin.entropy_from_logits(leaf)
    torch.testing.assert_close(mine, functional.entropy_from_logits(logits[:, :30]))
    (slope,) = torch.autograd.grad(mine.sum(), leaf)
    assert slope.isfinite().all() and slope.norm() > 1e-2


def test_an_id_below_0_is_none(functional):
    """To kd.token_log_probs -1 is no id. verl's gather fails; its flash-attn gives 0 for -100."""
    logits, labels = torch.randn(B, T, V), torch.randint(0, V, (B, T))
    labels[1, 2] = -1
    fused_linear, weight = dropin.FusedLinearForPPO(), torch.randn(V, H)
    for call in (
        lambda: dropin.logprobs_from_logits(logits, labels),
        lambda: dropin.chunked_topk_log_probs(logits, labels[..., None].expand(-1, -1, 3)),
        lambda: fused_linear(torch.randn(B, T, H), weight, labels),
    ):
        with pytest.raises(ValueError, match="ids must be >= 0.*, found -1"):
            call()
    with pytest.raises(RuntimeError):
        functional.logprobs_from_logits(logits, labels)
    assert dropin.logprobs_from_logits(logits, labels.where(labels >= 0, -100))[1, 2] == 0
    with pytest.raises(ValueError, match="found -100"):
        fused_linear(torch.randn(B, T, H), weight, labels.where(labels >= 0, -100))


def test_another_implementation_is_refused():
    for module in (dropin, fused):
        module.FusedLinearForPPO(impl_backend="liger")
        with pytest.raises(ValueError, match="triton"):
            module.FusedLinearForPPO(impl_backend="triton")


def test_the_backward_in_place():
    hidden, labels = torch.randn(B, T, V, requires_grad=True), torch.randint(0, V, (B, T))
    plain = torch.autograd.grad((hidden * 1.5).log_softmax(-1).gather(-1, labels[..., None]).sum(), hidden)[0]
    for inplace in (True, False):
        logits = hidden * 1.5
        before = logits.detach().clone()
        (slope,) = torch.autograd.grad(dropin.logprobs_from_logits(logits, labels, inplace).sum(), hidden)
        torch.testing.assert_close(slope, plain)
        assert torch.equal(logits, before) == (not inplace)
    leaf = hidden.detach().clone().requires_grad_()
    dropin.logprobs_from_logits(leaf, labels).sum().backward()
    assert torch.equal(leaf, hidden) and leaf.grad.norm() > 0.1


@pytest.mark.parametrize("shape", [(B, T), (B * T,)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("asked", ["both", "log_probs", "entropy"])
def test_fused_linear(shape, temperature, asked):
    hidden, weight = torch.randn(*shape, H), torch.randn(V, H)
    ids = torch.randint(0, V, shape, dtype=torch.int32)
    results = []
    for module in (dropin.FusedLinearForPPO(chunk_size=4), fused.FusedLinearForPPO(chunk_size=4)):

        def call(h, w, module=module):
            torch.manual_seed(5)
            values = dict(zip(("log_probs", "entropy"), module(h, w, ids, temperature=temperature)))
            kept = values.values() if asked == "both" else [values[asked]]
            return sum((v * torch.randn(v.shape)).sum() for v in kept), *values.values()

        results.append(outcome(call, [hidden, weight]))
    assert_same(*results, 3e-5)


def test_half_precision_is_taken_in_fp32(functional):
    hidden, weight, ids = (
        torch.randn(T, H).bfloat16(),
        torch.randn(V, H).bfloat16(),
        torch.randint(0, V, (T,)),
    )
    assert fused.FusedLinearForPPO()(hidden, weight, ids)[1].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in dropin.FusedLinearForPPO()(hidden, weight, ids))
    logits = torch.randn(2, T, V).bfloat16()
    assert functional.logprobs_from_logits(logits, ids.expand(2, -1)).dtype == torch.bfloat16
    assert dropin.logprobs_from_logits(logits, ids.expand(2, -1)).dtype == torch.float32


def test_patch_reaches_what_imported_them(functional, monkeypatch):
    worker = types.ModuleType("verl.workers.engine")
    worker.logprobs_from_logits = theirs = functional.logprobs_from_logits
    monkeypatch.setitem(sys.modules, "verl.workers.engine", worker)
    with dropin.patch():
        assert worker.logprobs_from_logits is dropin.logprobs_from_logits
        assert fused.FusedLinearForPPO is dropin.FusedLinearForPPO
    assert worker.logprobs_from_logits is functional.logprobs_from_logits is theirs
    assert fused.FusedLinearForPPO is not dropin.FusedLinearForPPO


@pytest.mark.parametrize("clamp", [None, -4.0])
def test_distillation_on_a_teachers_top_k(functional, clamp):
    """verl's own loss, with its switch for long contexts, before and after patch()."""
    losses = sys.modules["verl.trainer.distillation.fsdp.losses"]
    logits, teacher = 2 * torch.randn(1, 9, V), torch.randn(9, V).log_softmax(-1).topk(4, -1)
    # Packed sequences of 4 and 5 tokens.
    log_p, ids = (torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 4, 9])) for x in teacher)
    settings = types.SimpleNamespace(use_chunked_topk=True, log_prob_min_clamp=clamp)
    config = types.SimpleNamespace(distillation_loss=settings)

    def call(s):
        made = losses.compute_forward_kl_topk(s, log_p, ids, config, "thd")
        return (made["distillation_losses"].sum(), *(value.double() for value in made.values()))

    theirs = outcome(call, [logits])
    settings.use_chunked_topk = False
    assert_same(theirs, outcome(call, [logits]), 2e-5)
    settings.use_chunked_topk = True
    with dropin.patch():
        assert losses._chunked_topk_log_probs is dropin.chunked_topk_log_probs
        assert_same(outcome(call, [logits]), theirs, 2e-5)


@pytest.mark.parametrize("view", [lambda z: z, lambda z: z.squeeze(0).unsqueeze(0)], ids=["same", "view"])
def test_logits_that_the_teachers_top_k_reads_again_are_not_overwritten(functional, view):
    """As verl calls both on the same memory; the backward of what is called last comes first."""
    losses = sys.modules["verl.trainer.distillation.fsdp.losses"]
    hidden, labels = torch.randn(1, 9, V), torch.randint(0, V, (1, 9))
    top = torch.randn(1, 9, V).topk(4).indices

    def call(x, policy):
        logits = x * 1.5
        given = (
            losses._chunked_topk_log_probs(view(logits), top),
            policy.logprobs_from_logits(logits, labels, inplace_backward=True),
        )
        return weighed(lambda: given)()

    theirs = outcome(call, [hidden], functional)
    with dropin.patch():
        ours = outcome(call, [hidden], dropin)
    assert_same(ours, theirs, 2e-5)
    other = hidden.requires_grad_() * 1.5
    before = other.detach().clone()
    dropin.logprobs_from_logits(other, labels).sum().backward()
    assert not torch.equal(other, before)  # other logits still are
