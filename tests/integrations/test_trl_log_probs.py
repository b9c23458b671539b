"""Log-probabilities and entropies beside TRL's own, and through its fused lm_head."""

import warnings

import pytest
import torch
from compare import assert_same, outcome

from kdkernels.integrations import trl as dropin

pytest.importorskip("trl")
from transformers import LlamaConfig, LlamaForCausalLM
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "experimental"
    from trl.experimental.cpo import cpo_trainer

their = {
    name: getattr(utils, name)
    for name in ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
}
B, T, V = 3, 5, 41


def logits(dtype=torch.float64):
    return (2 * torch.randn(B, T, V)).to(dtype)


def weighed(function, *given, **options):
    """The sum of every value times a number for each entry, then the values."""

    def call(z):
        torch.manual_seed(5)
        values = function(z, *given, **options)
        values = values if isinstance(values, tuple) else (values,)
        return sum(
            (v * torch.randn(v.shape, dtype=v.dtype)).sum() for v in values if v.requires_grad
        ), *values

    return call


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("slots", [(), (6,)], ids=["one id", "six ids"])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax(slots, masked, temperature, dtype, tolerance):
    z, index = logits(dtype), torch.randint(0, V, (B, T, *slots))
    options = {"temperature": temperature}
    if masked:
        options["row_mask"] = (torch.rand(index.shape) > 0.4).long()
    ours, theirs = (
        outcome(weighed(f, index, **options), [z])
        for f in (dropin.selective_log_softmax, their["selective_log_softmax"])
    )
    assert_same(ours, theirs, tolerance)


@pytest.mark.parametrize("shape", [(B, T), (B * T,), (2, 3, 2)])
def test_entropy(shape):
    z = torch.randn(*shape, V, dtype=torch.float64)
    ours, theirs = (
        outcome(weighed(f), [z]) for f in (dropin.entropy_from_logits, their["entropy_from_logits"])
    )
    assert_same(ours, theirs, 1e-9)


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_both(with_gradient, temperature):
    z, index = logits(), torch.randint(0, V, (B, T))
    mask = torch.rand(B, T) > 0.4
    name = "selective_log_softmax_and_entropy"
    options = dict(entropy_requires_grad=with_gradient, temperature=temperature, row_mask=mask)
    ours, theirs = (outcome(weighed(f, index, **options), [z]) for f in (getattr(dropin, name), their[name]))
    assert_same(ours, theirs, 1e-9)
    assert not ours[0][2][~mask].any()
    _, entropy = getattr(dropin, name)(z.requires_grad_(), index, **options)
    assert entropy.requires_grad == with_gradient


def test_an_id_below_0_is_none():
    """To kd.token_log_probs -1 is no id and -100 a masked token; TRL's gather fails. Masked rows may have any."""
    z, index = logits(), torch.randint(0, V, (B, T))
    mask = torch.ones(B, T)
    mask[1, 2] = 0
    weight = torch.randn(V, 8)
    for bad in (-1, -100):
        wrong = index.masked_fill(mask == 0, bad)
        with pytest.raises(RuntimeError):
            their["selective_log_softmax"](z, wrong)
        for call in (
            lambda wrong=wrong: dropin.selective_log_softmax(z, wrong),
            lambda wrong=wrong: dropin.selective_log_softmax_and_entropy(z, wrong),
            lambda wrong=wrong: dropin.ChunkedLogProbFunction.apply(
                torch.randn(T, 8), weight, None, wrong[1], 1.0, 4, None, 1.0, ("entropy",)
            ),
        ):
            with pytest.raises(ValueError, match=f"ids must be >= 0, found {bad}"):
                call()
        for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
            ours, theirs = (
                function(z, ids, row_mask=mask)
                for function, ids in ((getattr(dropin, name), wrong), (their[name], index))
            )
            torch.testing.assert_close(ours, theirs)


def test_padding_has_an_entropy():
    z = logits()
    z[..., 30:] = -torch.inf
    leaf = z.clone().requires_grad_()
    assert their["entropy_from_logits"](z).isnan().all()
    mine = dropin.entropy_from_logits(leaf)
    torch.testing.assert_close(mine, their["entropy_from_logits"](z[..., :30]))
    (slope,) = torch.autograd.grad(mine.sum(), leaf)
    assert slope.isfinite().all() and slope.norm() > 1e-2 and not slope[..., 30:].any()


def test_half_precision_is_taken_in_fp32():
    z, index = logits(torch.bfloat16), torch.randint(0, V, (B, T))
    exact = z.double().log_softmax(-1).gather(-1, index[..., None])[..., 0]
    mine, theirs = dropin.selective_log_softmax(z, index), their["selective_log_softmax"](z, index)
    assert (mine.dtype, theirs.dtype) == (torch.float32, torch.bfloat16)
    assert (mine - exact).abs().max() < 1e-5 < 1e-3 < (theirs.double() - exact).abs().max()


OUTPUTS = "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"


@pytest.mark.parametrize("outputs", [(), OUTPUTS[:1], ("entropy", "is_top1"), ("mean_logits",), OUTPUTS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_chunked_function(outputs, bias, softcap):
    hidden, weight = torch.randn(9, 8), torch.randn(V, 8)
    targets = (hidden @ weight.t()).argmax(-1)
    targets[::2] = torch.randint(0, V, (5,))
    leaves = [hidden, weight] + [torch.randn(V)] * bias

    def call(function):
        def loss(h, w, b=None):
            made = function.apply(h, w, b, targets, 1.3, 16, softcap, 0.7, outputs)
            assert [value is None for value in made[1:]] == [name not in outputs for name in OUTPUTS]
            assert [value.requires_grad for value in made[2:] if value is not None] == [False] * sum(
                name in outputs for name in OUTPUTS[1:]
            )
            values = [value for value in made if value is not None]
            torch.manual_seed(5)
            total = sum((v * torch.randn(v.shape)).sum() for v in values if v.is_floating_point())
            return (total, *(v.double() for v in values))

        return outcome(loss, leaves)

    assert_same(call(dropin.ChunkedLogProbFunction), call(ChunkedLogProbFunction), 3e-5)


def test_the_mean_logit_is_fp32_under_autocast():
    """As TRL's, of hidden states and weights in the dtype of autocast."""
    hidden, weight, targets = torch.randn(64, 256), torch.randn(500, 256) + 0.3, torch.randint(0, 500, (64,))
    exact = (hidden.bfloat16().double() @ weight.bfloat16().double().t()).mean(-1)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (
            function.apply(hidden, weight, None, targets, 1.0, 256, None, 1.0, ("mean_logits",))[3]
            for function in (dropin.ChunkedLogProbFunction, ChunkedLogProbFunction)
        )
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()


def test_what_a_policy_and_its_reference_say_of_one_model_is_the_same():
    """Whatever else a trainer asks for: DPO's rewards begin at exactly 0."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = torch.randn(50, 24, dtype=dtype), torch.randn(1000, 24, dtype=dtype)
        targets = torch.randint(0, 1000, (50,))
        alone = dropin.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 256, None, 1.0, ())[0]
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        for outputs in (OUTPUTS, ("entropy", "mean_logits"), ("entropy", "mean_logits", "is_top1")):
            made = dropin.ChunkedLogProbFunction.apply(*leaves, None, targets, 1.0, 256, None, 1.0, outputs)
            assert torch.equal(made[0], alone)


def test_under_zero_3_it_is_theirs():
    hidden, weight, targets = torch.randn(9, 8), torch.randn(V, 8), torch.randint(0, V, (9,))
    weight.ds_id = 0
    given = hidden, weight, None, targets, 1.0, 16
    for mine, theirs in zip(
        dropin.ChunkedLogProbFunction.apply(*given), ChunkedLogProbFunction.apply(*given)
    ):
        assert torch.equal(mine, theirs)


def test_a_fused_model_and_a_trainer_use_them():
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.randint(0, V, (2, 7))
    labels = ids.masked_fill(torch.rand(2, 7) < 0.3, -100)
    head = model.lm_head.weight

    def step():
        made = model(input_ids=ids, labels=labels, fused_lm_head=True)
        loss = made.loss + 0.1 * made.entropy.sum()
        return [made.log_probs, made.entropy, loss], torch.autograd.grad(loss, [head])

    theirs = step()
    with dropin.patch():
        assert utils._ChunkedLogProbFunction is dropin.ChunkedLogProbFunction
        assert cpo_trainer.selective_log_softmax is dropin.selective_log_softmax
        ours = step()
    assert_same(ours, theirs, 3e-5)
    assert cpo_trainer.selective_log_softmax is their["selective_log_softmax"]
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
