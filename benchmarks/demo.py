"""``python -m benchmarks.demo [demo|demo-real FOLDER]``: the figures of the finished ``make demo`` and ``make demo-real``.

With FOLDER (``runs/demo``, ``runs/demo-real``) its comparison and picture become the committed ones first.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from benchmarks import demo_tables, pages
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


def outcomes(results: dict[str, dict]) -> str:
    """Where each way ends at equal tokens, where the student without a teacher does in soft's time, and what that is worth."""
    lines = [
        f"{report.STUDENTS[way]} ends {said}"
        for way in report.STUDENTS
        if way not in ("plain", "longer") and (said := gains(results, way))
    ]
    longer = gains(results, "longer")
    more = (
        f" The student without a teacher, given soft's time and so more tokens, ends {longer}."
        if longer
        else ""
    )
    without = [f"`make {name}`" for name, result in results.items() if "co" not in result["students"]]
    missing = f" The committed run of {' and '.join(without)} has no co." if without else ""
    return (
        f"In validation loss at equal tokens, beside the student without a teacher: {'; '.join(lines)}.{more} Each is one "
        f"seed.{missing}{shared(results)}"
    )


def gains(results: dict[str, dict], way: str) -> str:
    """By how much a way ends ahead of the student without a teacher, in every demo that has it."""
    said = []
    for name, result in results.items():
        if way in result["students"]:
            students = result["students"]
            gain = students["plain"]["validation_loss"] - students[way]["validation_loss"]
            said.append(f"{abs(gain):.3f} {'ahead' if gain > 0 else 'behind'} on `make {name}`")
    return " and ".join(said)


def shared(results: dict[str, dict]) -> str:
    names = [f"`make {name}`" for name, result in results.items() if "beside" in report.machine(result)]
    if not names:
        return ""
    return f" {' and '.join(names)} shared the cores with other programs, so times and their ratios are rough; losses are unaffected."


def committed() -> dict[str, str]:
    """Part of the page -> its text, of every demo whose result is committed."""
    paths = {name: RESULTS / f"{name}-cpu.json" for name in DEMOS}
    results = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    spreads = [spread for spread in map(demo_tables.spread, DEMOS) if spread]
    if spreads:
        spreads.insert(0, "Over seeds, mean ± standard deviation:")
    return {
        "demo-choice": "\n\n".join([choice(results), outcomes(results), *spreads]),
        **{name: text(result) for name, result in results.items()},
        **{f"{name}-sweep": demo_tables.text(name) for name in DEMOS},
    }


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
