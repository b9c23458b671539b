"""``make gpu`` (``python -m benchmarks.gpu STAGE --out FOLDER``): what is to be done on a card, in three stages.

check    builds the extension for the card, then correctness (shortest first) and compute-sanitizer on every kernel
measure  the gpu suite of benchmarks beside the floors and the peers
tune     candidates for Triton's launch table, and ncu's counters of the headline kernels

A stage takes at most nine minutes. Every step is a process with a limit of its own and a log FOLDER/STEP.log; one that
fails or takes too long does not stop the next. The last lines say how each step ended. ``--rehearse`` runs the same
steps on a CPU with small shapes, so that no minute of a card is spent on a typing error.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 9.0
PYTHON = (sys.executable, "-m")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Step:
    """``tool``, if there is one, is a program of CUDA's that runs the command; a rehearsal goes without."""

    name: str
    command: tuple[str, ...]
    seconds: float
    tool: tuple[str, ...] = ()


def check(device: str) -> list[Step]:
    suite = (*PYTHON, "pytest", "-q", "-p", "no:cacheprovider", f"--device={device}")
    small = ("-k", "widths") if device == "cpu" else ()
    workers = ("-n", "8") if device == "cuda" else ()
    kernels = (*PYTHON, "benchmarks.gpu_kernels", f"--device={device}")
    return [
        Step("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 200),
        Step("info", (*PYTHON, "kdkernels", "info"), 30),
        Step("kernels", kernels, 60),
        Step("gpu-only", (*suite, "tests/test_gpu.py"), 90),
        Step("sparse", (*suite, *workers, *small, "tests/test_sparse.py"), 120),
        Step("conformance", (*suite, *workers, *small, "tests/test_conformance.py"), 200),
        *(
            Step(tool, (*kernels, "--once"), 60, ("compute-sanitizer", "--tool", tool, "--error-exitcode=1"))
            for tool in SANITIZERS
        ),
    ]


def measure(device: str) -> list[Step]:
    suite = (
        ("--suite", "gpu", "--minutes", "8") if device == "cuda" else ("--suite", "small", "--rounds", "1")
    )
    return [Step("suite", (*PYTHON, "benchmarks", *suite, "--out", "{out}/suite", f"--device={device}"), 530)]


def tune(device: str) -> list[Step]:
    once = (*PYTHON, "benchmarks.gpu_kernels", f"--device={device}", "--headline")
    counters = ("ncu", "--set", "full", "--clock-control", "none", "--kernel-name", "regex:kernel|fused")
    steps = [Step("counters", once, 120, (*counters, "--launch-count", "8", "-o", "{out}/counters"))]
    if device == "cuda":
        steps.append(Step("triton", (*PYTHON, "benchmarks.tune_triton", "--out", "{out}/triton.json"), 400))
    return steps


STAGES = {"check": check, "measure": measure, "tune": tune}


def run(step: Step, folder: Path, seconds: float, rehearse: bool) -> str:
    """How it ended, in a word or two."""
    if seconds < 5:
        return "not run: the time was up"
    if step.tool and shutil.which(step.tool[0]) is None and not rehearse:
        return f"not run: no {step.tool[0]} here"
    words = (*(() if rehearse else step.tool), *step.command)
    command = [word.replace("{out}", str(folder)) for word in words]
    with open(folder / f"{step.name}.log", "w") as log:
        log.write(f"{' '.join(command)}\n")
        log.flush()
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=min(step.seconds, seconds)
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {min(step.seconds, seconds):.0f} s"
    return "ok" if code == 0 else f"exit code {code}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"for the whole stage (default {MINUTES:g})"
    )
    parser.add_argument("--only", nargs="*", help="these steps")
    options = parser.parse_args()
    folder, begin = options.out.resolve(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    steps = STAGES[options.stage]("cpu" if options.rehearse else "cuda")
    ends: dict[str, str] = {}
    for step in steps:
        if options.only and step.name not in options.only:
            continue
        print(f"{step.name} ...", flush=True)
        left = options.minutes * 60 - (time.monotonic() - begin)
        ends[step.name] = (
            f"{run(step, folder, left, options.rehearse)}, {time.monotonic() - begin:.0f} s so far"
        )
        (folder / f"{options.stage}.json").write_text(json.dumps(ends, indent=1) + "\n")
    for name, end in ends.items():
        log = folder / f"{name}.log"
        last = log.read_text().strip().splitlines()[-1:] if log.exists() else []
        print(f"{name:12} {end}  {''.join(last)[:150]}")
    return 0 if all(end.startswith("ok") for end in ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
