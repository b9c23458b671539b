"""``python -m benchmarks.demo_sweep FOLDER PART ...``: what the small demo's settings were chosen by, and its spread over seeds.

FOLDER is that of a finished ``make demo``: its tokenizer and teacher serve every run here. Each part is a list of runs
that differ from the demo's in a few options; finished ones are reused. What was measured goes into
``benchmarks/results/demo-sweep-cpu.json`` and from there into docs/demonstration.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from transformers.utils import logging

from benchmarks import pages
from kdkernels.trainer import compare, judge, train
from kdkernels.trainer.command_line import resolve
from kdkernels.trainer.report import STUDENTS
from kdkernels.trainer.settings import Settings

RESULT = Path(__file__).parent / "results" / "demo-sweep-cpu.json"
WAYS = ("plain", "soft", "hard", "co")
#: Part -> (the demo's stage, what is different) of every run.
PARTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "seeds": [(way, {"seed": seed} if seed else {}) for seed in (None, 43, 44) for way in WAYS],
    "schedules": [
        ("co", {"soft_schedule": name})
        for name in ("constant", "linear", "warmup_stable_decay", "teacher_loss")
    ],
    "rates": [
        (way, {"learning_rate": rate, "warmup_steps": warmup})
        for way in WAYS
        for rate, warmup in ((1e-3, 0.1), (2e-3, 0.1), (3e-3, 0.1), (2e-3, 0))
    ],
    "sizes": [
        ("plain", {"student": student, "learning_rate": rate, "max_steps": steps})
        for student in ("tiny", "small")
        for rate in (1e-3, 2e-3)
        for steps in (400, 1200)
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="a demo's output folder")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    folder, parts = vars(parser.parse_args()).values()
    logging.disable_progress_bar()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if folder is not None:
        demo = json.loads((folder / compare.COMPARISON).read_text())
        options = {name: value for name, value in demo["settings"].items() if name != "mode"}
        settings = resolve("compare", {**options, "output_dir": str(folder)})
        result["environment"] = compare.environment(settings)
        for part in parts or PARTS:
            result[part] = measured(part, settings)
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
    pages.fill("demo-sweep", text(result))


def measured(part: str, settings: Settings) -> list[dict[str, Any]]:
    """A row for each of its runs. Where nothing is different, it is the demo's own."""
    stages, rows = compare.plan(settings), []
    given = train.ingredients(stages["soft"])
    for number, (way, changed) in enumerate(PARTS[part], 1):
        stage = varied(stages[way], part, changed)
        compare.run_stage(number, len(PARTS[part]), f"{way} {named(changed)}", stage)
        row: dict[str, Any] = {"way": way, **changed, **compare.speed(stage)}
        if part == "seeds":
            row |= judged(given, stage, settings.compare.judged_prompts)
        else:
            row["validation_loss"] = json.loads((stage.output_dir / train.RESULT).read_text())["eval_hard"]
        rows.append(row)
    return rows


def varied(stage: Settings, part: str, changed: dict[str, Any]) -> Settings:
    if not changed:
        return stage
    folder = stage.output_dir.parent / "sweep" / part / f"{stage.output_dir.name}-{named(changed)}"
    resume = (folder / train.CONFIG).exists()
    return resolve(stage.mode, {**stage.asked, **changed, "output_dir": str(folder), "resume": resume})


def named(changed: dict[str, Any]) -> str:
    return "-".join(f"{name}-{value}" for name, value in changed.items())


def judged(given: Any, stage: Settings, prompts: int) -> dict[str, Any]:
    path = stage.output_dir / compare.JUDGED
    if not path.exists():
        row = judge.judged(given, given.teacher(), compare.model_folder(stage), prompts)
        path.write_text(json.dumps(row, indent=1))
    return json.loads(path.read_text())


# -- on the page --------------------------------------------------------------------------------------

#: Title -> the number of a row of ``seeds``.
SPREAD = {
    "validation loss": lambda row: row["validation_loss"],
    "KL to teacher": lambda row: row["kl_to_teacher"],
    "top-1 agreement": lambda row: row["agreement"],
    "calibration error": lambda row: row["calibration_error"],
    "teacher's loss on what it writes": lambda row: row["writes"]["sampled"],
}


def text(result: dict[str, Any]) -> str:
    tables = [TABLES[part](result[part]) for part in TABLES if part in result]
    return "\n\n".join(tables)


def spread(rows: list[dict[str, Any]]) -> str:
    seeds = len(rows) // len({row["way"] for row in rows})
    lines = [f"| mean ± standard deviation of {seeds} seeds | {' | '.join(SPREAD)} |"]
    lines.append("|---" * (len(SPREAD) + 1) + "|")
    for way in dict.fromkeys(row["way"] for row in rows):
        numbers = [[number(row) for row in rows if row["way"] == way] for number in SPREAD.values()]
        cells = [f"{mean(values):.3f} ± {stdev(values):.3f}" for values in numbers]
        lines.append(f"| {STUDENTS[way]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def losses(title: str) -> Any:
    def table(rows: list[dict[str, Any]]) -> str:
        options = [
            name
            for name in ("student", "soft_schedule", "learning_rate", "warmup_steps", "max_steps")
            if name in rows[0]
        ]
        lines = [f"| {title} | {' | '.join(options)} | validation loss |", "|---" * (len(options) + 2) + "|"]
        for row in rows:
            cells = " | ".join(str(row[name]) for name in options)
            lines.append(f"| {STUDENTS[row['way']]} | {cells} | {row['validation_loss']:.3f} |")
        return "\n".join(lines)

    return table


TABLES = {
    "seeds": spread,
    "schedules": losses("soft weight"),
    "rates": losses("learning rate"),
    "sizes": losses("model and budget"),
}

if __name__ == "__main__":
    main()
