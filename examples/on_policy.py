"""On-policy distillation: the student writes, the teacher judges every token, the student follows.

python examples/on_policy.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kdkernels as kd
from kdkernels.integrations.transformers import call_through_head

VOCAB, PROMPT, LENGTH, STEPS = 64, 4, 16, 30


def model(hidden_size, layers, spread):
    """In your script: AutoModelForCausalLM.from_pretrained(...)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=2,
            initializer_range=spread,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def write(student):
    """(token ids, which of the positions speak about a token that the student wrote)."""
    prompts = torch.randint(1, VOCAB, (16, PROMPT))
    ids = student.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,  # from all of its distribution: generate() would take the 50 likeliest
        min_new_tokens=LENGTH,
        max_new_tokens=LENGTH,
    )
    written = torch.arange(ids.shape[1] - 1) >= PROMPT - 1  # position i speaks about token i + 1
    return ids, written.expand(len(ids), -1)


def reverse_kl(student, teacher, ids, mask):
    inputs = {"input_ids": ids[:, :-1]}
    with torch.no_grad():  # what the teacher says, as hidden states: its logits are never held
        judged = call_through_head(teacher, inputs, lambda head: head)
    return call_through_head(
        student,
        inputs,
        lambda head: kd.distillation_loss(head, judged, mask=mask, divergence=kd.ReverseKL()),
    )


def main():
    torch.manual_seed(0)
    student, teacher = model(32, 1, 0.05), model(64, 2, 0.3).eval()
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-2)
    for step in range(STEPS):
        loss = reverse_kl(student, teacher, *write(student))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == STEPS - 1:
            print(f"step {step}: reverse KL on the student's own text {loss.item():.4f}")


if __name__ == "__main__":
    main()
