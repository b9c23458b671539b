"""Models of transformers that see images: their loss by hidden states and an lm_head, and what it teaches the projector."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdkernels as kd

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from causal_models import IMAGE, TEXT, causal, make, token_ids  # noqa: E402

from kdkernels.integrations.model_head import call_through_head  # noqa: E402

VISION = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)


def llava():
    model = make(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=16),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return model, 4, {"pixel_values": torch.randn(2, 3, 8, 8)}, model.model.multi_modal_projector.linear_1


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = dict(
        depth=1,
        embed_dim=16,
        hidden_size=32,
        num_heads=2,
        mlp_ratio=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    model = make(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=46,
        video_token_id=45,
    )
    pieces = {
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    return model, 4, pieces, model.model.visual.merger.mlp[0]


def idefics(name):
    """Idefics3, or SmolVLM, which is made as it is."""
    model = make(
        f"{name}ForConditionalGeneration",
        f"{name}Config",
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=VISION,
        image_token_id=IMAGE,
        scale_factor=2,
    )
    pieces = {"pixel_values": torch.randn(2, 1, 3, 8, 8)}
    return model, 1, pieces, model.model.connector.modality_projection.proj


def idefics3():
    return idefics("Idefics3")


def smolvlm():
    return idefics("SmolVLM")


def paligemma():
    model = make(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        text_config={"model_type": "gemma", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return model, 4, {"pixel_values": torch.randn(2, 3, 8, 8)}, model.model.multi_modal_projector.linear


def gemma3():
    model = make(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text_config={**TEXT, "final_logit_softcapping": 5.0},
        vision_config={**VISION, "vision_use_head": False},
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    pieces = {"pixel_values": torch.randn(2, 3, 8, 8)}
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model, 4, pieces, model.model.multi_modal_projector


def mllama():
    text = {
        **TEXT,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    vision = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=2,
        image_size=8,
        patch_size=4,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
        vision_output_dim=32,
        intermediate_layers_indices=[0],
    )
    model = make(
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
    )
    with torch.no_grad():  # the gates let no image in until they are trained
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(1.0)
    pieces = {
        "pixel_values": torch.randn(2, 1, 1, 3, 8, 8),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 9, 1, 1, dtype=torch.long),
    }
    return model, 0, pieces, model.model.multi_modal_projector


FAMILIES = [llava, qwen2_vl, idefics3, smolvlm, paligemma, gemma3, mllama]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_images_are_seen(family):
    """Two images give two losses, both the formula's on the model's own logits; the projector gets its gradient."""
    model, places, pieces, projector = family()
    teacher = causal("Llama")
    ids = token_ids()
    ids[:, 1 : 1 + places] = IMAGE
    labels = ids.roll(-1, 1).masked_fill(ids.roll(-1, 1) == IMAGE, -100)
    labels[:, -1] = -100
    with torch.no_grad():
        said = teacher(ids).logits
    losses = []
    for image in (pieces["pixel_values"].double(), 3 * pieces["pixel_values"].double().flip(0)):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pieces, "pixel_values": image}
        if kind := {gemma3: "token_type_ids", paligemma: "token_type_ids", qwen2_vl: "mm_token_type_ids"}.get(
            family
        ):
            inputs[kind] = (ids == IMAGE).long()
        ours = call_through_head(
            model, inputs, lambda head: kd.distillation_loss(head, said, labels, hard_weight=0.5)
        )
        own = model(**inputs, use_cache=False).logits
        kept = labels != -100
        log_q, log_p = own[kept].log_softmax(-1), said[kept].log_softmax(-1)
        theirs = (log_p.exp() * (log_p - log_q)).sum(-1).mean() + 0.5 * F.cross_entropy(
            own[kept], labels[kept]
        )
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
        weight = next(projector.parameters())
        gradients = [torch.autograd.grad(loss, weight)[0] for loss in (ours, theirs)]
        assert gradients[1].norm() > 1e-3
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6 * gradients[1].norm().item())
        losses.append(theirs.item())
    assert abs(losses[0] - losses[1]) > 1e-3
