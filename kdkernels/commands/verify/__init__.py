"""``python -m kdkernels verify``: every backend that is usable here against the fp64 oracle.

Every divergence, input form and dtype, on random and adversarial rows, vocabularies from 1 to 262144 and every
schedule, with an entropy, several in one pass, and log-probabilities of tokens: what is in most use first, and nothing
begun after a minute unless --full says all. Prints the worst errors beside those of the plain PyTorch formula, a row as
soon as it is known, and exits with 1 when a rule of exactness is broken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...backends import CHOICES, BackendName, backends
from .outcome import Outcome, beyond_32_bits, examine
from .scenario import scenarios
from .tables import ERRORS, LEGEND, show, table


def usable(wanted: list[str] | None) -> list[BackendName]:
    """The backends to verify: those asked for, or all that are usable here."""
    there = {name: why for name, why in backends().items() if name != "reference"}
    for name in wanted or []:
        if name not in there:
            raise ValueError(f"unknown backend {name!r}; there are {', '.join(there)}")
        if there[name]:
            raise ValueError(f"backend {name!r} is not usable here: {there[name]}")
    return [name for name in CHOICES if (name in wanted if wanted else name in there and there[name] is None)]


def verify(
    names: list[BackendName],
    device: str,
    *,
    only: str | None = None,
    large: bool = False,
    seconds: float = math.inf,
    tell: Callable[[list[Outcome]], None] = lambda row: None,
) -> tuple[list[Outcome], int]:
    """(all outcomes, how many scenarios ``seconds`` left no time for).

    ``only`` keeps the scenarios whose divergence has it in its name. ``tell`` is called with each
    problem's outcomes, of all divergences and backends.
    """
    made: list[Outcome] = []
    end, late = time.perf_counter() + seconds, 0
    chosen = (s for s in scenarios() if only is None or only.lower() in s.about.lower())
    with torch.random.fork_rng(devices=[]):
        if large:
            made += [beyond_32_bits(name, device) for name in names]
            tell(made)
        for _, group in itertools.groupby(chosen, lambda s: (s.label, s.dtype, s.form, str(s.options))):
            row: list[Outcome] = []
            for scenario in group:
                if time.perf_counter() > end:
                    late += 1
                else:
                    row += examine(scenario, names, device)
            if row:
                tell(row)
            made += row
    return made, late


def report(outcomes: list[Outcome], late: int, device: str, seconds: float) -> dict[str, Any]:
    where = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {
        "device": where,
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "verified": sum(not o.skipped for o in outcomes),
        "not_run": late,
        "broken": sum(bool(o.broken) for o in outcomes),
        "outcomes": [o.record() for o in outcomes],
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m kdkernels verify", description=__doc__)
    parser.add_argument("--device", default="cpu", help="where the tensors are: cpu (default), cuda")
    parser.add_argument("--backend", action="append", help="only this backend; may be repeated")
    parser.add_argument("--divergence", help="only divergences with this in their name")
    parser.add_argument("--large", action="store_true", help="also logits of more than 2^31 numbers: 9 GB")
    parser.add_argument("--minutes", type=float, default=1.0, help="begin nothing after these (default 1)")
    parser.add_argument("--full", action="store_true", help="everything, however long it takes")
    parser.add_argument("--json", metavar="FILE", help="write every outcome here")
    options = parser.parse_args(arguments)
    if options.json and (Path(options.json).is_dir() or not Path(options.json).parent.is_dir()):
        parser.error(f"--json {options.json}: give a file in a folder that is there")
    try:
        names = usable(options.backend)
        torch.empty(0, device=options.device)
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    print(f"{LEGEND}\n{'backend':<10}{'rows':<14}{'dtype':<10}{'student, teacher':<20}{ERRORS}", flush=True)
    start = time.perf_counter()
    outcomes, late = verify(
        names,
        options.device,
        only=options.divergence,
        large=options.large,
        seconds=math.inf if options.full else options.minutes * 60,
        tell=show,
    )
    seconds = time.perf_counter() - start
    print(f"\n{table(outcomes)}\n")
    skipped = Counter((outcome.backend, outcome.skipped) for outcome in outcomes if outcome.skipped)
    for (backend, reason), count in skipped.items():
        print(f"{backend}: {count} problem{'s' * (count > 1)} skipped: {reason}")
    if late:
        print(f"NOT RUN: {late} problems, the time was up; --minutes gives more, --full all")
    summary = report(outcomes, late, options.device, seconds)
    print(f"{summary['verified']} problems in {seconds:.0f} s, {summary['broken']} break a rule")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(summary, file, indent=1)
    if summary["broken"]:
        sys.exit(1)
    if not summary["verified"]:
        print("nothing was verified", file=sys.stderr)
        sys.exit(2)
