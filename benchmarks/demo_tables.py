"""What :mod:`benchmarks.demo_sweep` measured, as it stands on docs/demonstration.md."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.demo_runs import PARTS, Part
from kdkernels.trainer import report

RESULTS = Path(__file__).parent / "results"


def path_of(demo: str) -> Path:
    return RESULTS / f"{demo}-sweep-cpu.json"


def load(demo: str) -> dict[str, Any]:
    return json.loads(path_of(demo).read_text()) if path_of(demo).exists() else {}


def text(demo: str) -> str:
    """All parts but the spread over seeds, which has a place of its own; nothing where nothing was measured."""
    result = load(demo)
    said = [cache_sentence(result["cache"]["written"])] if "cache" in result else []
    said += [
        table(part, result[name]) for name, part in PARTS[demo].items() if name in result and name != "seeds"
    ]
    return "\n\n".join([*said, f"Measured on {machines(result)}."] if said else [])


def machines(result: dict[str, Any]) -> str:
    """Where the tables' rows were measured; of the same machine, versions and day the busiest hour."""
    busiest: dict[tuple, dict[str, Any]] = {}
    for row in (row for name, rows in result.items() if name != "seeds" for row in rows.values()):
        where = row["environment"]
        key = tuple(where[name] for name in ("machine", "threads", "torch", "date"))
        load = (busiest[key] if key in busiest else where).get("load_average") or 0
        if key not in busiest or (where.get("load_average") or 0) > load:
            busiest[key] = where
    return "; ".join(report.machine({"environment": where, "seconds": None}) for where in busiest.values())


def table(part: Part, rows: dict[str, Any]) -> str:
    titles = [part.title, *part.options, *part.columns]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for run in (run for run in part.runs if run.name in rows):
        row = rows[run.name]
        options = [Path(str(row["options"].get(name, ""))).name for name in part.options]
        shown = [report.cell_of(report.COLUMNS[title], row) for title in part.columns]
        lines.append(f"| {' | '.join([run.title or report.STUDENTS[run.way], *options, *shown])} |")
    return "\n".join(lines)


#: Title -> the number of a row of ``seeds``.
SPREAD = {
    "validation loss": lambda row: row["validation_loss"],
    "KL to teacher": lambda row: row["kl_to_teacher"],
    "top-1 agreement": lambda row: row["agreement"],
    "calibration error": lambda row: row["calibration_error"],
    "teacher's loss on what it writes": lambda row: row["writes"]["sampled"],
}


def spread(demo: str) -> str:
    """Of the ways that were run with two seeds or more; nothing where there is none."""
    part, rows = PARTS[demo]["seeds"], load(demo).get("seeds", {})
    titles = [f"`make {demo}`", "seeds", *SPREAD]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for way in dict.fromkeys(run.way for run in part.runs):
        own = [rows[run.name] for run in part.runs if run.way == way and run.name in rows]
        if len(own) < 2:
            continue
        numbers = [[number(row) for row in own] for number in SPREAD.values()]
        cells = [f"{mean(values):.3f} ± {stdev(values):.3f}" for values in numbers]
        lines.append(f"| {report.STUDENTS[way]} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def cache_sentence(written: dict[str, Any]) -> str:
    return (
        f"The teacher's top {written['top_k']} over {written['tokens']:,} tokens were written in "
        f"{written['seconds']:.0f} s and take {written['bytes_per_token']:.0f} bytes per token."
    )
