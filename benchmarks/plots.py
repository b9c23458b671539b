"""Pictures of a result: time and memory of one headline case, and curves over tokens and vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import where

LOSS = "kl"
#: File name -> which curve, the case's field on the x axis, the label of the y axis.
PLOTS = {
    "time-tokens": ("tokens", "tokens", "forward + backward, ms"),
    "time-vocabulary": ("vocabulary", "vocab", "forward + backward, ms"),
    "memory-tokens": ("tokens", "tokens", "peak above inputs and gradients, MiB"),
}


def curves(result: dict[str, Any], curve: str, x: str, memory: bool, hidden: bool) -> dict[str, list]:
    """Variant -> its points (x, y) of the cases in ``curve``, sorted."""
    made: dict[str, list] = {}
    for case in result["cases"]:
        if curve not in case["plot"] or bool(case["width"]) != hidden:
            continue
        for row in case["variants"]:
            floor = row["loss"] == "floor" and not memory
            if "both_ms" not in row or not (floor or row["loss"] == LOSS):
                continue
            y = row.get("peak_bytes", 0) / 2**20 if memory else row["both_ms"]["median"]
            if y:
                made.setdefault(row["variant"], []).append((case[x], y))
    return {variant: sorted(points) for variant, points in made.items()}


#: The headline's bars: variant -> its label.
BARS = {
    "F.kl_div": "F.kl_div",
    "F.kl_div compiled": "F.kl_div,\ntorch.compile",
    "kdkernels": "kdkernels",
    "kdkernels in place": "kdkernels,\ninplace=True",
}


def bars(result: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """(name of the first case from logits, its rows of the headline's variants)."""
    for case in result["cases"]:
        rows = {
            row["variant"]: row for row in case["variants"] if row["loss"] == LOSS and "peak_bytes" in row
        }
        if not case["width"] and {"F.kl_div", "kdkernels"} <= rows.keys():
            return case["name"], [rows[variant] for variant in BARS if variant in rows]
    return "", []


def draw(result: dict[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """Writes the PNGs that the result has points for."""
    import matplotlib

    matplotlib.use("Agg")
    return _draw_bars(result, folder, prefix) + _draw_curves(result, folder, prefix)


def _draw_bars(result: dict[str, Any], folder: Path, prefix: str) -> list[Path]:
    import matplotlib.pyplot as plt

    name, rows = bars(result)
    if not rows:
        return []
    panels = {
        "time, forward + backward": ("ms", [row["both_ms"]["median"] for row in rows]),
        "memory beside inputs and gradients": ("MiB", [row["peak_bytes"] / 2**20 for row in rows]),
    }
    labels = [BARS[row["variant"]] for row in rows]
    colors = ["C0" if row["package"] == "kdkernels" else "0.65" for row in rows]
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 2.6), layout="constrained")
    for axis, (title, (unit, values)) in zip(axes, panels.items()):
        drawn = axis.barh(labels, values, color=colors)
        axis.bar_label(drawn, [f"{value:,.0f} {unit}" for value in values], padding=3, fontsize=9)
        axis.set(title=title, xlim=(0, max(values) * 1.22))
        axis.invert_yaxis()
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    machine = result["machine"]
    figure.suptitle(f"forward KL, {name}; {machine['name']}, {machine['date'][:10]}", fontsize=9)
    path = folder / f"{prefix}headline.png"
    figure.savefig(path, dpi=110, metadata={"Description": where(result)})
    plt.close(figure)
    return [path]


def _draw_curves(result: dict[str, Any], folder: Path, prefix: str) -> list[Path]:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, ScalarFormatter

    made = []
    for name, (curve, x, label) in PLOTS.items():
        panels = {
            title: curves(result, curve, x, "memory" in name, hidden)
            for title, hidden in (("logits", False), ("hidden states", True))
        }
        panels = {title: lines for title, lines in panels.items() if lines}
        if not panels:
            continue
        colors = {
            variant: f"C{i}" for i, variant in enumerate(dict.fromkeys(v for p in panels.values() for v in p))
        }
        figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False)
        for axis, (title, lines) in zip(axes[0], panels.items()):
            for variant, points in lines.items():
                ours = variant.startswith("kdkernels")
                axis.plot(
                    *zip(*points),
                    marker="o",
                    label=variant,
                    color=colors[variant],
                    linewidth=2.5 if ours else 1.2,
                )
            axis.set(xscale="log", yscale="log", xlabel=curve, ylabel=label, title=f"forward KL from {title}")
            axis.set_xticks(sorted({p[0] for points in lines.values() for p in points}))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
            axis.minorticks_off()
            axis.grid(True, alpha=0.3)
            axis.legend(fontsize=7)
        machine = result["machine"]
        figure.suptitle(f"{machine['name']}, {machine['date'][:10]}", fontsize=8)
        figure.tight_layout()
        path = folder / f"{prefix}{name}.png"
        figure.savefig(path, dpi=110, metadata={"Description": where(result)})
        plt.close(figure)
        made.append(path)
    return made
