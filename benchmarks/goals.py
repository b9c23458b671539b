"""The ratios that the kernels must reach, read off a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks import real

LOGITS = "logits [512, 131072]"
HIDDEN = {"float32": "hidden [512, 512] -> 32768 float32", "bfloat16": "hidden [256, 512] -> 32768 bfloat16"}
GPU_LOGITS = [f"logits [8192, {vocab}] bfloat16" for vocab in (128256, 151936, 256000)]
GPU_HIDDEN = "hidden [8192, 4096] -> 128256 bfloat16"
REAL = f"hidden [1024, {real.WIDTH}] -> {real.VOCAB}"
OURS, INPLACE, TRITON_INPLACE = "kdkernels", "kdkernels in place", "kdkernels triton in place"
NEAR = f"{OURS}, tolerance 2^-8"


@dataclass(frozen=True)
class Goal:
    """time(``variant``, ``loss``) / time(``against``, ``against_loss``) is at most, or at least, ``bound``."""

    case: str
    variant: str
    loss: str
    against: str
    against_loss: str
    bound: float
    at_least: bool = False

    def __str__(self) -> str:
        sides = [
            f"{v} {'' if loss == 'floor' else loss}".strip()
            for v, loss in ((self.variant, self.loss), (self.against, self.against_loss))
        ]
        return f"{self.case}: {' / '.join(sides)}"


#: Loss -> what an in-place pass may take of `add(out=g)`, in fp32 and in bf16.
IN_PLACE = {"kl": (1.1, 1.5), "rkl": (1.1, 1.5), "jsd": (1.7, 3.0)}
#: Loss -> its products, and what it may take of them with a tolerance, in fp32 and in bf16.
TOLERANCE = {"kl": ("4 GEMMs", 0.8, 0.9), "ce": ("3 GEMMs", 0.6, 0.7)}


def _goals(dtype: str) -> list[Goal]:
    logits, half = f"{LOGITS} {dtype}", dtype == "bfloat16"
    made = [Goal(logits, INPLACE, loss, "add(out=g)", "floor", both[half]) for loss, both in IN_PLACE.items()]
    if not half:
        made += [
            Goal(logits, INPLACE, "ce", "copy(out=g)", "floor", 1.1),
            Goal(logits, INPLACE, "log-probs + entropy", "copy(out=g)", "floor", 1.3),
            Goal(HIDDEN[dtype], OURS, "log-probs", "4 GEMMs", "floor", 1.1),
            Goal(logits, "F.kl_div", "kl", INPLACE, "kl", 25, at_least=True),
            Goal(logits, "F.kl_div compiled", "kl", INPLACE, "kl", 6, at_least=True),
            Goal(logits, OURS, "kl", "add", "floor", 0.75),
        ]
    made += [
        Goal(f"{REAL} {dtype}, real", NEAR, loss, gemms, "floor", both[half])
        for loss, (gemms, *both) in TOLERANCE.items()
    ]
    return [*made, Goal(HIDDEN[dtype], OURS, "kl", "4 GEMMs", "floor", 1.08 if half else 1.05)]


#: Loss -> what an in-place pass may take of `add(out=g)` on a GPU: with the CUDA kernels, and with Triton's.
GPU_IN_PLACE = {"kl": (1.2, 1.7), "rkl": (1.2, 1.7), "jsd": (2.1, None)}


def _gpu_goals() -> list[Goal]:
    made = []
    for case in GPU_LOGITS:
        for loss, bounds in GPU_IN_PLACE.items():
            made += [
                Goal(case, variant, loss, "add(out=g)", "floor", bound)
                for variant, bound in zip((INPLACE, TRITON_INPLACE), bounds)
                if bound
            ]
    return [
        *made,
        Goal(GPU_HIDDEN, OURS, "kl", "4 GEMMs", "floor", 1.08),
        Goal(GPU_HIDDEN, OURS, "ce", "3 GEMMs", "floor", 1.08),
        Goal(f"{GPU_HIDDEN}, peaked", NEAR, "kl", "4 GEMMs", "floor", 0.8),
        Goal(f"{GPU_HIDDEN}, peaked", NEAR, "ce", "3 GEMMs", "floor", 0.8),
        Goal(GPU_HIDDEN, "TRL chunked", "kl", OURS, "kl", 1.3, at_least=True),
        Goal(GPU_HIDDEN, "Liger fused linear JSD", "jsd", OURS, "jsd", 2.0, at_least=True),
    ]


GOALS = _goals("float32") + _goals("bfloat16") + _gpu_goals()


def measured(result: dict[str, Any]) -> list[tuple[Goal, float]]:
    """Each goal with its ratio, where the result has both sides."""
    times = {
        (case["name"], row["variant"], row["loss"]): row["both_ms"]["median"]
        for case in result["cases"]
        for row in case["variants"]
        if "both_ms" in row
    }
    made = []
    for goal in GOALS:
        ours = times.get((goal.case, goal.variant, goal.loss))
        theirs = times.get((goal.case, goal.against, goal.against_loss))
        if ours and theirs:
            made.append((goal, ours / theirs))
    return made


def table(result: dict[str, Any]) -> str:
    """Markdown; empty where the result has none of the goals' cases."""
    rows = measured(result)
    if not rows:
        return ""
    lines = ["| ratio | measured | goal | |", "|---|---|---|---|"]
    for goal, ratio in rows:
        reached = ratio >= goal.bound if goal.at_least else ratio <= goal.bound
        lines.append(f"| {goal} | {ratio:.2f} | {_bound(goal)} | {'' if reached else 'missed'} |")
    return "\n".join(lines)


def beside(results: list[dict[str, Any]]) -> str:
    """Markdown: the ratios of several machines, of the goals that all of them have measured."""
    ratios = [dict(measured(result)) for result in results]
    names = [result["machine"]["name"] for result in results]
    lines = [f"| ratio | {' | '.join(names)} | goal |", "|---" * (len(names) + 2) + "|"]
    for goal in GOALS:
        if all(goal in each for each in ratios):
            lines.append(
                f"| {goal} | {' | '.join(f'{each[goal]:.2f}' for each in ratios)} | {_bound(goal)} |"
            )
    return "\n".join(lines)


def _bound(goal: Goal) -> str:
    return f"{'>=' if goal.at_least else '<='} {goal.bound:g}"
