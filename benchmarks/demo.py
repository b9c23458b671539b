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


def committed() -> dict[str, str]:
    """Part of the page -> its text, of every demo whose result is committed."""
    paths = {path.stem.removesuffix("-cpu"): path for path in sorted(RESULTS.glob("demo*-cpu.json"))}
    return {name: text(json.loads(path.read_text())) for name, path in paths.items()}


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
