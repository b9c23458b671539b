"""Two results side by side: how much further from its floor each of our losses is now.

Times are first divided by the floor of their own run, so a slower machine or a busy hour is not a
regression.
"""

from __future__ import annotations

from typing import Any

LIMIT = 1.10


def ratios(result: dict[str, Any], package: str = "kdkernels") -> dict[tuple[str, str, str], float]:
    """(case, variant, loss) -> time over floor."""
    return {
        (case["name"], row["variant"], row["loss"]): row["to_floor"]
        for case in result["cases"]
        for row in case["variants"]
        if row["package"] == package and "to_floor" in row
    }


def compare(before: dict[str, Any], after: dict[str, Any], limit: float = LIMIT) -> tuple[str, list[str]]:
    """(a table, the lines of it that lost more than ``limit`` allows).

    Raises ValueError where the two have nothing in common.
    """
    old, new = ratios(before), ratios(after)
    shared = [key for key in old if key in new]
    if not shared:
        raise ValueError("the two results have no case and variant in common")
    lines, lost = [], []
    for key in shared:
        change = new[key] / old[key]
        line = f"{', '.join(key):<76}{old[key]:8.2f}x ->{new[key]:8.2f}x{change:8.2f}"
        if change > limit:
            line += "  SLOWER"
            lost.append(line)
        lines.append(line)
    for names, which in ((old, "before"), (new, "after")):
        lines += [f"{', '.join(key):<76}only {which}" for key in names if key not in shared]
    return "\n".join(lines), lost
