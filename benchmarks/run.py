"""Runs the cases of a suite and gathers what one result file holds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import accuracy, machine, measure, memory
from benchmarks.cases import Case
from benchmarks.variants import Variant, variants_of

SCHEMA = 1


def run_case(case: Case, device: str, *, rounds: int = measure.ROUNDS) -> dict[str, Any]:
    """Error first, then time, then memory, of everyone who can compute the case's losses."""
    torch._dynamo.reset()
    variants, skipped = variants_of(case, device)
    found = accuracy.errors(case, variants, device)
    right = [i for i, errors in enumerate(found) if "problem" not in errors]
    watches = measure.round_robin(case, [variants[i] for i in right], device, rounds)
    for i, watch in zip(right, watches):
        found[i].update(watch.summary())
    timed = [i for i in right if "problem" not in found[i]]
    for i, peak in zip(timed, memory.peaks(case, [variants[i] for i in timed], device)):
        found[i].update(peak)
    rows = [_row(variant, results) for variant, results in zip(variants, found)]
    _add_floors(rows)
    return {"name": case.name, **dataclasses.asdict(case), "skipped": skipped, "variants": rows}


def _row(variant: Variant, results: dict[str, Any]) -> dict[str, Any]:
    return {
        "variant": variant.label,
        "loss": variant.loss,
        "package": variant.package,
        "inplace": variant.inplace,
        "floor": variant.floor or None,
        **results,
    }


def _add_floors(rows: list[dict[str, Any]]) -> None:
    """Each time over its floor's, both from this run: ``to_floor`` 1.25 is 80 percent of the floor."""
    floors = {
        row["variant"]: row["both_ms"]["median"] for row in rows if not row["floor"] and "both_ms" in row
    }
    for row in rows:
        if row["floor"] in floors and "both_ms" in row:
            row["to_floor"] = row["both_ms"]["median"] / floors[row["floor"]]
            row["percent_of_floor"] = 100 / row["to_floor"]


def run_suite(
    suite: str,
    cases: list[Case],
    device: str,
    *,
    rounds: int = measure.ROUNDS,
    seconds: float | None = None,
    save: Callable[[dict], None] = lambda so_far: None,
) -> dict[str, Any]:
    """The cases in their order. One that would begin in the last tenth of ``seconds``, or cannot run here, is not run,
    and the result names it. That leaves room for the case that is running: only the first cases take longer."""
    start = time.perf_counter()
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": suite,
        "machine": machine.describe(device),
        "cases": [],
        "not_run": [],
    }
    for case in cases:
        late = seconds is not None and time.perf_counter() - start > 0.9 * seconds
        if late or not case.can_run(device):
            result["not_run"].append(case.name)
            continue
        result["cases"].append(run_case(case, device, rounds=rounds))
        save(result)
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result
