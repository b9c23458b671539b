"""``python -m benchmarks.readme RESULT.json``: fills README's figures from a committed result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


def figures(result: dict) -> str:
    where = result["environment"]
    lines = [
        f"{where['machine']}, torch {where['torch']}, {where['instruction_set']}, {where['date']}.",
        "Medians in ms; the ratio is to the floor measured in the same run.",
        "",
        "| case | variant | ms | to the floor |",
        "|---|---|---|---|",
    ]
    for case in result["cases"]:
        for name, times in case["variants"].items():
            kind = "inplace" if "inplace" in name and "inplace" in case["floors"] else "fresh"
            if name in case["floors"].values():
                ratio = "floor"
            else:
                floor = case["floors"][kind]
                ratio = f"{times['median_ms'] / case['variants'][floor]['median_ms']:.2f} x {floor}"
            lines.append(f"| {case['case']} | {name} | {times['median_ms']:.1f} | {ratio} |")
    lines += ["", "Peak memory above inputs and gradient, logits fp32: "]
    memory = result["peak_bytes_above_inputs_and_gradient"]
    names = {"kd": "kd ForwardKL", "inplace": "kd in place", "eager": "F.kl_div eager"}
    lines[-1] += ", ".join(f"{names[k]} {v / 2**20:.0f} MiB" for k, v in memory.items()) + "."
    return "\n".join(lines)


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text())
    readme = Path("README.md")
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{figures(result)}\n{END}{after}")


if __name__ == "__main__":
    main()
