"""The teacher in a process of its own (on your machines: on devices of its own). It sends hidden states, a few numbers
a token, and never logits; the student's process has the teacher's lm_head and compares both in one pass.

torchrun --nproc_per_node 2 examples/teacher_elsewhere.py
"""

import torch
import torch.distributed as dist
from torch import nn

import kdkernels as kd

VOCAB, WIDTH, TEACHER_WIDTH, TOKENS, STEPS = 1000, 32, 64, 512, 101
STUDENT, TEACHER = 0, 1


def body(width):
    """In your script: a model without its lm_head."""
    return nn.Sequential(
        nn.Embedding(VOCAB, width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)
    )


def batch(step):
    """The same on both sides; in your script the loader's seed, or ids that are sent along."""
    return torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(step))


@torch.no_grad()
def teach(lm_head):
    """Sends the lm_head once, and the hidden states of each batch. The next are made while the student learns."""
    teacher = body(TEACHER_WIDTH)
    dist.send(lm_head, STUDENT)
    sent = None
    for step in range(STEPS):
        hidden = teacher(batch(step))
        if sent is not None:
            sent.wait()
        sent = dist.isend(hidden, STUDENT)
    sent.wait()


def learn():
    lm_head, hidden = torch.empty(VOCAB, TEACHER_WIDTH), torch.empty(TOKENS, TEACHER_WIDTH)
    dist.recv(lm_head, TEACHER)
    student, head = body(WIDTH), nn.Parameter(torch.randn(VOCAB, WIDTH) / WIDTH**0.5)
    optimizer = torch.optim.Adam([*student.parameters(), head], lr=1e-2)
    for step in range(STEPS):
        states = student(batch(step))
        dist.recv(hidden, TEACHER)
        loss = kd.kl_div(kd.LinearHead(states, head), kd.LinearHead(hidden, lm_head))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: KL {loss.item():.4f}, {4 * TEACHER_WIDTH} bytes a token, not {4 * VOCAB}")


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    if dist.get_rank() == TEACHER:
        teach(torch.randn(VOCAB, TEACHER_WIDTH) / 4)
    else:
        learn()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
