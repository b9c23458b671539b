"""``python -m benchmarks.demo [demo|demo-real FOLDER]``: the figures of the finished ``make demo`` and ``make demo-real``.

With FOLDER (``runs/demo``, ``runs/demo-real``) its comparison and picture become the committed ones first.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from benchmarks import pages
from kdkernels.trainer import report

RESULTS = Path(__file__).parent / "results"
DEMOS = ("demo", "demo-real")


def text(result: dict) -> str:
    said = (
        " ".join(report.sentences(result)) if "entropy" in result["teacher"] else report.soft_sentence(result)
    )
    return f"{said}\n\n{report.table(result)}\n\nMeasured on {report.machine(result)}."


def choice(results: dict[str, dict]) -> str:
    """What each way gains on the student without a teacher at equal tokens, and what it costs beside it."""
    titles = [f"`make {name}`: {what}" for name in results for what in ("loss", "KL", "time", "memory")]
    lines = [f"| way | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for way in (way for way in report.STUDENTS if any(way in each["students"] for each in results.values())):
        cells = [cell for result in results.values() for cell in beside_plain(result["students"], way)]
        lines.append(f"| {report.STUDENTS[way]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def beside_plain(students: dict, way: str) -> list[str]:
    if way not in students:
        return [""] * 4
    row, plain = students[way], students["plain"]
    seconds = [report.training_seconds(each) + each.get("writing_seconds", 0) for each in (row, plain)]
    return [
        f"{row['validation_loss'] - plain['validation_loss']:+.3f}",
        f"{row['kl_to_teacher']:.3f}",
        f"{seconds[0] / seconds[1]:.1f} x",
        f"{row['peak_memory_bytes'] / plain['peak_memory_bytes']:.1f} x",
    ]


def committed() -> dict[str, str]:
    """Part of the page -> its text, of every demo whose result is committed."""
    paths = {name: RESULTS / f"{name}-cpu.json" for name in DEMOS}
    results = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    return {"demo-choice": choice(results), **{name: text(result) for name, result in results.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", choices=DEMOS)
    parser.add_argument("folder", nargs="?", type=Path, help="its output folder")
    name, folder = vars(parser.parse_args()).values()
    if folder is not None:
        shutil.copy(folder / "comparison.json", RESULTS / f"{name}-cpu.json")
        shutil.copy(folder / "curves.png", pages.IMAGES / f"{name}-cpu.png")
    for part, filling in committed().items():
        pages.fill(part, filling)


if __name__ == "__main__":
    main()
