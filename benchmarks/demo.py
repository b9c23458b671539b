"""``python -m benchmarks.demo [FOLDER]``: the demo's figures, from a finished ``make demo``.

With FOLDER (``runs/demo``) its comparison and picture become the committed ones first.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from benchmarks import pages
from kdkernels.trainer import report

RESULT = Path(__file__).parent / "results" / "demo-cpu.json"


def text(result: dict) -> str:
    return f"{report.table(result)}\n\n{report.verdict(result)} Measured on {report.machine(result)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="a demo's output folder")
    folder = parser.parse_args().folder
    if folder is not None:
        shutil.copy(folder / "comparison.json", RESULT)
        shutil.copy(folder / "curves.png", pages.IMAGES / "demo-cpu.png")
    pages.fill("demo", text(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
