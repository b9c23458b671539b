"""A draft model for speculative decoding, EAGLE-3's kind: from the target's hidden states it guesses what the target
says next, in a part of its vocabulary. The loss is the negative log acceptance, and the KL while little is accepted.

python examples/draft_model.py
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import kdkernels as kd
from kdkernels.integrations.transformers import call_through_head

VOCAB, DRAFT_VOCAB, WIDTH, LENGTH, STEPS = 128, 64, 64, 16, 101
SIZES = dict(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2)
PLAIN = dict(num_attention_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0)


class Draft(nn.Module):
    """In your script: a decoder layer. From the target's state at t and token t + 1 it guesses token t + 2."""

    def __init__(self, target, rows):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(target.get_input_embeddings().weight)
        self.mix = nn.Sequential(nn.Linear(2 * WIDTH, 256), nn.SiLU(), nn.Linear(256, WIDTH))
        self.lm_head = nn.Parameter(rows.clone())

    def forward(self, states, tokens):
        return kd.LinearHead(self.mix(torch.cat([states, self.embed(tokens)], -1)), self.lm_head)


@torch.no_grad()
def judged(full, t2d, rows):
    """(the target over the draft's vocabulary, which tokens count, how much of the target's mass is in there), given
    its LinearHead, the tokens that the draft speaks (bool [V]) and the lm_head's rows of these, taken once."""
    inside = kd.LinearHead(full.hidden, rows)
    no_ids = torch.full(full.hidden.shape[:-1], -1)
    whole, part = (kd.token_log_probs(head, no_ids, return_stats=True) for head in (full, inside))
    return inside, t2d[whole.top1], (part.logsumexp - whole.logsumexp).exp()


def loss_of(draft, teacher, mask):
    """(LK hybrid, acceptance): means over the tokens that count, from one projection of either model."""
    both = kd.ForwardKL(), kd.Overlap()
    kl, overlap = kd.distillation_loss(draft, teacher, mask=mask, divergence=both, reduction="none")
    weight = torch.exp(-3.0 * overlap.detach())
    # Elsewhere it is 0, whose logarithm nobody wants; nor that of what underflows in fp32.
    not_accepted = -torch.where(mask, overlap, 1.0).clamp_min(1e-37).log()
    each = torch.where(mask, weight * kl + (1 - weight) * not_accepted, 0.0)
    return each.sum() / mask.sum(), (overlap.detach().sum() / mask.sum()).item()


def main():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **PLAIN, initializer_range=0.3)
    target = LlamaForCausalLM(config).eval().requires_grad_(False)
    prompts = torch.randint(1, VOCAB, (256, 2))
    ones = torch.ones_like(prompts)
    text = target.generate(prompts, attention_mask=ones, do_sample=True, top_k=0, max_new_tokens=LENGTH)
    seen = text.flatten().bincount(minlength=VOCAB).topk(DRAFT_VOCAB).indices
    t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, seen, True)
    rows = target.lm_head.weight[t2d]
    draft = Draft(target, rows)
    optimizer = torch.optim.Adam(draft.parameters(), lr=1e-2)
    for step in range(STEPS):
        ids = text[torch.randint(len(text), (64,))]
        full = call_through_head(target, {"input_ids": ids}, lambda head: head)
        teacher, mask, mass = judged(kd.LinearHead(full.hidden[:, 1:], full.weight), t2d, rows)
        loss, accepted = loss_of(draft(full.hidden[:, :-1], ids[:, 1:]), teacher, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: accepted {accepted:.3f}, loss {loss.item():.3f}, in reach {mass.mean():.3f}")


if __name__ == "__main__":
    main()
