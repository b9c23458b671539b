"""``gradient_tolerance`` on a real language model: what it costs, and what it saves.

    python -m benchmarks.real                           # once: hidden states and lm_head of SmolLM2
    python -m benchmarks.tolerance [--out JSON] [--docs] [--picture PNG]

Teacher and students are those of :mod:`benchmarks.real`. Errors are relative to the exact gradients' norms and do not
depend on the machine; times do, and stand beside the bare GEMMs of the same run. ``--docs`` writes the table into docs/tolerance.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from benchmarks import machine, pages, real
from benchmarks.real import STUDENTS
from kdkernels.core.tolerance import keep

EXPONENTS = (10, 9, 8, 7, 6)
LOSSES = ("kl", "ce")


class Case:
    """One student and loss of the fixture, its first ``tokens``."""

    def __init__(self, fixture: dict[str, Tensor], student: str, loss: str, tokens: int) -> None:
        self.loss, self.labels = loss, fixture["labels"][:tokens]
        self.teacher, self.student = fixture["teacher"][:tokens], fixture[student][:tokens]
        self.weight = fixture["weight"]

    def gradients(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """(dH, dW)"""
        leaves = self.student.clone().requires_grad_(), self.weight.detach().requires_grad_()
        head = kd.LinearHead(*leaves)
        if self.loss == "ce":
            loss = kd.cross_entropy(head, self.labels, gradient_tolerance=tolerance)
        else:
            loss = kd.kl_div(head, kd.LinearHead(self.teacher, self.weight), gradient_tolerance=tolerance)
        return torch.autograd.grad(loss, leaves)

    def of_logits(self) -> Tensor:
        logits = F.linear(self.student, self.weight).requires_grad_()
        if self.loss == "ce":
            loss = kd.cross_entropy(logits, self.labels)
        else:
            loss = kd.kl_div(logits, F.linear(self.teacher, self.weight))
        return torch.autograd.grad(loss, logits)[0]

    def bare(self, gradient: Tensor) -> None:
        """The products that an exact gradient cannot do without."""
        F.linear(self.student, self.weight)
        if self.loss == "kl":
            F.linear(self.teacher, self.weight)
        torch.mm(gradient, self.weight)
        torch.mm(gradient.t(), self.student)


def errors(case: Case) -> list[dict]:
    exact, gradient = case.gradients(0.0), case.of_logits()
    rows = []
    for exponent in EXPONENTS:
        kept = keep(gradient.clone(), 2.0**-exponent)
        near = case.gradients(2.0**-exponent)
        rows.append(
            {
                "exponent": exponent,
                "kept": 1.0 if kept is None else len(kept.ids) / gradient.shape[1],
                "dH": relative(near[0], exact[0]),
                "dW": relative(near[1], exact[1]),
            }
        )
    return rows


def relative(mine: Tensor, truth: Tensor) -> float:
    return ((mine - truth).norm() / truth.norm()).item()


def times(case: Case, rounds: int) -> dict[str, float]:
    """Seconds, the fastest of ``rounds`` in turns: the bare GEMMs, exact, and each tolerance."""
    gradient = torch.ones(len(case.labels), case.weight.shape[0])
    runs: dict[str, Callable[[], object]] = {"bare": lambda: case.bare(gradient)}
    for exponent in (None, *EXPONENTS):
        tolerance = 0.0 if exponent is None else 2.0**-exponent
        runs["exact" if exponent is None else str(exponent)] = lambda t=tolerance: case.gradients(t)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def table(result: dict) -> str:
    """A row for each tolerance, 0 first; the times beside the bare GEMMs', where there are any."""
    lines = [
        "| student, loss | tolerance | columns kept | error of dH | error of dW | time / bare GEMMs |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        name, timed = f"{case['student']}, {case['loss']}", ratios(case)
        lines.append(f"| {name} | 0 (exact) | 100% | 0 | 0 | {timed.get('exact', '')} |")
        lines += [
            f"| {name} | 2^-{row['exponent']} | {row['kept']:.1%} | {row['dH']:.2%} | {row['dW']:.2%} | "
            f"{timed.get(str(row['exponent']), '')} |"
            for row in case["errors"]
        ]
    where = result["environment"]
    tokens, width, vocab = result["shape"]
    return "\n".join(
        [
            *lines,
            "",
            f"{tokens} tokens ({result['timed_tokens']} for the times), width {width}, vocabulary {vocab}, fp32; "
            f"{where['name']}, torch {where['versions']['torch']}, {where['date'][:10]}.",
        ]
    )


def ratios(case: dict) -> dict[str, str]:
    """Tolerance -> its time beside the bare GEMMs'; empty where nothing was timed."""
    seconds = case.get("seconds", {})
    return {name: f"{taken / seconds['bare']:.2f}" for name, taken in seconds.items() if name != "bare"}


def picture(result: dict, path: Path) -> None:
    """Time against error: one curve a case, from the exact gradient on its left."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    for case in result["cases"]:
        seconds = case["seconds"]
        points = [(row["dH"], seconds[str(row["exponent"])] / seconds["bare"]) for row in case["errors"]]
        (line,) = axis.plot(*zip(*points), marker="o", label=f"{case['loss']}, {case['student']}")
        axis.axhline(seconds["exact"] / seconds["bare"], color=line.get_color(), linestyle=":", linewidth=1)
    axis.set(xscale="log", xlabel="error of dH (dotted: exact)", ylabel="time / bare GEMMs", ylim=(0, None))
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axis.set_xticks([0.002, 0.005, 0.01, 0.02, 0.05])
    axis.minorticks_off()
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure(fixture: dict[str, Tensor], tokens: int, rounds: int) -> dict:
    cases = []
    for student in STUDENTS:
        for loss in LOSSES:
            whole = Case(fixture, student, loss, len(fixture["labels"]))
            made = {"student": student, "loss": loss, "errors": errors(whole)}
            if rounds:
                made["seconds"] = times(Case(fixture, student, loss, tokens), rounds)
            cases.append(made)
    shape = [*fixture["teacher"].shape, fixture["weight"].shape[0]]
    return {"environment": machine.describe("cpu"), "shape": shape, "timed_tokens": tokens, "cases": cases}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tolerance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=1024, help="that are timed (default 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="0 leaves the times out")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--result", type=Path, help="take this JSON file instead of measuring again")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/tolerance.md")
    parser.add_argument("--picture", type=Path, help="PNG to draw: time against error")
    options = parser.parse_args()
    if options.picture and not options.rounds:
        parser.error("a picture needs times: --rounds 1 or more")
    if options.result:
        result = json.loads(options.result.read_text())
    else:
        result = measure(real.read(), options.tokens, options.rounds)
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.docs:
        pages.fill("tolerance", table(result))
    if options.picture:
        picture(result, options.picture)


if __name__ == "__main__":
    main()
