"""``python -m benchmarks.readme RESULT.json``: fills README's figures from a committed result.

Results of benchmarks.core go to the part marked figures, a demo's comparison.json to the one marked demo.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kdkernels.trainer import report


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


def demo(result: dict) -> str:
    return f"{report.table(result)}\n\n{report.verdict(result)} Measured on {report.machine(result)}."


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text())
    mark, text = ("demo", demo(result)) if "students" in result else ("figures", figures(result))
    readme = Path("README.md")
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, rest = readme.read_text().split(begin)
    after = rest.split(end)[1]
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
