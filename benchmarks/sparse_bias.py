"""``python -m benchmarks.sparse_bias``: what each sparse target does to the gradient, and to where training ends.

Teachers are Zipf-like, with students near them and a fresh distribution per token; and a real language model, with itself
without six layers as its student (:mod:`benchmarks.real`). Prints the tables, writes the JSON (``--out``) and, with
``--docs``, the tables in docs/sparse-targets.md. Takes ten minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import machine, pages, real

TOKENS, SLOTS = 32, (8, 32, 128)
ZIPF_VOCAB = 4096
DRAWS, STEPS, LEARNING_RATE = 256, 1000, 0.05
VARIANTS = ("truncate", "renormalize", "conditional", "bucket", "sampling")


def zipf() -> tuple[Tensor, Tensor]:
    """(teacher, student) logits ``[TOKENS, ZIPF_VOCAB]``: p falls like rank^-s, s in 1..1.5, with noise of a
    quarter nat on each rank; the student is off by one nat per entry."""
    generator = torch.Generator().manual_seed(0)
    exponent = 1 + 0.5 * torch.rand(TOKENS, 1, generator=generator)
    ranks = torch.arange(1, ZIPF_VOCAB + 1, dtype=torch.float64)
    teacher = -exponent * ranks.log() + 0.25 * torch.randn(TOKENS, ZIPF_VOCAB, generator=generator)
    order = torch.rand(TOKENS, ZIPF_VOCAB, generator=generator).argsort(-1)
    teacher = teacher.gather(-1, order)
    student = teacher + torch.randn(TOKENS, ZIPF_VOCAB, generator=generator)
    return teacher.float(), student.float()


def smollm2() -> tuple[Tensor, Tensor]:
    """(teacher, student) logits ``[TOKENS, 49152]`` of tokens from all over the text."""
    made = real.read()
    rows = slice(None, None, real.TOKENS // TOKENS)
    teacher, student = (made[name][rows] @ made["weight"].t() for name in ("teacher", "without six layers"))
    return teacher, student


#: Teacher, as the table calls it -> its logits and a student's.
MODELS = {
    "Zipf-like teachers": zipf,
    "SmolLM2-135M-Instruct, its student the same without six of 30 layers": smollm2,
}


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


def of_target(teacher: Tensor, student: Tensor, variant: str, slots: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    make = targets(teacher, variant, slots, generator)
    dense = gradient(student, teacher)
    draws = DRAWS if variant == "sampling" else 1
    first = gradient(student, make())
    mean = first / draws
    for _ in range(draws - 1):
        mean += gradient(student, make()) / draws
    final = trained(student, make)
    outside = torch.ones_like(teacher).scatter(-1, kd.top_k_target(teacher, slots).ids, 0.0)
    return {
        "variant": variant,
        "slots": slots,
        "draws": draws,
        "error_of_one": relative(first, dense),
        "error_of_mean": relative(mean, dense),
        "final_kl": kd.kl_div(final, teacher).item(),
        "final_tail": (final.softmax(-1) * outside).sum(-1).mean().item(),
        "teacher_tail": (teacher.softmax(-1) * outside).sum(-1).mean().item(),
    }


def relative(mine: Tensor, truth: Tensor) -> float:
    return ((mine - truth).norm() / truth.norm()).item()


def table(result: dict) -> str:
    where = result["environment"]
    parts = [
        f"{name}, vocabulary {case['vocab']}:\n\n{rows_of(case)}" for name, case in result["teachers"].items()
    ]
    return "\n\n".join(
        [
            *parts,
            f"{result['tokens']} tokens, {result['steps']} steps of Adam on the student's logits; "
            f"torch {where['versions']['torch']}, {where['date'][:10]}.",
        ]
    )


def rows_of(case: dict) -> str:
    lines = [
        "| K | target | error of one gradient | error of the mean gradient | student's tail after training "
        "| KL to the teacher after training |",
        "|---|---|---|---|---|---|",
    ]
    for row in case["rows"]:
        name = f"{row['slots']} draws" if row["variant"] == "sampling" else f'top-k, "{row["variant"]}"'
        mean = f"{row['error_of_mean']:.3f}" + (f" ({row['draws']} draws)" if row["draws"] > 1 else "")
        lines.append(
            f"| {row['slots']} | {name} | {row['error_of_one']:.3f} | {mean} | "
            f"{row['final_tail']:.3f} (teacher {row['teacher_tail']:.3f}) | {row['final_kl']:.3f} |"
        )
    first, final = case["dense"]["first_kl"], abs(case["dense"]["final_kl"])
    return "\n".join([*lines, f"| all | dense | 0 | 0 | | {final:.3f} (before training {first:.3f}) |"])


def run() -> dict:
    teachers = {name: measured(*models()) for name, models in MODELS.items()}
    return {"environment": machine.describe("cpu"), "tokens": TOKENS, "steps": STEPS, "teachers": teachers}


def measured(teacher: Tensor, student: Tensor) -> dict:
    return {
        "vocab": teacher.shape[-1],
        "dense": {
            "first_kl": kd.kl_div(student, teacher).item(),
            "final_kl": kd.kl_div(trained(student, lambda: teacher), teacher).item(),
        },
        "rows": [of_target(teacher, student, variant, slots) for slots in SLOTS for variant in VARIANTS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_bias", description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/sparse-targets.md")
    parser.add_argument("--result", help="take this JSON file instead of measuring again")
    options = parser.parse_args()
    if not options.result:
        real.read()  # says at once that it is not there
    result = json.loads(Path(options.result).read_text()) if options.result else run()
    print(table(result))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    if options.docs:
        pages.fill("bias", table(result))


if __name__ == "__main__":
    main()
