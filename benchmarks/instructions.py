"""``python -m benchmarks.instructions``: instructions that the GPU kernels execute for a pair of logits, and what follows.

Counted from the machine code for sm_90a, without a GPU: of the passes over columns that are all a row's own, in bf16, forward
and gradient, no hard term. What a row costs beside them (exchanges, weights, results) is not in it. A pass is compiled twice,
written out for different numbers of columns; the difference is what these columns take. Triton's passes are loops, counted
as they are. Divergences whose instructions depend on their parameters (AlphaBeta, Mixed) are left out.

Prints the table, writes benchmarks/results/instructions.json and the table in docs/gpu.md. Needs nvcc, and Triton, whose
package has the disassembler.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import kdkernels as kd
from benchmarks import compile_cuda, machine, pages
from kdkernels.backends.spec import Asked

PASSES = Path(__file__).with_suffix(".cuh")
RESULT = Path(__file__).parent / "results" / "instructions.json"
ARCHITECTURE = "sm_90a"


class Formula(NamedTuple):
    """A divergence, and its kind and functor in csrc/divergence.h."""

    divergence: kd.divergences.Divergence
    kind: str
    functor: str


DIVERGENCES = {
    "forward KL": Formula(kd.ForwardKL(), "kForwardKL", "ClosedForm"),
    "reverse KL": Formula(kd.ReverseKL(), "kReverseKL", "ClosedForm"),
    "JSD": Formula(kd.JSD(0.5), "kJSD", "JSD"),
    "skew KL": Formula(kd.SkewKL(0.1), "kSkewKL", "SkewKL"),
    "skew reverse KL": Formula(kd.SkewReverseKL(0.1), "kSkewReverseKL", "SkewReverseKL<false>"),
    "total variation": Formula(kd.TotalVariation(), "kTotalVariation", "TotalVariation"),
    "overlap": Formula(kd.Overlap(), "kOverlap", "Overlap"),
}


class Kernel(NamedTuple):
    """Of the kernels in csrc/cuda: what docs call it, its types (row_io.cuh), and its passes in instructions.cuh."""

    name: str
    types: str
    passes: str


KERNELS = (
    Kernel("rows in registers", "Held<PlainBFloat16>", "held<{}, {}, PlainBFloat16, {}>"),
    Kernel("wider rows", "PlainBFloat16", "streamed<{}, {}, PlainBFloat16, false, {}>"),
    Kernel("with statistics", "Anything", "streamed<{}, {}, Anything, true, {}>"),
)
#: Vectors of eight columns that a pass is written out for: their difference is what is counted.
FEWER, MORE = 2, 4
PAIRS = (MORE - FEWER) * 8

#: An H200's; the clock is what ncu saw an H100 keep. And how large the problem is whose bounds are given.
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 4.8e12
ISSUED, SPECIAL = 128, 16  # a clock and multiprocessor: instructions of a thread, special functions
ROWS, VOCAB = 8192, 151_936


class Counts(NamedTuple):
    """Of a whole kernel's code."""

    instructions: int
    special: int


def source(formula: Formula, kernel: Kernel, vectors: int) -> str:
    name = kernel.passes.format(formula.kind, formula.functor, vectors)
    given = "const __grid_constant__ Job, const __grid_constant__ Plan, const Given*, void*, FoundValue*"
    return f"{PASSES.read_text()}\nnamespace kd {{\ntemplate __global__ void {name}({given});\n}}\n"


def compiled(text: str) -> tuple[bytes, str]:
    """The machine code, and what ptxas said of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cu")
        path.write_text(text)
        done = subprocess.run(compile_cuda.command(ARCHITECTURE, path), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return path.with_suffix(f".{ARCHITECTURE}.cubin").read_bytes(), done.stderr


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", flags=re.M)
_BRANCH = re.compile(r"BRA\b.*?0x([0-9a-f]+)")


def disassembled(binary: bytes) -> dict[int, str]:
    """Address -> instruction, without the padding."""
    from benchmarks.compile_triton import cuobjdump

    found = _INSTRUCTION.findall(cuobjdump("-sass", binary))
    return {int(at, 16): code for at, code in found if not code.startswith("NOP")}


def counts(codes: Iterable[str]) -> Counts:
    codes = list(codes)
    return Counts(len(codes), sum(code.startswith("MUFU") for code in codes))


def passes(code: dict[int, str]) -> list[Counts]:
    """Of the innermost loops with exponentials in them, those over columns."""
    loops = [
        (int(to[1], 16), at)
        for at, said in code.items()
        if (to := _BRANCH.match(said)) and int(to[1], 16) <= at
    ]
    inner = [
        (low, high)
        for low, high in loops
        if not any(low <= start and end <= high and (start, end) != (low, high) for start, end in loops)
    ]
    found = [counts(said for at, said in code.items() if low <= at <= high) for low, high in inner]
    return [each for each in found if each.special]


def of_triton() -> list[dict]:
    from benchmarks import compile_triton as offline

    rows = []
    for name, formula in DIVERGENCES.items():
        for kernel, stats in (("Triton", 0), ("Triton, with statistics", 1)):
            with offline.offline("sm_90") as compiled:
                offline.call(
                    formula.divergence,
                    offline.BF16,
                    offline.BF16,
                    rows=ROWS,
                    columns=VOCAB,
                    asked=Asked.SOFT,
                    stats=stats,
                )
            (made,) = compiled
            sizes = {made.src.fn.arg_names[at]: value for (at,), value in made.src.constants.items()}
            pairs = sizes["LANES"] * sizes["K"] / (32 * made.metadata.num_warps)
            found = passes(disassembled(made.asm["cubin"]))
            if len(found) != (2 if formula.functor == "ClosedForm" else 3):
                raise SystemExit(f"Triton's kernel for {name} has {len(found)} loops with exponentials")
            rows.append(
                {
                    "divergence": name,
                    "kernel": kernel,
                    "instructions": sum(each.instructions for each in found) / pairs,
                    "special": sum(each.special for each in found) / pairs,
                    "registers": offline.usage(made, "sm_90").registers,
                }
            )
    return rows


def of_cuda() -> list[dict]:
    """A row for each divergence and kernel."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(of_kernel, *zip(*itertools.product(DIVERGENCES, KERNELS))))


def of_kernel(name: str, kernel: Kernel) -> dict:
    formula = DIVERGENCES[name]
    fewer, more = (
        counts(disassembled(compiled(source(formula, kernel, vectors))[0]).values())
        for vectors in (FEWER, MORE)
    )
    whole = compiled(compile_cuda.instances((formula.kind, formula.functor, kernel.types)))[1]
    return {
        "divergence": name,
        "kernel": kernel.name,
        "instructions": (more.instructions - fewer.instructions) / PAIRS,
        "special": (more.special - fewer.special) / PAIRS,
        "registers": compile_cuda.parsed(whole)[0].registers,
    }


def bounds(row: dict) -> dict[str, float]:
    """Milliseconds that the row's instructions, its special functions and the memory need."""
    pairs = ROWS * VOCAB
    a_clock = MULTIPROCESSORS * CLOCK
    return {
        "issue": 1e3 * pairs * row["instructions"] / (a_clock * ISSUED),
        "special functions": 1e3 * pairs * row["special"] / (a_clock * SPECIAL),
        "memory": 1e3 * pairs * 6 / BANDWIDTH,
    }


def table(result: dict) -> str:
    lines = [
        "| divergence | kernel | instructions a pair | of them special functions | registers | issue, ms | special functions, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        bound = bounds(row)
        lines.append(
            f"| {row['divergence']} | {row['kernel']} | {row['instructions']:.1f} | {row['special']:.1f} | "
            f"{row['registers']} | {bound['issue']:.2f} | {bound['special functions']:.2f} |"
        )
    memory = bounds(result["rows"][0])["memory"]
    return "\n".join(
        [
            *lines,
            "",
            f"Milliseconds are those of [{ROWS}, {VOCAB}] on {MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9:g} GHz; an "
            f"H200's memory, {BANDWIDTH / 1e12:g} TB/s, needs {memory:.2f}. nvcc {result['nvcc']}, Triton "
            f"{result['environment']['versions']['triton']}, {ARCHITECTURE}.",
        ]
    )


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    result = {
        "environment": machine.describe("cpu"),
        "nvcc": re.search(r"V([\d.]+)", version)[1],  # type: ignore[index]
        "rows": sorted(of_cuda() + of_triton(), key=lambda row: list(DIVERGENCES).index(row["divergence"])),
    }
    print(table(result))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    pages.fill("instructions", table(result))


if __name__ == "__main__":
    main()
