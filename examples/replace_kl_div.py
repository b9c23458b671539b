"""One line of a distillation loop, before and after: the same loss, the same gradient, other memory.

python examples/replace_kl_div.py
"""

import resource

import torch
import torch.nn.functional as F

import kdkernels as kd

TOKENS, VOCAB, T = 256, 65536, 2.0


def before(student_logits, teacher_logits, labels):
    log_q = (student_logits / T).log_softmax(-1)
    p = (teacher_logits / T).softmax(-1)
    per_token = F.kl_div(log_q, p, reduction="none").sum(-1)
    return per_token[labels != -100].mean() * T**2


def after(student_logits, teacher_logits, labels):
    return kd.kl_div(student_logits, teacher_logits, labels, temperature=T, temperature_squared=True)


def step(loss_of, student_logits, teacher_logits, labels):
    """(loss, gradient, MiB by which this step raised the peak of the process)."""
    unit = 2**10  # ru_maxrss is in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logits = student_logits.detach().requires_grad_()
    loss = loss_of(logits, teacher_logits, labels)
    loss.backward()
    return loss.item(), logits.grad, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / unit


def main():
    torch.manual_seed(0)
    student_logits, teacher_logits = torch.randn(2, TOKENS, VOCAB)
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[1::4] = -100  # a quarter is prompt or padding
    for loss_of in (before, after):  # what is loaded once
        step(loss_of, student_logits[:2], teacher_logits[:2], labels[:2])
    # The frugal one first: the peak of a process only rises.
    ours, our_gradient, our_peak = step(after, student_logits, teacher_logits, labels)
    theirs, their_gradient, their_peak = step(before, student_logits, teacher_logits, labels)
    print(f"before: loss {theirs:.6f}, peak of the step {their_peak + our_peak:5.0f} MiB")
    print(
        f"after:  loss {ours:.6f}, peak of the step {our_peak:5.0f} MiB (the gradient alone is "
        f"{our_gradient.nbytes / 2**20:.0f})"
    )
    print(f"largest difference between the gradients: {(our_gradient - their_gradient).abs().max():.1e}")


if __name__ == "__main__":
    main()
