"""``make gpu`` (``python -m benchmarks.gpu STAGE --out FOLDER``): what is to be done on a card, in three stages.

check    builds the extension for the card, then correctness (shortest first) and compute-sanitizer on every kernel
measure  the gpu suite of benchmarks beside the floors and the peers
tune     candidates for Triton's launch table, and ncu's counters of the headline kernels

A stage takes at most nine minutes, or ``--minutes``: what comes last is left out first. Every step is a process with a
limit of its own and a log FOLDER/STEP.log; one that fails or takes too long does not stop the next. What needs no quiet
card runs at once. The last lines say how each step ended. ``--rehearse`` runs the same steps on a CPU with small shapes,
so that no minute of a card is spent on a typing error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
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
    """``tool``, if there is one, is a program of CUDA's that runs the command; a rehearsal goes without. In the command,
    {out} stands for the stage's folder and {minutes} for what is left of its time."""

    name: str
    command: tuple[str, ...]
    seconds: float
    tool: tuple[str, ...] = ()


def check(device: str) -> list[list[Step]]:
    suite = (*PYTHON, "pytest", "-q", "-p", "no:cacheprovider", f"--device={device}")
    kernels = (*PYTHON, "benchmarks.gpu_kernels", f"--device={device}")
    on_cpu = device == "cpu"

    def tests(name: str, files: str, workers: int, seconds: float, every: int = 1) -> Step:
        chosen = f"widths and {'eager' if name == 'triton' else name}" if on_cpu else name
        spread = () if on_cpu else ("-n", str(workers))
        named = [f"tests/test_{file}.py" for file in files.split()]
        return Step(name, (*suite, *spread, "-k", chosen, f"--every={every}", *named), seconds)

    def compared(backend: str, processes: int) -> Step:
        words = ("--backend", "eager" if on_cpu else backend, f"--processes={1 if on_cpu else processes}")
        return Step(f"{backend}-kernels", (*kernels, *words), 150)

    def sanitized(backend: str) -> list[Step]:
        words = ("--backend", "eager" if on_cpu else backend, "--plain", "--logits", "--dtype", "bfloat16")
        return [
            Step(
                f"{backend}-{tool}",
                (*kernels, *words),
                100,
                ("compute-sanitizer", "--tool", tool, "--error-exitcode=1"),
            )
            for tool in SANITIZERS
        ]

    # Triton's sanitizers come when its kernels are compiled.
    return [
        [Step("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 200)],
        [Step("info", (*PYTHON, "kdkernels", "info"), 40)],
        [
            Step("gpu-only", (*suite, "tests/test_gpu.py"), 150),
            compared("native", 1),
            compared("triton", 8),
            tests("native", "conformance sparse log_probs entropy rising_rows", 4, 150),
            *sanitized("native"),
        ],
        [*sanitized("triton"), tests("triton", "conformance sparse log_probs", 10, 150, every=10)],
    ]


def measure(device: str) -> list[list[Step]]:
    suite = (
        ("--suite", "gpu", "--minutes", "{minutes}")
        if device == "cuda"
        else ("--suite", "small", "--rounds", "1")
    )
    return [
        [Step("suite", (*PYTHON, "benchmarks", *suite, "--out", "{out}/suite", f"--device={device}"), 530)]
    ]


def tune(device: str) -> list[list[Step]]:
    once = (*PYTHON, "benchmarks.gpu_kernels", f"--device={device}", "--headline")
    counters = (
        "ncu",
        "--set",
        "full",
        "--clock-control",
        "none",
        "--kernel-name",
        "regex:^(rows_kernel|fused)$",
    )
    waves = [[Step("counters", once, 120, (*counters, "--launch-count", "8"))]]
    if device == "cuda":
        waves.append([Step("triton", (*PYTHON, "benchmarks.tune_triton", "--out", "{out}/triton.json"), 400)])
    return waves


STAGES = {"check": check, "measure": measure, "tune": tune}


class Running:
    """A step's process; ``end`` waits for it and says in a word or two how it ended."""

    def __init__(self, step: Step, folder: Path, seconds: float, rehearse: bool) -> None:
        self.step, self.begin = step, time.monotonic()
        self.problem, self.process = None, None
        if step.tool and shutil.which(step.tool[0]) is None and not rehearse:
            self.problem = f"not run: no {step.tool[0]} here"
            return
        words = (*(() if rehearse else step.tool), *step.command)
        left = f"{seconds / 60:.2f}"
        command = [word.replace("{out}", str(folder)).replace("{minutes}", left) for word in words]
        log = open(folder / f"{step.name}.log", "w")
        log.write(f"{' '.join(command)}\n")
        log.flush()
        # torch's allocator would hide from the sanitizer where a tensor ends.
        environment = {**os.environ, **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step.tool else {})}
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def end(self, seconds: float) -> str:
        if self.process is None:
            return str(self.problem)
        limit = min(self.step.seconds, seconds)
        try:
            code = self.process.wait(max(limit - (time.monotonic() - self.begin), 0.1))
        except subprocess.TimeoutExpired:
            self._stop(5.0)
            return f"stopped after {limit:.0f} s"
        finally:
            self._stop(0.0)
        return "ok" if code == 0 else f"exit code {code}"

    def _stop(self, patience: float) -> None:
        """As Ctrl-C does, so that pytest tells what it has found so far; and for good, its workers too."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            if patience:
                self.process.send_signal(signal.SIGINT)
                self.process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(wave: list[Step], folder: Path, seconds: float, rehearse: bool) -> dict[str, str]:
    """The steps of a wave all at once, on a CPU one by one: how each ended."""
    if seconds < 5:
        return {step.name: "not run: the time was up" for step in wave}
    if rehearse:
        return {step.name: Running(step, folder, seconds, rehearse).end(seconds) for step in wave}
    running = [
        Running(step, folder, seconds, rehearse) for step in sorted(wave, key=lambda step: step.seconds)
    ]
    return {each.step.name: each.end(seconds) for each in running}


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
    parser.add_argument("--but", nargs="*", default=(), help="not these steps")
    options = parser.parse_args()
    folder, begin = options.out.resolve(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    ends: dict[str, str] = {}
    for wave in STAGES[options.stage]("cpu" if options.rehearse else "cuda"):
        chosen = [
            s for s in wave if s.name not in options.but and (not options.only or s.name in options.only)
        ]
        print(*(step.name for step in chosen), "...", flush=True)
        found = run(chosen, folder, options.minutes * 60 - (time.monotonic() - begin), options.rehearse)
        ends |= {name: f"{end}, {time.monotonic() - begin:.0f} s so far" for name, end in found.items()}
        (folder / f"{options.stage}.json").write_text(json.dumps(ends, indent=1) + "\n")
    for name, end in ends.items():
        log = folder / f"{name}.log"
        last = log.read_text().strip().splitlines()[-1:] if log.exists() else []
        print(f"{name:12} {end}  {''.join(last)[:150]}")
    return 0 if all(end.startswith("ok") for end in ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
