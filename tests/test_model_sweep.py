"""Every causal model that transformers ships, built tiny: what call_through_head gives is right, or refused.

By hand: ``python -m pytest -m slow tests/test_model_sweep.py``, or ``python tests/test_model_sweep.py`` for the table of
docs/transformers.md.
"""

import collections
import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODELS  # noqa: E402

from kdkernels.backends.spec import LogitMap  # noqa: E402
from kdkernels.integrations.model_head import call_through_head  # noqa: E402

VOCAB = 48
#: Sizes by the names that configs give them; each config takes those that it knows.
TINY = dict(
    vocab_size=VOCAB,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
    max_position_embeddings=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=8,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
    d_model=32,
    n_layer=2,
    n_layers=2,
    n_head=4,
    n_heads=4,
    n_embd=32,
    num_heads=4,
    state_size=8,
    decoder_layers=2,
    decoder_attention_heads=4,
    decoder_ffn_dim=48,
    encoder_layers=1,
    encoder_attention_heads=4,
    encoder_ffn_dim=48,
    mamba_d_state=8,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_expand=2,
)
#: What some need beside.
MORE = {
    "codegen": dict(rotary_dim=8),
    "dbrx": dict(
        attn_config=dict(clip_qkv=8, kv_n_heads=2, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "dory": dict(head_dim=16),
    "dots3_note": dict(num_key_value_heads=4),
    "dots3_note_text": dict(num_key_value_heads=4),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma4_text": dict(vocab_size_per_layer_input=48, hidden_size_per_layer_input=8),
    "glm4_moe_lite": dict(head_dim=4),
    "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]]),
    "gptj": dict(rotary_dim=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1),
    "recurrent_gemma": dict(num_hidden_layers=3, lru_width=32),
    "reformer": dict(
        is_decoder=True, axial_pos_shape=(8, 8), axial_pos_embds_dim=(16, 16), attn_layers=["local", "local"]
    ),
    "roc_bert": dict(
        pronunciation_vocab_size=48, shape_vocab_size=48, pronunciation_embed_dim=16, shape_embed_dim=16
    ),
}
#: Compared nowhere, and why.
LEFT_OUT = {"reformer": "its backward asserts train mode, where its attention is drawn by chance"}
#: Refused, and why.
REFUSED = {
    "dory": "has parameters that a LinearHead leaves out: logit_scale",
    "prophetnet": "hands its lm_head hidden states",
}


def build(kind):
    """The model, or the reason why no tiny one could be made of it."""
    if kind in LEFT_OUT:
        return None, LEFT_OUT[kind]
    cls = getattr(transformers, MODELS[kind])
    config = cls.config_class
    names = {f.name for f in dataclasses.fields(config)} | set(getattr(config, "attribute_map", {}))
    try:
        made = config(**{**{n: v for n, v in TINY.items() if n in names}, **MORE.get(kind, {})})
        with torch.device("meta"):
            if (size := sum(p.numel() for p in cls(made).parameters())) > 20e6:
                return None, f"{size / 1e6:.0f} million parameters with the sizes above"
        torch.manual_seed(0)
        model = cls(made).eval()
        model(torch.tensor([[3, 4, 5]]), use_cache=False)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
    return model, ""


def gradients(loss, model):
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return dict(zip((n for n, p in model.named_parameters() if p.requires_grad), found))


def compare(model):
    """(error of the logits, of the worst parameter's gradient) beside the model's own; both relative."""
    ids = torch.randint(3, VOCAB, (2, 9))
    inputs, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.roll(-1, 1)
    loss, logits = call_through_head(
        model, inputs, lambda head: (kd.cross_entropy(head, labels), logits_of(head))
    )
    own = model(**inputs, use_cache=False).logits
    assert own.std() > 1e-3
    ours, theirs = (
        gradients(loss, model),
        gradients(F.cross_entropy(own.flatten(0, 1).float(), labels.flatten()), model),
    )
    assert [n for n in theirs if theirs[n] is None] == [n for n in ours if ours[n] is None]
    # Some gradients are zero but for rounding: a key's bias.
    floor = 1e-3 * max(g.norm() for g in theirs.values() if g is not None)
    worst = max((ours[n] - g).norm() / g.norm().clamp(min=floor) for n, g in theirs.items() if g is not None)
    return ((logits - own).abs().max() / own.abs().max()).item(), worst.item()


def logits_of(head):
    x = F.linear(head.hidden, head.weight, head.bias)
    return LogitMap(head.logit_scale, head.softcap or 0.0).logits(x, x.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_right_or_refused(kind):
    model, reason = build(kind)
    if model is None:
        pytest.skip(f"no tiny model: {reason}")
    if kind in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind]):
            compare(model)
    else:
        logits, gradient = compare(model)
        assert logits < 1e-5 and gradient < 1e-3


def main(kinds):
    table = collections.defaultdict(list)
    for kind in kinds or MODELS:
        torch.manual_seed(1)
        model, reason = build(kind)
        try:
            if model is None:
                said, table_row = f"not built: {reason}", "not built"
            else:
                logits, gradient = compare(model)
                table_row = "works" if logits < 1e-5 and gradient < 1e-3 else "wrong"
                said = f"{table_row}: logits {logits:.0e}, gradient {gradient:.0e}"
        except ValueError as error:
            said, table_row = f"refused: {error}", "refused"
        table[table_row].append(kind)
        print(f"{kind:30s} {said}", flush=True)
    for row, names in table.items():
        print(f"\n| {row} | {len(names)} | {', '.join(names)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
