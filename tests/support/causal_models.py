"""Tiny causal models of transformers by their names, and what their lm_heads say."""

import torch
import torch.nn.functional as F
import transformers

from kdkernels.backends.spec import LogitMap

VOCAB, IMAGE = 48, 47  #: tokens, and the one that stands for a piece of an image
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def make(model, config, *, dtype=torch.float64, **options):
    """A tiny model of random weights in eval mode."""
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).to(dtype).eval()


def causal(name, **options):
    return make(name + "ForCausalLM", name + "Config", **{**TEXT, **options})


def logits_of(head):
    x = F.linear(head.hidden, head.weight, head.bias)
    return LogitMap(head.logit_scale, head.softcap or 0.0).logits(x, x.dtype)


def token_ids(rows=2, length=9):
    return torch.randint(3, IMAGE, (rows, length))
