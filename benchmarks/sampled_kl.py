"""``python -m benchmarks.sampled_kl``: bias and noise of each estimate of the reverse KL, and of its gradient.

Every token that a student could draw is weighted by its probability, so the figures are exact: nothing is sampled.
Prints the table, writes the JSON (``--out``) and, with ``--docs``, the table in docs/on-policy-and-drafts.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import machine, pages

RESULT = Path(__file__).parent / "results" / "sampled-kl.json"
TOKENS, VOCAB, SLOTS = 32, 4096, 20
#: How far the student is from the teacher, in nats per entry.
DISTANCES = (0.3, 1.0)
VARIANTS = (
    ("k1", "score"),
    ("k1", "value"),
    ("k2", "value"),
    ("k2", "score"),
    ("k3", "value"),
    ("k3", "score"),
)


def models(distance: float) -> tuple[Tensor, Tensor]:
    """(student, teacher) logits ``[TOKENS, VOCAB]`` fp64: p falls like rank^-s, s in 1..1.5."""
    generator = torch.Generator().manual_seed(0)
    exponent = 1 + 0.5 * torch.rand(TOKENS, 1, generator=generator, dtype=torch.float64)
    teacher = -exponent * torch.arange(1, VOCAB + 1, dtype=torch.float64).log()
    noise = torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    return teacher + distance * noise, teacher


def gradient(student: Tensor, teacher: Tensor | kd.SparseTarget) -> tuple[Tensor, Tensor]:
    """(the reverse KL of each token, its gradient for the student's logits)."""
    leaf = student.clone().requires_grad_()
    each = kd.distillation_loss(leaf, teacher, divergence=kd.ReverseKL(), reduction="none")
    return each.detach(), torch.autograd.grad(each.sum(), leaf)[0]


def enumerated(student: Tensor, teacher: Tensor, estimator: str, how: str) -> dict[str, float]:
    """One draw per token: what its estimate and its gradient are in the mean, and how far single ones are."""
    exact, slope = gradient(student, teacher)
    log_q = student.log_softmax(-1).requires_grad_()
    each = kd.sampled_kl(log_q, teacher.log_softmax(-1), estimator=estimator, gradient=how)
    (c,) = torch.autograd.grad(each.sum(), log_q)
    each, q = each.detach(), student.softmax(-1)
    # A draw j gives the gradient c_j (onehot_j - q).
    mean = q * c - q * (q * c).sum(-1, keepdim=True)
    squares = q * c.square() * (1 - 2 * q + q.square().sum(-1, keepdim=True))
    value = (q * each).sum(-1)
    return {
        "value": value.mean().item(),
        "value_deviation": (q * (each - value[:, None]).square()).sum(-1).mean().sqrt().item(),
        "gradient_error": ((mean - slope).norm() / slope.norm()).item(),
        "gradient_noise": ((squares.sum() - mean.square().sum()).sqrt() / slope.norm()).item(),
        "exact": exact.mean().item(),
    }


def top_k(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """The reverse KL over the student's own top-k and the rest as one outcome."""
    exact, slope = gradient(student, teacher)
    target = kd.target_at(teacher, kd.top_k_target(student, SLOTS).ids)
    value, mine = gradient(student, target)
    return {
        "value": value.mean().item(),
        "value_deviation": 0.0,
        "gradient_error": ((mine - slope).norm() / slope.norm()).item(),
        "gradient_noise": 0.0,
        "exact": exact.mean().item(),
    }


def run() -> dict:
    rows = []
    for distance in DISTANCES:
        student, teacher = models(distance)
        measured = {f"{e}, {how}": enumerated(student, teacher, e, how) for e, how in VARIANTS}
        measured[f"student's top {SLOTS}"] = top_k(student, teacher)
        rows += [{"distance": distance, "what": what, **figures} for what, figures in measured.items()]
    return {
        "environment": machine.describe("cpu"),
        "case": {"tokens": TOKENS, "vocab": VOCAB, "slots": SLOTS},
        "rows": rows,
    }


def table(result: dict) -> str:
    where, case = result["environment"], result["case"]
    lines = [
        "| distance | estimate, gradient | mean | deviation of one draw | error of the mean gradient "
        "| noise of one draw's gradient |",
        "|---|---|---|---|---|---|",
    ]
    for distance in dict.fromkeys(row["distance"] for row in result["rows"]):
        group = [row for row in result["rows"] if row["distance"] == distance]
        lines.append(f"| {distance} | all of the vocabulary | {group[0]['exact']:.3f} | 0 | 0 | 0 |")
        for row in group:
            sampled = not row["what"].startswith("student")
            spread = f"{row['value_deviation']:.2f} | " if sampled else "0 | "
            noise = f"{row['gradient_noise']:.1f} |" if sampled else "0 |"
            lines.append(
                f"| {distance} | {row['what']} | {row['value']:.3f} | {spread}{row['gradient_error']:.3f} | {noise}"
            )
    lines += [
        "",
        f"{case['tokens']} tokens, vocabulary {case['vocab']}; torch {where['versions']['torch']}, "
        f"{where['date'][:10]}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampled_kl", description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument(
        "--docs", action="store_true", help="write the table into docs/on-policy-and-drafts.md"
    )
    parser.add_argument("--result", help="take this JSON file instead of measuring again")
    options = parser.parse_args()
    result = json.loads(Path(options.result).read_text()) if options.result else run()
    print(table(result))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    if options.docs:
        pages.fill("sampled-kl", table(result))


if __name__ == "__main__":
    main()
