"""``python -m benchmarks.sparse_bias``: what each sparse target does to the gradient, and to where training ends.

Zipf-like teachers and students near them, a fresh distribution per token. Prints the table, writes the JSON
(``--out``) and, with ``--docs``, the table in docs/sparse-targets.md. Takes a minute.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import machine, pages

TOKENS, VOCAB, SLOTS = 32, 4096, (8, 32, 128)
DRAWS, STEPS, LEARNING_RATE = 256, 1000, 0.05
VARIANTS = ("truncate", "renormalize", "conditional", "bucket", "sampling")


def models(seed: int) -> tuple[Tensor, Tensor]:
    """(teacher, student) logits ``[TOKENS, VOCAB]``: p falls like rank^-s, s in 1..1.5, with noise of a
    quarter nat on each rank; the student is off by one nat per entry."""
    generator = torch.Generator().manual_seed(seed)
    exponent = 1 + 0.5 * torch.rand(TOKENS, 1, generator=generator)
    ranks = torch.arange(1, VOCAB + 1, dtype=torch.float64)
    teacher = -exponent * ranks.log() + 0.25 * torch.randn(TOKENS, VOCAB, generator=generator)
    order = torch.rand(TOKENS, VOCAB, generator=generator).argsort(-1)
    teacher = teacher.gather(-1, order)
    student = teacher + torch.randn(TOKENS, VOCAB, generator=generator)
    return teacher.float(), student.float()


def targets(
    teacher: Tensor, variant: str, slots: int, generator: torch.Generator
) -> Callable[[], kd.SparseTarget]:
    """Makes the target of one step: new draws each time, or always the same top-k."""
    if variant == "sampling":
        return lambda: kd.sample_target(teacher, slots, generator=generator)
    fixed = kd.top_k_target(teacher, slots, tail=variant)
    return lambda: fixed


def gradient(student: Tensor, target: Tensor | kd.SparseTarget) -> Tensor:
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(kd.kl_div(leaf, target, reduction="sum"), leaf)[0]


def trained(student: Tensor, make: Callable[[], Tensor | kd.SparseTarget]) -> Tensor:
    """The student's logits, themselves the parameters, after STEPS of Adam; averaged over the last
    half of them, which removes the noise of samples."""
    leaf = student.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=LEARNING_RATE)
    mean = torch.zeros_like(student)
    for step in range(STEPS):
        adam.zero_grad()
        kd.kl_div(leaf, make(), reduction="sum").backward()
        adam.step()
        if step >= STEPS // 2:
            mean += leaf.detach() / (STEPS - STEPS // 2)
    return mean


def measure(variant: str, slots: int) -> dict:
    teacher, student = models(0)
    generator = torch.Generator().manual_seed(1)
    make = targets(teacher, variant, slots, generator)
    dense = gradient(student, teacher)
    draws = [gradient(student, make()) for _ in range(DRAWS if variant == "sampling" else 1)]
    mean = torch.stack(draws).mean(0)
    final = trained(student, make)
    outside = torch.ones_like(teacher).scatter(-1, kd.top_k_target(teacher, slots).ids, 0.0)
    return {
        "variant": variant,
        "slots": slots,
        "draws": len(draws),
        "error_of_one": relative(draws[0], dense),
        "error_of_mean": relative(mean, dense),
        "final_kl": kd.kl_div(final, teacher).item(),
        "final_tail": (final.softmax(-1) * outside).sum(-1).mean().item(),
        "teacher_tail": (teacher.softmax(-1) * outside).sum(-1).mean().item(),
    }


def relative(mine: Tensor, truth: Tensor) -> float:
    return ((mine - truth).norm() / truth.norm()).item()


def table(result: dict) -> str:
    where, case = result["environment"], result["case"]
    lines = [
        "| K | target | error of one gradient | error of the mean gradient | student's tail after training "
        "| KL to the teacher after training |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        name = f"{row['slots']} draws" if row["variant"] == "sampling" else f'top-k, "{row["variant"]}"'
        mean = f"{row['error_of_mean']:.3f}" + (f" ({row['draws']} draws)" if row["draws"] > 1 else "")
        lines.append(
            f"| {row['slots']} | {name} | {row['error_of_one']:.3f} | {mean} | "
            f"{row['final_tail']:.3f} (teacher {row['teacher_tail']:.3f}) | {row['final_kl']:.3f} |"
        )
    dense = result["dense"]
    lines.append(
        f"| all | dense | 0 | 0 | | {abs(dense['final_kl']):.3f} (before training {dense['first_kl']:.3f}) |"
    )
    lines += [
        "",
        f"{case['tokens']} tokens, vocabulary {case['vocab']}, {case['steps']} steps of Adam on the student's "
        f"logits; torch {where['versions']['torch']}, {where['date'][:10]}.",
    ]
    return "\n".join(lines)


def run() -> dict:
    teacher, student = models(0)
    dense = {
        "first_kl": kd.kl_div(student, teacher).item(),
        "final_kl": kd.kl_div(trained(student, lambda: teacher), teacher).item(),
    }
    rows = [measure(variant, slots) for slots in SLOTS for variant in VARIANTS]
    return {
        "environment": machine.describe("cpu"),
        "case": {"tokens": TOKENS, "vocab": VOCAB, "steps": STEPS},
        "dense": dense,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_bias", description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/sparse-targets.md")
    parser.add_argument("--result", help="take this JSON file instead of measuring again")
    options = parser.parse_args()
    result = json.loads(Path(options.result).read_text()) if options.result else run()
    print(table(result))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    if options.docs:
        pages.fill("bias", table(result))


if __name__ == "__main__":
    main()
