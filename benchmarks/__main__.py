"""``python -m benchmarks``: measures a suite and writes JSON, tables and plots into one folder.

python -m benchmarks [--suite small|cpu|gpu] [--out FOLDER]   measure
python -m benchmarks --suite shards                            the vocabulary on two processes
python -m benchmarks.shards RESULT.json                        commit-ready: its figures in docs, results/
python -m benchmarks --case "logits 2048 151936 bfloat16"     measure a shape of your own
python -m benchmarks report RESULT.json [--out FOLDER]        tables and plots from a result
python -m benchmarks publish [RESULT.json]                    commit-ready: README, docs, results/
python -m benchmarks compare BEFORE.json AFTER.json           exit code 1 if more than 10% is lost
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
#: Minutes that a suite may take, everything included.
MINUTES = {"small": 5.0, "cpu": 9.5, "gpu": 9.0}


def load(path: str | Path) -> dict[str, Any]:
    result = json.loads(Path(path).read_text())
    if result.get("schema") != 1:
        raise ValueError(f"{path} is not a result of this harness (schema {result.get('schema')!r}, not 1)")
    return result


def write_report(
    result: dict[str, Any], folder: Path, prefix: str = "", images: Path | None = None
) -> list[Path]:
    """The Markdown page, and the plots where matplotlib is installed (in the folder ``images``)."""
    from benchmarks import plots, report

    page = folder / f"{prefix}tables.md"
    page.write_text(report.full(result))
    try:
        return [page, *plots.draw(result, images or folder, prefix)]
    except ModuleNotFoundError as error:
        print(f"no plots: {error}")
        return [page]


def measure(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=[*MINUTES, "shards"], default="small")
    parser.add_argument("--out", type=Path, help="folder for everything (default: runs/SUITE-TIME)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda for the gpu suite")
    parser.add_argument("--rounds", type=int, help="rounds per variant (default 7)")
    parser.add_argument("--minutes", type=float, help="leave out the cases that would start later")
    parser.add_argument(
        "--case",
        help='only cases with this in their name; or a shape: "logits TOKENS VOCAB [DTYPE]", '
        '"hidden TOKENS WIDTH VOCAB [DTYPE]"',
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    device = options.device or ("cuda" if options.suite == "gpu" else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu runs the same cases on the CPU")
    limit = (options.minutes or MINUTES.get(options.suite, 0.0)) * 60
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = options.out or ROOT / "runs" / f"{options.suite}-{stamp}"
    if (folder / "result.json").exists():
        parser.error(f"{folder} already holds a result; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    if options.suite == "shards":
        from benchmarks import shards

        return shards.measure(folder, options.rounds or 7)
    from benchmarks import cases, goals, measure, report, run

    chosen = cases.chosen(options.suite, options.case or "")
    if not chosen:
        parser.error(f"no case of suite {options.suite} has {options.case!r} in its name, nor is it a shape")
    path = folder / "result.json"

    def save(so_far: dict[str, Any]) -> None:
        """Writes the results after every case, so that a crash of the process loses only one case."""
        path.write_text(json.dumps(so_far, indent=1))
        print(report.case_table(so_far["cases"][-1]), "\n", flush=True)

    result = run.run_suite(
        options.suite,
        chosen,
        device,
        rounds=options.rounds or measure.ROUNDS,
        seconds=limit - (time.perf_counter() - start),
        save=save,
    )
    path.write_text(json.dumps(result, indent=1))
    print(report.where(result))
    print(goals.table(result))
    if result["not_run"]:
        print(report.not_run(result))
    written = [path, *write_report(result, folder)]
    print(f"{result['seconds']:.0f} s; written:", ", ".join(str(p) for p in written))
    ours_failed = [
        f"{case['name']}, {row['variant']}, {row['loss']}: {row['problem']}"
        for case in result["cases"]
        for row in case["variants"]
        if row["package"] == "kdkernels" and "problem" in row
    ]
    for line in ours_failed:
        print("FAILED", line, file=sys.stderr)
    return 1 if ours_failed else 0


def report_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report")
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, help="folder (default: the result's)")
    options = parser.parse_args(arguments)
    folder = options.out or options.result.parent
    folder.mkdir(parents=True, exist_ok=True)
    print("written:", ", ".join(str(p) for p in write_report(load(options.result), folder)))
    return 0


def publish(arguments: list[str]) -> int:
    """Makes a result the committed one of its suite: JSON, tables, plots, the figures of README and docs."""
    from benchmarks import pages, report

    parser = argparse.ArgumentParser(prog="python -m benchmarks publish", description=publish.__doc__)
    parser.add_argument("result", type=Path, nargs="?", help="default: what is committed already")
    options = parser.parse_args(arguments)
    for path in [options.result] if options.result else committed():
        result = load(path)
        (RESULTS / f"{result['suite']}.json").write_text(json.dumps(result, indent=1) + "\n")
        written = write_report(result, RESULTS, f"{result['suite']}-", pages.IMAGES)
        print("written:", ", ".join(str(p) for p in written))
    results, machines = ([load(path) for path in paths] for paths in (committed(), processors()))
    for name, text in report.parts(results, machines).items():
        pages.fill(name, text)
        print(pages.PAGES[name].name, "has the figures of", ", ".join(path.name for path in committed()))
    return 0


def committed() -> list[Path]:
    """The result of each suite that has one, in the suites' order."""
    return [path for suite in MINUTES if (path := RESULTS / f"{suite}.json").exists()]


def processors() -> list[Path]:
    """The CPU suite's results: the committed one, and those of other processors."""
    return [RESULTS / "cpu.json", RESULTS / "cpu-intel.json"]


def compare_command(arguments: list[str]) -> int:
    from benchmarks import compare

    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=compare.__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--limit", type=float, default=compare.LIMIT, help="default: 1.10")
    options = parser.parse_args(arguments)
    lines, lost = compare.compare(load(options.before), load(options.after), options.limit)
    print(lines)
    print(f"{len(lost)} lost more than {options.limit - 1:.0%}")
    return 1 if lost else 0


COMMANDS = {"report": report_command, "publish": publish, "compare": compare_command}


def main(arguments: list[str]) -> int:
    command = COMMANDS.get(arguments[0]) if arguments else None
    try:
        return command(arguments[1:]) if command else measure(arguments)
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
