"""Soft distillation in a transformers.Trainer: DistillationTrainer in the place of Trainer.

python examples/hf_trainer.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import kdkernels as kd
from kdkernels.integrations.transformers import DistillationTrainer

VOCAB, LENGTH = 256, 32


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
        )
    )


def main():
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(VOCAB, (64, LENGTH)).tolist()]
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        model(32, 1, 0.05),
        arguments,
        teacher=model(64, 2, 0.2),  # frozen, in eval mode; its hidden states may have another width
        divergence=kd.JSD(0.5),
        soft_weight=1.0,
        hard_weight=0.0,  # these labels are noise
        train_dataset=rows,
        eval_dataset=rows[:8],
    )
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    print(f"KL to the teacher: {before:.4f} before, {trainer.evaluate()['eval_kl']:.4f} after")


if __name__ == "__main__":
    main()
