"""``python -m benchmarks.compile_triton``: every Triton kernel compiled for GPUs that need not be here.

The launch code itself runs, on CPU tensors and with its real options; only the last step, the launch,
is left out. Reports registers, spills and shared memory from the binaries, and fails where anything on
NVIDIA spills, or wants more registers than a multiprocessor has.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import kdkernels as kd
from kdkernels.backends import row_state as rs
from kdkernels.backends.protocol import Gradients, SparseGradient, Tile
from kdkernels.backends.spec import OUTPUTS, Asked, Spec
from kdkernels.backends.triton import kernels, launch
from kdkernels.divergences import NoDivergence

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CHIPS = {  # what the chip's properties would say
    "sm_80": launch.Chip("nvidia", 108, 40 * 2**20, 32),
    "sm_90": launch.Chip("nvidia", 132, 50 * 2**20, 32),
    "sm_100": launch.Chip("nvidia", 148, 126 * 2**20, 32),
    "gfx942": launch.Chip("amd", 304, 4 * 2**20, 64),
}
DIVERGENCES = [
    NoDivergence(),
    kd.ForwardKL(),
    kd.ReverseKL(),
    kd.JSD(0.5),
    kd.SkewKL(0.1),
    kd.SkewReverseKL(0.1),
    kd.SkewReverseKL(0.1, detach_mixture=True),
    kd.TotalVariation(),
    kd.Overlap(),
    kd.AlphaBeta(0.2, 0.7),
    kd.AlphaBeta(0.5, 0.0),
    kd.AlphaBeta(0.0, 0.5),
    kd.AlphaBeta(0.5, -0.5),
    kd.AlphaBeta(0.0, 0.0),
    kd.Mixed(0.4),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: Dtypes of (student and its teacher, gradient): logits, and a head's fp32 tile.
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16)]
HARD = dict(asked=Asked.SOFT | Asked.LABEL, stats=1)
EVERYTHING = dict(asked=Asked.SOFT | Asked.HARD | Asked.ENTROPY, tempered=1, stats=1)
CAPPED = dict(student_scale=0.5, student_softcap=30.0, teacher_softcap=30.0)
OPTIONS: list[dict] = [
    dict(asked=Asked.SOFT),
    HARD,
    EVERYTHING,
    dict(EVERYTHING, asked=EVERYTHING["asked"] | Asked.TEACHER_LABEL, **CAPPED),
]


class Usage(NamedTuple):
    kernel: str
    target: str
    registers: int
    spilled: int  # bytes of local memory a thread, or spilled registers on AMD
    shared: int
    threads: int  # of a block

    @property
    def good(self) -> bool:
        """It does not spill, and a multiprocessor has the registers of a block; NVIDIA hands them out by eights."""
        fits = -(-self.registers // 8) * 8 * self.threads <= 2**16
        return self.target.startswith("gfx") or (fits and self.spilled == 0)


class _Driver:
    """What triton.jit asks of a driver before it launches."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def offline(name: str) -> Iterator[list]:
    """Inside, launches for the target ``name`` only compile; the list collects what."""
    compiled: list = []
    run, chip = JITFunction.run, launch._chip

    def only_compile(self, *arguments, grid, warmup, **options):
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(_Driver(TARGETS[name]))
    JITFunction.run, launch._chip = only_compile, lambda device: CHIPS[name]  # type: ignore[method-assign]
    for kernel in vars(kernels).values():
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()
    try:
        yield compiled
    finally:
        JITFunction.run, launch._chip = run, chip  # type: ignore[method-assign]


def _logits(dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    return torch.empty(1, columns, dtype=dtype).expand(rows, columns)


def _tile(student: torch.Tensor, teacher: torch.Tensor | None, numbers: torch.Tensor) -> Tile:
    rows, columns = student.shape
    labels = torch.zeros(rows, dtype=torch.int64)
    return Tile(student, teacher, labels, torch.ones(1, dtype=torch.float64), numbers, 0, columns)


def call(
    divergence: kd.divergences.Divergence,
    tile: torch.dtype,
    gradient: torch.dtype,
    *,
    rows: int = 400,
    columns: int = 128_256,
    chunked: bool = False,
    **options,
) -> None:
    """One call of the waist on tensors whose values do not matter."""
    grad = _logits(gradient, rows, columns)
    teacher = None if isinstance(divergence, NoDivergence) else _logits(tile, rows, columns)
    numbers = torch.tensor(divergence.parameters, dtype=torch.float64)
    given = _tile(_logits(tile, rows, columns), teacher, numbers)
    weights = torch.ones(rows, OUTPUTS, dtype=torch.float64)
    spec = Spec(kind=divergence.kind, **(dict(asked=Asked.SOFT) | options))
    gradients = Gradients(grad, grad if spec.asked & Asked.TEACHER_LABEL else None)
    if not chunked:
        launch.fused(given, weights, spec, gradients)
        return
    state = rs.new_state(rows, grad.device)
    launch.accumulate(given, spec, state)
    if teacher is not None and spec.closed_form is None:
        launch.accumulate_value(given, spec, state)
    launch.gradient(given, weights, spec, state, gradients)


def call_sparse(
    tile: torch.dtype,
    gradient: torch.dtype,
    *,
    rows: int = 400,
    columns: int = 128_256,
    slots: int = 64,
    **options,
) -> None:
    """The two passes around a sparse target's outcomes."""
    grad, state = _logits(gradient, rows, columns), rs.new_state(rows, torch.device("cpu"))
    ids, one = torch.zeros(rows, slots, dtype=torch.int64), torch.ones(rows, dtype=torch.float64)
    stored, packed = torch.zeros(rows, slots + 1)[:, :-1], one.new_zeros(rows, 5)
    sparse = SparseGradient(ids, one, stored, *(part.contiguous() for part in packed.split([2, 3], 1)))
    given = _tile(_logits(tile, rows, columns), None, torch.zeros(2, dtype=torch.float64))
    spec, weights = Spec(**options), torch.ones(rows, OUTPUTS, dtype=torch.float64)
    launch.accumulate(given, spec, state, skipped=ids)
    launch.gradient(given, weights, spec, state, Gradients(grad, None), sparse)


def cuobjdump(option: str, binary: bytes) -> str:
    """What the tool in Triton's package says of NVIDIA's machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def usage(kernel, target: str) -> Usage:
    name = kernel.metadata.name
    shared, threads = kernel.metadata.shared, TARGETS[target].warp_size * kernel.metadata.num_warps
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        found = {
            key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]
            for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        }
        spilled = found["vgpr_spill_count"] + found["sgpr_spill_count"]
        return Usage(name, target, found["vgpr_count"], spilled, shared, threads)
    text = cuobjdump("-res-usage", kernel.asm["cubin"])
    read = {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL", "SHARED")}  # type: ignore[index]
    return Usage(name, target, read["REG"], read["STACK"] + read["LOCAL"], shared, threads)


def usages(compiled: list, target: str) -> list[Usage]:
    return [usage(kernel, target) for kernel in {id(k): k for k in compiled}.values()]


def cases() -> Iterator[tuple]:
    """Every divergence x dtypes x whole rows or chunks with every option on, x fewer options, x narrower
    or unaligned rows."""
    for divergence, chunked in itertools.product(DIVERGENCES, (False, True)):
        alone = isinstance(divergence, NoDivergence)  # has a hard term, and no teacher
        for dtypes in DTYPES:
            yield divergence, *dtypes, dict(OPTIONS[2] if alone else OPTIONS[3], chunked=chunked)
        for options in OPTIONS[1:2] if alone else OPTIONS[:3]:
            yield divergence, BF16, BF16, dict(options, chunked=chunked)
        for columns in (1024, 32_000, 50_257):
            yield divergence, F32, F32, dict(OPTIONS[1], columns=columns, chunked=chunked)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_triton", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="all where none is given")
    parser.add_argument("--divergence", help="only those whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="every binary, not only the largest")
    arguments = parser.parse_args()
    failed = False
    for target in arguments.target or TARGETS:
        found: list[Usage] = []
        for dtypes, options in itertools.product(DTYPES, ({}, OPTIONS[1], EVERYTHING)):
            with offline(target) as compiled:
                call_sparse(*dtypes, **options)
            found += usages(compiled, target)
            failed |= not all(u.good for u in found)
        for divergence, tile, gradient, options in cases():
            if arguments.divergence and arguments.divergence not in str(divergence):
                continue
            with offline(target) as compiled:
                call(divergence, tile, gradient, **options)
            for u in usages(compiled, target):
                found.append(u)
                failed |= not u.good
                if arguments.verbose or not u.good:
                    verdict = "" if u.good else "SPILLS OR DOES NOT FIT"
                    print(u, divergence, tile, gradient, options, verdict, flush=True)
        for name in sorted({u.kernel for u in found}):
            mine = [u for u in found if u.kernel == name]
            print(
                f"{target:<7} {name:<12} {len(mine):>4} compiled, at most {max(u.registers for u in mine)} "
                f"registers, {max(u.spilled for u in mine)} spilled, {max(u.shared for u in mine)} bytes "
                "shared",
                flush=True,
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
