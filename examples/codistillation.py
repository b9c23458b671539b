"""Two models that train together, in a loop of your own: one pass over each model's logits gives both losses.

python examples/codistillation.py
"""

import torch
from torch import nn

import kdkernels as kd

VOCAB, LENGTH, STEPS = 128, 33, 60


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB, bias=False)
        self.mix = nn.GRU(width, width, batch_first=True)

    def head(self, ids):
        return kd.LinearHead(self.mix(self.embed(ids))[0], self.lm_head.weight)


def batch(size=16):
    """Counting in steps that differ by row: something that can be learned."""
    start, stride = torch.randint(VOCAB, (size, 1)), torch.randint(1, 4, (size, 1))
    ids = (start + stride * torch.arange(LENGTH)) % VOCAB
    return ids[:, :-1], ids[:, 1:].contiguous()  # the shift is yours


def main():
    torch.manual_seed(0)
    student, teacher = Model(16), Model(64)
    optimizer = torch.optim.Adam([*student.parameters(), *teacher.parameters()], lr=1e-2)
    for step in range(STEPS):
        ids, labels = batch()
        losses = kd.codistillation_loss(
            student.head(ids),
            teacher.head(ids),
            labels,
            soft_weight=step / STEPS,  # little at first: the teacher is still bad
            hard_weight=1.0,
        )
        (losses.student + losses.teacher).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: student {losses.student.item():.3f}, teacher {losses.teacher.item():.3f}")


if __name__ == "__main__":
    main()
