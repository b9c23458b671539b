"""``python -m benchmarks.compile_cuda``: the CUDA C++ kernels compiled for GPUs that need not be here.

Reports registers, spills and static shared memory from ptxas, and fails where anything spills or a block
of the launch table's size would not fit. Needs nvcc.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parent.parent / "csrc"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
#: What ``__launch_bounds__`` promises: 512 threads of 65536 registers.
MOST_REGISTERS = 128
#: A lane of held.cuh keeps 320 bytes in registers. Where a second pass needs these, so many may lie on the stack, once a row.
MOST_STACK_HELD = 192
_KERNEL = re.compile(r"Compiling entry function '(\S+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


class Usage(NamedTuple):
    kernel: str
    registers: int
    stack: int
    spilled: int

    @property
    def fits(self) -> bool:
        stack = MOST_STACK_HELD if "Held" in self.kernel and "ClosedForm" not in self.kernel else 0
        return self.registers <= MOST_REGISTERS and self.stack <= stack and self.spilled <= 4 * stack


def instances(*kernels: tuple[str, str, str]) -> str:
    """A source of these kernels alone: (kind, functor, types)."""
    lines = [
        f"template __global__ void rows_kernel<{kind}, {functor}, {types}>"
        "(const __grid_constant__ Job, const __grid_constant__ Plan);"
        for kind, functor, types in kernels
    ]
    return "\n".join(['#include "cuda/kernel.cuh"', "namespace kd {", *lines, "}"])


def command(architecture: str, source: Path) -> list[str]:
    """nvcc's, which says on stderr what :func:`parsed` reads."""
    return [
        "nvcc",
        "-std=c++20",
        f"-arch={architecture}",
        "-cubin",
        "-O3",
        "-Xptxas",
        "-v",
        f"-I{CSRC}",
        "-o",
        str(source.with_suffix(f".{architecture}.cubin")),
        str(source),
    ]


def parsed(said: str) -> list[Usage]:
    """What ptxas said of every kernel."""
    return [
        Usage(
            kernel=_KERNEL.search(part)[1],  # type: ignore[index]
            registers=int(_USED.search(part)[1]),  # type: ignore[index]
            stack=int(_SPILLS.search(part)[1]),  # type: ignore[index]
            spilled=int(_SPILLS.search(part)[2]) + int(_SPILLS.search(part)[3]),  # type: ignore[index]
        )
        for part in re.split(r"(?=ptxas info\s+: Compiling entry)", said)[1:]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_cuda", description=__doc__)
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="default: all")
    bad = 0
    for architecture in parser.parse_args().arch or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "all.cu"
            source.write_text('#include "cuda/launch.cu"')
            done = subprocess.run(command(architecture, source), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = parsed(done.stderr)
        for usage in found:
            print(f"{architecture}  {usage.registers:3} registers  {usage.spilled} spilled  {usage.kernel}")
        bad += sum(not usage.fits for usage in found)
        print(f"{architecture}: {len(found)} kernels, {max(u.registers for u in found)} registers at most")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
