"""Small Llamas, batches for them, and what distils one into another without kdkernels."""

import torch
import torch.nn.functional as F
import transformers

VOCAB = 40


def llama(seed=0, width=16, dtype=torch.float64, vocab=VOCAB, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        **options,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def batch(rows=4, length=9, seed=1):
    """Rows of different lengths, the last ones mostly masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, length), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :3] = -100
    labels[1, 5:], mask[1, 5:], ids[1, 5:] = -100, 0, 0
    labels[-1, : length - 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows_of(inputs):
    return [
        {name: tensor[i].tolist() for name, tensor in inputs.items()} for i in range(len(inputs["labels"]))
    ]


def arguments(tmp_path, **options):
    return transformers.TrainingArguments(
        tmp_path, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **options
    )


def plain_loss(student, teacher, inputs, *, num_items=None, temperature=1.0, soft=1.0, hard=0.0):
    """Forward KL and cross entropy from full logits, as a user without kdkernels would write it."""
    keys = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    s = student(**keys).logits[:, :-1].double()
    with torch.no_grad():
        t = teacher(**keys).logits[:, :-1].double()
    labels = inputs["labels"][:, 1:]
    kept = labels != -100
    log_q, log_p = (s / temperature).log_softmax(-1)[kept], (t / temperature).log_softmax(-1)[kept]
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    ce = F.cross_entropy(s[kept], labels[kept], reduction="sum")
    return (soft * kl + hard * ce) / (kept.sum() if num_items is None else num_items)
