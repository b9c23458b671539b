"""The vocabulary on two processes: each holds half of both lm_heads; the loss and its gradients are the whole's.

torchrun --nproc_per_node 2 examples/tensor_parallel.py
"""

import torch
import torch.distributed as dist

import kdkernels as kd

TOKENS, WIDTH, VOCAB = 64, 32, 1000


def whole_models():
    """Hidden states and lm_heads of student and teacher, the same on every rank."""
    made = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=made)  # noqa: E731
    return draw(TOKENS, WIDTH), draw(VOCAB, WIDTH), draw(TOKENS, 2 * WIDTH), draw(VOCAB, 2 * WIDTH)


def step(hidden, weight, teacher_hidden, teacher_weight, labels, shard, teacher_shard):
    """(loss, gradient of the hidden states, gradient of the weight)."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = kd.distillation_loss(
        kd.LinearHead(hidden, weight, shard=shard),
        kd.LinearHead(teacher_hidden, teacher_weight, shard=teacher_shard),
        labels,  # ids of the whole vocabulary
        divergence=kd.JSD(0.5),
        hard_weight=0.5,
    )
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def main():
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    hidden, weight, teacher_hidden, teacher_weight = whole_models()
    labels = torch.arange(TOKENS) * 7 % VOCAB
    own = slice(rank * VOCAB // ranks, (rank + 1) * VOCAB // ranks)  # parts may differ in size

    loss, d_hidden, d_weight = step(
        hidden, weight[own], teacher_hidden, teacher_weight[own], labels, kd.Shard(), kd.Shard()
    )
    alone = step(hidden, weight, teacher_hidden, teacher_weight, labels, None, None)
    print(
        f"rank {rank}: loss {loss:.6f}, on one process {alone[0]:.6f}; largest difference in dH "
        f"{(d_hidden - alone[1]).abs().max():.0e}, in its rows of dW {(d_weight - alone[2][own]).abs().max():.0e}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
