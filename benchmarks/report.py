"""Markdown from a result: the full tables of a run, and the figures of README and docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import goals
from benchmarks.accuracy import ANOTHER_LOSS

Row = dict[str, Any]
#: Quartiles further apart than this share of the median are told with it.
UNSTEADY = 0.5
#: A load average above this at the start of a run is told with its figures.
BUSY = 0.5


def where(result: Row) -> str:
    """The line above every figure: the machine, the versions, the commit, and warnings about the run."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    kind = f"CUDA {machine['cuda']}" if machine["device"] == "cuda" else machine["instruction_set"]
    told = f"{machine['name']} ({kind}), {versions}, commit {machine['commit']}, {machine['date'][:10]}."
    if (machine.get("load") or 0.0) > BUSY:
        told += f" The machine was busy with other work: load average {machine['load']:.1f} at the start."
    if result["not_run"]:
        told += f" {len(result['not_run'])} of {len(result['not_run']) + len(result['cases'])} cases were not run."
    return told


def not_run(result: dict[str, Any]) -> str:
    return (
        "Not run, for want of time, of bf16 arithmetic, or of what `python -m benchmarks.real` makes: "
        + "; ".join(result["not_run"])
    )


def case_table(case: Row) -> str:
    """All that was measured on one case."""
    lines = [
        f"### {case['name']}",
        "",
        "| loss | variant | forward ms | backward ms | both ms (IQR) | x floor | % of floor | peak MiB "
        "| [N,V] fp32 | loss error | gradient error |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_line(row) for row in case["variants"]]
    if case["skipped"]:
        reasons = "; ".join(f"{name}: {why}" for name, why in case["skipped"].items())
        lines += ["", f"Not measured here: {reasons}."]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if "problem" in row:
        return f"| {row['loss']} | {row['variant']} | {row['problem'].replace('|', '/')} |||||||||"
    both = row["both_ms"]
    cells = [
        _ms(row["forward_ms"]["median"]),
        _ms(row["backward_ms"]["median"]),
        f"{_ms(both['median'])} ({_ms(both['iqr'])})",
    ]
    if row["floor"]:
        cells += [f"{row['to_floor']:.2f} x {row['floor']}", f"{row['percent_of_floor']:.0f}"]
        cells += [_peak(row), _units(row), f"{row['loss_error']:.1e}", _error(row)]
    else:
        cells[:2] = ["", ""]
        cells += ["floor"] + [""] * 5
    return "| " + " | ".join([row["loss"], row["variant"], *cells]) + " |"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _peak(row: Row) -> str:
    return f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else row.get("peak_problem", "")


def _units(row: Row) -> str:
    return f"{row['peak_units']:.2f}" if "peak_units" in row else ""


def _error(row: Row) -> str:
    mark = " (another loss)" if row["gradient_error"] > ANOTHER_LOSS else ""
    return f"{row['gradient_error']:.1e}{mark}"


def full(result: Row) -> str:
    """A whole run as one page."""
    lines = [
        f"# Suite {result['suite']}",
        "",
        where(result),
        "",
        "Medians over the rounds; errors are relative to the fp64 oracle, on the case's first tokens.",
    ]
    if reached := goals.table(result):
        lines += ["", "## Goals", "", reached]
    lines += ["", "## Cases"]
    for case in result["cases"]:
        lines += ["", case_table(case)]
    if result["not_run"]:
        lines += ["", f"{not_run(result)}."]
    return "\n".join(lines) + "\n"


#: The figures' columns: a title and which variants stand in it, the fastest of them.
COLUMNS: dict[str, Callable[[Row], bool]] = {
    "kdkernels": lambda row: row["variant"] == "kdkernels",
    "in place": lambda row: row["variant"] == "kdkernels in place",
    "PyTorch": lambda row: row["package"] == "torch" and "compiled" not in row["variant"],
    "compiled": lambda row: row["package"] == "torch" and "compiled" in row["variant"],
    "fastest other": lambda row: row["package"] not in ("torch", "kdkernels"),
}
_LOSSES = ("kl", "kl conditional", "rkl", "jsd", "ce", "codistill")


def figures(result: Row) -> str:
    """One line per headline case and loss."""
    cases = [case for case in result["cases"] if case["headline"]]
    sections = (
        (
            "Milliseconds, forward and backward, and the ratio to the floor of the same run (of logits: "
            "`torch.add(s, t)`, in place `torch.add(s, t, out=g)`; of hidden states: the bare GEMMs). "
            "Medians; IQR where it is more than half of that.",
            _time,
        ),
        ("Peak memory above inputs and gradients, in `[N, V]` fp32 tensors.", _units),
        ("Relative error of the gradient against the fp64 oracle.", _error),
    )
    lines = [where(result)]
    for title, cell in sections:
        lines += [
            "",
            title,
            "",
            f"| case | loss | {' | '.join(COLUMNS)} |",
            "|---" * (len(COLUMNS) + 2) + "|",
        ]
        lines += [line for case in cases for line in _pivot(case, cell)]
    return "\n".join(lines)


def _time(row: Row) -> str:
    both = row["both_ms"]
    spread = f", IQR {_ms(both['iqr'])}" if both["iqr"] > UNSTEADY * both["median"] else ""
    ratio = f" ({row['to_floor']:.2f}x)" if "to_floor" in row else ""
    return f"{_ms(both['median'])}{spread}{ratio}"


def _pivot(case: Row, cell: Callable[[Row], str]) -> list[str]:
    lines = []
    for loss in (name for name in _LOSSES if name in case["losses"]):
        rows = [row for row in case["variants"] if row["loss"] == loss and "both_ms" in row]
        cells = []
        for title, belongs in COLUMNS.items():
            fastest = min(filter(belongs, rows), key=lambda row: row["both_ms"]["median"], default=None)
            text = cell(fastest) if fastest else ""
            cells.append(f"{fastest['variant']} {text}" if fastest and title == "fastest other" else text)
        lines.append(f"| {case['name']} | {loss} | {' | '.join(cells)} |")
    return lines


_TITLES = {"kl": "forward KL", "rkl": "reverse KL", "jsd": "JSD", "ce": "cross entropy"}
#: README's few rows: the kind of case, and losses.
HEADLINES = {
    "cpu": {
        "logits [512, 131072] float32": ("kl", "jsd"),
        "hidden [256, 512] -> 32768 float32": ("kl",),
    },
    "gpu": {
        "logits [8192, 151936] bfloat16": ("kl", "jsd"),
        "hidden [8192, 4096] -> 128256 bfloat16": ("kl", "ce"),
    },
}


def headline(results: list[Row]) -> str:
    """README's figures: the fastest way of PyTorch's own beside ours, time and memory."""
    lines = [
        "| forward and backward | PyTorch | kdkernels | faster by | memory, PyTorch | memory, kdkernels |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    machines = []
    for result in results:
        kind, machine = result["suite"].upper(), result["machine"]
        lines += _headline_rows(result, kind)
        machines.append(
            f"{kind}: {machine['name']}, torch {machine['versions']['torch']}, {machine['date'][:10]}."
        )
    return "\n".join([*lines, "", " ".join(machines)])


def _headline_rows(result: Row, kind: str) -> Iterator[str]:
    for case in result["cases"]:
        for loss in HEADLINES[result["suite"]].get(case["name"], ()):
            rows = [row for row in case["variants"] if row["loss"] == loss and "peak_bytes" in row]
            theirs = min((r for r in rows if COLUMNS["PyTorch"](r)), key=lambda r: r["both_ms"]["median"])
            ours = next(r for r in rows if COLUMNS["kdkernels"](r))
            ratio = theirs["both_ms"]["median"] / ours["both_ms"]["median"]
            yield (
                f"| {kind}, {_TITLES[loss]}, {case['name']} | {_ms(theirs['both_ms']['median'])} ms | "
                f"{_ms(ours['both_ms']['median'])} ms | {ratio:.1f}x | {_mebibytes(theirs)} | {_mebibytes(ours)} |"
            )


def _mebibytes(row: Row) -> str:
    return f"{row['peak_bytes'] / 2**20:,.0f} MiB"


def parts(results: list[Row], processors: list[Row]) -> dict[str, str]:
    """The parts of README and docs that these results fill, by their names there. ``processors`` are of one suite, the
    first of them among ``results``."""
    return {
        "figures": "\n\n".join(map(figures, results)),
        "headline": headline(results),
        "processors": "\n\n".join([goals.beside(processors), *map(where, processors[1:])]),
    }
