"""Peak memory above inputs and gradients: resident memory as Linux reports it on the CPU, torch's
allocator on a GPU. On the CPU each variant gets a fresh process, whose heap has not grown yet."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.inputs import Inputs, Step
from benchmarks.measure import what_went_wrong
from benchmarks.variants import Variant, variants_of

#: A process that the system ends for its memory never answers.
TIMEOUT_S = 120.0


class Peak:
    bytes: int = 0


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@contextlib.contextmanager
def resident_peak() -> Iterator[Peak]:
    """``.bytes`` is, after the block, how far resident memory rose above its value at the start.

    OSError where the system does not let a process reset its high-water mark (not Linux, say).
    """
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before, peak = _status("VmRSS"), Peak()
    yield peak
    peak.bytes = max(_status("VmHWM") - before, 0)


def give_back_free_memory() -> None:
    """What malloc keeps for later would hide a peak."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


@contextlib.contextmanager
def allocated_peak() -> Iterator[Peak]:
    """The same from torch's CUDA allocator."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, peak = torch.cuda.memory_allocated(), Peak()
    yield peak
    torch.cuda.synchronize()
    peak.bytes = max(torch.cuda.max_memory_allocated() - before, 0)


def peaks(case: Case, variants: list[Variant], device: str) -> list[dict[str, Any]]:
    """{"peak_bytes", "peak_units"} of each variant (units of one ``[N, V]`` fp32), {} for floors."""
    unit = case.tokens * case.vocab * 4
    made: list[dict[str, Any]] = []
    with _processes(device) as pool:
        for variant in variants:
            if variant.is_floor:
                made.append({})
                continue
            arguments = case, variant.key, device, torch.get_num_threads()
            try:
                peak = (
                    peak_of(*arguments)
                    if pool is None
                    else pool.apply_async(peak_of, arguments).get(TIMEOUT_S)
                )
            except multiprocessing.TimeoutError:
                made.append({"peak_problem": "the process died, or took too long"})
            except OSError as error:
                made.append({"peak_problem": f"cannot be measured here: {error}"})
            except Exception as error:  # a peer's failure is a result, not the end of the run
                made.append({"peak_problem": what_went_wrong(error)})
            else:
                made.append({"peak_bytes": peak, "peak_units": peak / unit})
    return made


@contextlib.contextmanager
def _processes(device: str) -> Iterator[Any]:
    """A pool whose every task is a fork of a process that has only imported things."""
    if device != "cpu":
        yield None
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory", "benchmarks.peers.preload"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        yield pool


def peak_of(case: Case, key: tuple[str, str], device: str, threads: int) -> int:
    """Bytes that one step of the variant needs above its inputs and gradients."""
    torch.set_num_threads(threads)
    variant = next(v for v in variants_of(case, device)[0] if v.key == key)
    torch.manual_seed(0)
    inputs = Inputs(case, device)
    if variant.inplace:
        inputs.scratch()
    # The first step loads and compiles; that memory is not counted.
    _one_step(variant, inputs if variant.one_shape else Inputs(case.shrunk(tokens=8), device))
    inputs.restore()
    if device == "cpu":
        give_back_free_memory()
    with allocated_peak() if device == "cuda" else resident_peak() as peak:
        step = _one_step(variant, inputs)
    kept = [g for g in step.gradients() if g is not None and not variant.inplace]
    return max(peak.bytes - sum(g.numel() * g.element_size() for g in kept), 0)


def _one_step(variant: Variant, inputs: Inputs) -> Step:
    step = Step(inputs, inplace=variant.inplace)
    variant.forward(step).backward()
    return step
