"""Models of transformers as hidden states and an lm_head: logits, routers, and what is refused."""

import contextlib

import pytest
import torch
from torch import nn

import kdkernels as kd

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from causal_models import TEXT, VOCAB, causal, logits_of, make, token_ids  # noqa: E402
from quantized import quantized  # noqa: E402

from kdkernels.backends.spec import LogitMap  # noqa: E402
from kdkernels.integrations.model_head import call_through_head, check_head  # noqa: E402

# -- what a model does to its logits -----------------------------------------------------------------

MAPS = {
    "llama": (lambda: causal("Llama"), LogitMap()),
    "gemma2": (lambda: causal("Gemma2", final_logit_softcapping=1.5), LogitMap(1.0, 1.5)),
    "cohere": (lambda: causal("Cohere", logit_scale=0.3), LogitMap(0.3)),
    "granite": (lambda: causal("Granite", logits_scaling=4.0), LogitMap(0.25)),
    "hyperclovax": (lambda: causal("HyperCLOVAX", logits_scaling=4.0), LogitMap(4.0)),
    "recurrent gemma": (
        lambda: causal("RecurrentGemma", num_hidden_layers=3, lru_width=32, logits_soft_cap=2.0),
        LogitMap(1.0, 2.0),
    ),
    "xlstm": (
        lambda: make(
            "xLSTMForCausalLM",
            "xLSTMConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=4,
            output_logit_soft_cap=3.0,
        ),
        LogitMap(1.0, 3.0),
    ),
    "falcon h1's multiplier": (
        lambda: causal(
            "FalconH1",
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_n_groups=1,
            mamba_d_state=8,
            lm_head_multiplier=0.7,
        ),
        LogitMap(0.7),
    ),
    "modernbert's decoder": (lambda: causal("ModernBertDecoder"), LogitMap()),
    "llama4's text": (
        lambda: make(
            "Llama4ForCausalLM", "Llama4TextConfig", **TEXT, intermediate_size_mlp=48, num_local_experts=2
        ),
        LogitMap(),
    ),
    "negative, changed after construction": (
        lambda: changed(causal("Cohere"), logit_scale=-0.9),
        LogitMap(-0.9),
    ),
    "in place": (lambda: after(lambda self, z: z.mul_(0.25)), LogitMap(0.25)),
}


def blip2():
    """It wants images, and then does without the queries that their places would take."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config = transformers.Blip2Config(
        vision_config=dict(**sizes, image_size=8, patch_size=4),
        qformer_config=dict(**sizes, vocab_size=VOCAB, encoder_hidden_size=32),
        text_config=dict(model_type="llama", **TEXT),
        num_query_tokens=2,
        image_token_index=VOCAB - 1,
    )
    torch.manual_seed(0)
    model = transformers.Blip2ForConditionalGeneration(config).double().eval()
    model.inputs = {
        "input_ids": torch.tensor([[VOCAB - 1, VOCAB - 1, 3]]),
        "pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.float64),
    }
    return model


def test_a_model_that_takes_no_tokens_alone_says_what_to_do():
    model = blip2()
    with pytest.raises(
        ValueError, match=r"Blip2For.*forward of two tokens fails .*pixel_values.*check_head\(model, inputs\)"
    ):
        call_through_head(model, model.inputs, logits_of)
    measured = check_head(model, model.inputs)
    assert measured == LogitMap()
    with pytest.raises(
        ValueError, match="compares hidden states with input_ids, and inputs hold pixel_values"
    ):
        check_head(model, {"pixel_values": model.inputs["pixel_values"]})
    actual = call_through_head(model, model.inputs, logits_of)
    torch.testing.assert_close(actual, model(**model.inputs, use_cache=False).logits)


def changed(model, **attributes):
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize("name", MAPS)
def test_what_a_model_does_to_its_logits_is_measured(name):
    """Also where the config calls it something unknown; lm_heads large enough that every cap bends the logits."""
    build, expected_map = MAPS[name]
    model, inputs = build(), {"input_ids": token_ids()}
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    assert check_head(model) == pytest.approx(expected_map, rel=1e-6)
    expected = model(**inputs, use_cache=False).logits
    actual = call_through_head(model, inputs, logits_of)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_measured_too(dtype):
    assert check_head(causal("Gemma2", final_logit_softcapping=30.0, dtype=dtype)) == LogitMap(
        pytest.approx(1, rel=1e-6), 30.0
    )


@pytest.mark.parametrize("cast", [False, True], ids=["bf16 adapters", "fp32 adapters"])
@pytest.mark.parametrize("rank, alpha", [(8, 24), (16, 48), (8, 45.25)])
def test_loras_roundings_are_no_reason_to_refuse(rank, alpha, cast):
    """An adapter that is larger than the lm_head, as resumed ones may be; a scaling that is no power of two rounds too."""
    peft = pytest.importorskip("peft")
    sizes = dict(hidden_size=512, vocab_size=2048, num_hidden_layers=1, head_dim=32, initializer_range=0.02)
    for seed in range(6):
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["lm_head"])
        model = peft.get_peft_model(
            causal("Llama", dtype=torch.bfloat16, **sizes), lora, autocast_adapter_dtype=cast
        )
        head = model.get_base_model().lm_head
        low, high = head.lora_A["default"].weight.data, head.lora_B["default"].weight.data.normal_()
        delta = alpha / rank * (high.float() @ low.float())
        high.mul_(3 * head.base_layer.weight.float().norm() / delta.norm())
        assert check_head(model) == LogitMap()


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, options, found",
    [
        ("AdaLoraConfig", {"total_step": 10}, r"peft\.tuners\.adalora\.layer\.SVDLinear$"),
        ("LoHaConfig", {}, r"peft\.tuners\.loha\.layer\.Linear$"),
        ("IA3Config", {"feedforward_modules": []}, r"peft\.tuners\.ia3\.layer\.Linear$"),
        ("VeraConfig", {}, r"peft\.tuners\.vera\.layer\.Linear$"),
        ("LoraConfig", {"use_dora": True}, r"lora\.layer\.Linear and .*\.DoraLinearVariant$"),
        # peft then gives the lm_head keywords.
        ("LoraConfig", {"alora_invocation_tokens": [5]}, r"lora\.layer\.Linear and .*\.ALoraLinearVariant$"),
    ],
)
def test_other_adapters_of_the_head(config, options, found):
    """By the names of their modules: most call their layer Linear."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(causal("Llama"), getattr(peft, config)(target_modules=["lm_head"], **options))
    with pytest.raises(ValueError, match=f"only plain LoRA is supported on an lm_head, got .*{found}"):
        call_through_head(model, {"input_ids": token_ids()}, logits_of)


def test_activated_lora_below_the_head():
    """And on it, where the adapter is disabled."""
    peft = pytest.importorskip("peft")
    for modules in (["q_proj"], ["q_proj", "lm_head"]):
        lora = peft.LoraConfig(
            target_modules=modules,
            alora_invocation_tokens=[5],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(causal("Llama"), lora).double().eval()
        inputs = {"input_ids": token_ids()}
        inputs["input_ids"][:, 3] = 5
        with model.disable_adapter() if "lm_head" in modules else contextlib.nullcontext():
            expected, actual = model(**inputs).logits, call_through_head(model, inputs, logits_of)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_keywords_of_the_head_are_refused():
    class Scaling(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **options):
            hook = self.lm_head.register_forward_pre_hook(
                lambda m, a, k: (a, {"scale": 2.0}), with_kwargs=True
            )
            try:
                return super().forward(*arguments, **options)
            finally:
                hook.remove()

    model = Scaling(transformers.LlamaConfig(**TEXT)).eval()
    with pytest.raises(
        ValueError, match="Scaling gives its lm_head scale beside hidden states; distil it from"
    ):
        call_through_head(model, {"input_ids": token_ids()}, logits_of)


def test_labels_are_refused_by_name():
    model, ids = causal("Llama"), token_ids()
    with pytest.raises(
        ValueError, match="the inputs hold labels, .* leave them out, .* to the loss in function"
    ):
        call_through_head(model, {"input_ids": ids, "labels": ids}, logits_of)
    call_through_head(model, {"input_ids": ids, "labels": None}, logits_of)


@pytest.mark.parametrize("how", ["call_through_head", "check_head", "itself"])
def test_a_call_of_the_same_model_inside_its_own_is_refused(how):
    model, inputs = causal("Llama"), {"input_ids": token_ids()}
    calls = {
        "call_through_head": lambda: call_through_head(model, inputs, logits_of),
        "check_head": lambda: check_head(model),
        "itself": lambda: model(**inputs),
    }
    with pytest.raises(ValueError, match="LlamaForCausalLM is called inside its own call.*: call it before"):
        call_through_head(model, inputs, lambda head: calls[how]())
    other = causal("Llama")  # as a teacher is
    call_through_head(model, inputs, lambda head: call_through_head(other, inputs, logits_of))
    torch.testing.assert_close(call_through_head(model, inputs, logits_of), model(**inputs).logits)


class Head(nn.Linear):
    """An lm_head that does something of its own."""

    def __init__(self, own, forward, **parameters):
        super().__init__(own.in_features, own.out_features, bias=False, dtype=own.weight.dtype)
        self.weight, self.does = own.weight, forward
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, hidden):
        return self.does(self, super().forward(hidden))


def with_head(forward, **parameters):
    model = causal("Llama")
    model.lm_head = Head(model.lm_head, forward, **parameters)
    return model


class After(transformers.LlamaForCausalLM):
    """Something more is done to the logits."""

    does = staticmethod(lambda self, logits: logits)

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = self.does(self, output.logits)
        return output


def after(forward, **attributes):
    torch.manual_seed(0)
    model = After(transformers.LlamaConfig(**TEXT)).eval()
    return changed(model, does=forward, **attributes)


class Rounded(nn.Linear):
    """Training for 8 bits: its own weight, rounded to multiples of each group's largest over 127."""

    def forward(self, hidden):
        groups = self.weight.view(len(self.weight), -1, 16)
        step = groups.abs().amax(-1, keepdim=True) / 127
        return nn.functional.linear(hidden, ((groups / step).round() * step).view_as(self.weight))


def rounded():
    model = causal("Llama").bfloat16()
    model.lm_head = Rounded(32, VOCAB, bias=False, dtype=torch.bfloat16)
    return model


def in_8_bits():
    model = causal("Llama")
    model.lm_head.weight = nn.Parameter(quantized(model.lm_head.weight.detach()), requires_grad=False)
    return model


REFUSED = {
    "an lm_head of bf16 that rounds its weight to 8 bits": (rounded, r"lm_head \(Rounded\).*differ by"),
    "a quantized lm_head whose dtype is floating": (in_8_bits, "has no floating weight"),
    "a cap in the lm_head that small logits do not meet": (
        lambda: with_head(lambda self, z: 50 * torch.tanh(z / 50)),
        r"does more than hidden @ weight.T.*differ by",
    ),
    "an lm_head that is off by 1 %": (lambda: with_head(lambda self, z: 1.01 * z), "differ by 9.9e-03"),
    "a learned scale in the lm_head, 1 so far": (
        lambda: with_head(lambda self, z: z * self.logit_scale, logit_scale=torch.ones(())),
        "leaves out: logit_scale",
    ),
    "Dory's": (lambda: causal("Dory", head_dim=8, num_key_value_heads=4), "leaves out: logit_scale"),
    "a learned scale after it, 1 so far": (
        lambda: after(lambda self, z: z * self.learned, learned=nn.Parameter(torch.ones(()))),
        "something learned",
    ),
    "another function": (lambda: after(lambda self, z: z.sign() * z.abs().sqrt()), "does more to its logits"),
    "a mask": (
        lambda: after(lambda self, z: z.index_fill(-1, torch.tensor([5]), -1e9)),
        "does more to its logits",
    ),
    "a mask in place": (
        lambda: after(lambda self, z: z.index_fill_(-1, torch.tensor([5]), -1e9)),
        "does more to its logits",
    ),
    "a vocabulary cut short": (
        lambda: after(lambda self, z: z[..., :40]),
        r"makes \[1, 2, 40\] of .*\[1, 2, 48\]",
    ),
    "an encoder-decoder": (
        lambda: make(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCAB,
            d_model=16,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        "T5ForConditionalGeneration is an encoder-decoder",
    ),
    "no lm_head": (lambda: make("LlamaModel", "LlamaConfig", **TEXT), "has no lm_head"),
    "two lm_heads": (
        lambda: make(
            "MusicgenForCausalLM",
            "MusicgenDecoderConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        "MusicgenForCausalLM.*lm_head",
    ),
    "compiled in place": (
        lambda: (model := causal("Llama"), model.compile(backend="eager"))[0],
        "compile the part before",
    ),
    "compiled": (lambda: torch.compile(causal("Llama"), backend="eager"), "compile the part before"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_in_one_line(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        check_head(build())
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):  # and whoever does not check first
        call_through_head(build(), {"input_ids": token_ids()}, logits_of)


def test_another_lm_head_is_checked_too():
    """Of a model that was measured before; and the one that was measured is not measured again."""
    model, inputs = causal("Llama"), {"input_ids": token_ids()}
    call_through_head(model, inputs, logits_of)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    call_through_head(model, inputs, logits_of)
    assert len(calls) == 1
    first = model.lm_head
    model.lm_head = Head(first, lambda self, z: 3 * z)
    with pytest.raises(ValueError, match=r"lm_head \(Head\) does more than hidden @ weight.T"):
        call_through_head(model, inputs, logits_of)
    model.lm_head = nn.Linear(32, VOCAB, dtype=torch.float64)
    ours = call_through_head(model, inputs, logits_of)
    torch.testing.assert_close(ours.double(), model(**inputs).logits, rtol=1e-6, atol=1e-6)


def test_inputs_that_the_forward_does_not_name_are_refused():
    """It takes **kwargs and would pass over an image in silence."""
    model, ids = causal("Llama"), token_ids()
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM.forward does not name pixel_values and would ignore it"
    ):
        call_through_head(model, {"input_ids": ids, "pixel_values": torch.ones(1)}, logits_of)
    packed = {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 9])}  # attention's, which it passes on
    call_through_head(model, packed, logits_of)


def test_the_check_leaves_everything_as_it_was():
    model = causal("Llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()  # frozen, say
    modes = [module.training for module in model.modules()]
    state, hooks = torch.get_rng_state(), [len(m._forward_hooks) for m in model.modules()]
    model.model.embed_tokens.register_forward_hook(lambda *_: torch.rand(1) and None)
    check_head(model)
    assert torch.get_rng_state().equal(state) and torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()][0] == hooks[0]
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "hook, message",
    [
        (
            lambda module, arguments, logits: logits * 2,
            "a forward hook of LlamaForCausalLM's lm_head changes",
        ),
        (
            lambda module, arguments, logits: logits.half(),
            "has a forward hook, which gets no logits here: 'tuple'",
        ),
    ],
)
def test_hooks_that_change_logits_are_refused(hook, message):
    model = causal("Llama")
    model.lm_head.register_forward_hook(hook)
    with pytest.raises(ValueError, match=message):
        check_head(model)
    model = causal("Llama")
    model.register_forward_hook(lambda module, arguments, output: output.logits.half())
    with pytest.raises(ValueError, match="has a forward hook, which gets no logits here"):
        check_head(model)


def test_weights_that_are_elsewhere_are_refused():
    with torch.device("meta"):
        model = causal("Llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM's weights are on the meta device"):
        check_head(model)


def test_what_is_nothing_comes_back_as_nothing():
    model, inputs, seen = causal("Llama"), {"input_ids": token_ids()}, []
    assert call_through_head(model, inputs, lambda head: seen.append(head.vocab_size)) is None
    assert seen == [VOCAB]
    assert call_through_head(model, inputs, lambda head: ()) == ()


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step(backend, below):
    """The call is left out of its graphs, and with it all but what is compiled by itself, as the part below the head is."""
    inputs = {"input_ids": token_ids()}
    labels = inputs["input_ids"].roll(-1, 1)

    def outcome(compiled):
        model = causal("Llama", dtype=torch.float32)
        if compiled and below:
            model.base_model.compile(backend=backend)

        def step(scale):
            loss = call_through_head(model, inputs, lambda head: kd.cross_entropy(head, labels))
            return loss * scale.cos()

        step = torch.compile(step, backend=backend) if compiled else step
        for _ in range(2):
            model.zero_grad()
            loss = step(torch.tensor(0.3))
            loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    plain = outcome(False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = outcome(True)
    captured = torch._dynamo.utils.counters["stats"]["calls_captured"]
    assert captured > 20 if below else 0 < captured < 20
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    assert all(gradient.norm() > 1e-3 for gradient in plain[1].values())


def test_a_forward_that_fails_leaves_the_model_whole():
    model, ids = causal("Llama"), token_ids()
    with pytest.raises(ZeroDivisionError):
        call_through_head(model, {"input_ids": ids}, lambda head: 1 / 0)
    assert model(ids).logits.shape == (2, 9, VOCAB)


# -- routers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options",
    [
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}),
        ("GptOss", {"num_local_experts": 4}),
        ("JetMoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}),
    ],
)
def test_a_routers_loss_is_added_as_the_model_adds_it(name, options, tmp_path):
    from kdkernels.integrations.transformers import DistillationTrainer

    model = causal(name, output_router_logits=True, dtype=torch.float32, **options)
    arguments = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    trainer = DistillationTrainer(model, arguments, teacher=None, soft_weight=0.0, hard_weight=1.0)
    ids = token_ids(2, 12)
    labels = ids.clone()
    labels[0, :4] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    own = model(**batch)
    assert own.aux_loss.item() > 0.5
    for items, share in ((None, 1.0), (19, 1.0), (38, 0.5)):  # of 19 tokens here
        ours = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        assert ours.item() == pytest.approx(share * own.loss.item(), rel=1e-5)
    model.zero_grad()
    own.loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainer.compute_loss(model, dict(batch)).backward()
    routers = [n for n in expected if "gate." in n or "router" in n]
    assert routers
    for n in routers:
        assert expected[n].norm() > 1e-4
        torch.testing.assert_close(model.get_parameter(n).grad, expected[n], rtol=1e-3, atol=1e-5)
