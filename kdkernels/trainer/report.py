"""What a comparison looks like: the table, the picture, report.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Stage of ``compare`` -> what the student is called.
STUDENTS = {"plain": "no teacher", "soft": "soft", "hard": "hard", "co": "co", "on_policy": "on-policy"}
PICTURE = "curves.png"


#: Title -> a cell of a student's row. What the student writes is judged by the teacher's own loss on it.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "validation loss": lambda row: f"{row['validation_loss']:.3f}",
    "KL to teacher": lambda row: f"{row['kl_to_teacher']:.3f}",
    "top-1 agreement": lambda row: f"{row['agreement']:.1%}",
    "teacher's loss on what it writes (greedy)": lambda row: _written(row, "sampled", "greedy"),
    "tokens": lambda row: f"{row['tokens']:,}",
    "tokens/s": lambda row: "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
    "peak memory": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
}


def _written(row: dict[str, Any], sampled: str, greedy: str) -> str:
    said = row.get("writes")
    return f"{said[sampled]:.3f} ({said[greedy]:.3f})" if said else ""


def table(comparison: dict[str, Any]) -> str:
    rows = comparison["students"]
    columns = {title: cell for title, cell in COLUMNS.items() if any(cell(row) for row in rows.values())}
    lines = [f"| student | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {STUDENTS[name]} | {' | '.join(cell(row) for cell in columns.values())} |")
    return "\n".join(lines)


def verdict(comparison: dict[str, Any]) -> str:
    """One sentence: whether soft distillation beat the student without a teacher."""
    students = comparison["students"]
    plain, soft = students["plain"]["validation_loss"], students["soft"]["validation_loss"]
    outcome = "beats" if soft < plain else "does not beat"
    return (
        f"Soft distillation {outcome} the student without a teacher: validation loss {soft:.3f} against {plain:.3f} "
        f"(the teacher: {comparison['teacher']['validation_loss']:.3f})."
    )


def text(comparison: dict[str, Any]) -> str:
    where, settings, teacher = comparison["environment"], comparison["settings"], comparison["teacher"]
    co = comparison.get("co_teacher")
    along = (
        f"In co-distillation the teacher that was trained along came to {co['validation_loss']:.3f}. "
        if co
        else ""
    )
    notes = f"""
{along}Loss and KL are
nats per token on {comparison["validation_tokens"]:,} held-out tokens; KL(teacher || student) at temperature 1 and
agreement are against the same teacher for all.

* Student: {settings["student"]}, {comparison["student_parameters"] / 1e6:.2f} M parameters.
* Teacher: {settings["teacher"]}, {teacher["parameters"] / 1e6:.2f} M parameters.
* Data: {", ".join(settings["data"])}; sequences of {settings["max_length"]} tokens.
* Soft: {settings["divergence"]} at temperature {settings["temperature"]:g}, {settings["soft_weight"]:g} x soft + {settings["hard_weight"]:g} x hard.
* Hard: {settings["prompts"]:,} completions by the teacher, repeated to the budget.
* Co: soft weight {settings["soft_schedule"]} from {settings["soft_weight_start"]:g} to {settings["soft_weight"]:g}.
"""
    return "\n".join(
        [
            "# Soft, hard and co-distillation at one token budget\n",
            table(comparison),
            "",
            verdict(comparison),
            notes,
            f"![validation loss]({PICTURE})\n",
            f"Measured on {machine(comparison)}, transformers {where['transformers']}, Python {where['python']}.\n",
        ]
    )


def machine(comparison: dict[str, Any]) -> str:
    where, seconds = comparison["environment"], comparison["seconds"]
    whole = (
        "" if seconds is None else f", {seconds:.0f} s in all after the setup"
    )  # None: some stages had been run before
    return f"{where['machine']}, {where['threads']} threads, torch {where['torch']}, {where['date']}{whole}"


def draw(path: Path, curves: dict[str, list[dict[str, Any]]], comparison: dict[str, Any]) -> None:
    """Validation loss over tokens, from every student's metrics."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in comparison["students"]:
        lines = [line for line in curves[name] if "eval_hard" in line]
        axes.plot(
            [line["num_input_tokens_seen"] for line in lines],
            [line["eval_hard"] for line in lines],
            marker="o",
            markersize=3,
            label=STUDENTS[name],
        )
    axes.axhline(comparison["teacher"]["validation_loss"], color="gray", linestyle="--", label="the teacher")
    axes.set(xlabel="tokens that the student was trained on", ylabel="validation loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
