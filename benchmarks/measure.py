"""Times of a case's variants: round robin, warmed up, on inputs that no cache still holds.

A round runs every variant once, in an order of its own: what slows one down slows the others too,
and none always pays for the memory that its neighbour left behind. Input sets rotate so that between two visits of a set more than the
last-level cache has passed; gradients are new each time, as in training.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from pytest_benchmark.stats import Stats

from benchmarks.cases import Case
from benchmarks.inputs import Inputs, Step
from benchmarks.machine import last_level_cache_bytes
from benchmarks.variants import Variant

#: (forward, backward, both) in seconds; a floor has no backward.
Times = tuple[float, float, float]
ROUNDS = 7
#: How long a GPU waits for Python to run ahead: about 10 ms.
_AHEAD_CLOCKS = 20_000_000
#: A variant that has taken this long leaves after MIN_ROUNDS, so that the slow do not eat the time.
PATIENCE_S = 1.5
MIN_ROUNDS = 3


def input_sets(case: Case, device: str) -> list[Inputs]:
    """So many sets that together they are four times the last-level cache; one set, if it is that large."""
    torch.manual_seed(0)
    first = Inputs(case, device)
    count = math.ceil(4 * last_level_cache_bytes(device) / first.bytes)
    return [first] + [Inputs(case, device) for _ in range(min(count, 32) - 1)]


def timed_step(variant: Variant, step: Step, device: str) -> Times:
    """One forward and backward. The backward is timed on its own, not as a difference of two runs."""
    run = _on_cuda if device == "cuda" else _on_cpu
    return run(variant.forward, None if variant.is_floor else _backward, step)


def _backward(loss: Any) -> None:
    loss.backward()


def _on_cpu(forward: Callable, backward: Callable | None, step: Step) -> Times:
    start = time.perf_counter()
    kept = forward(step)
    middle = end = time.perf_counter()
    if backward:
        backward(kept)
        end = time.perf_counter()
    return middle - start, end - middle, end - start


def _on_cuda(forward: Callable, backward: Callable | None, step: Step) -> Times:
    """The GPU's time alone. In training it has work queued while Python runs; here it sleeps until all is queued, or
    up to then, for what waits for the GPU itself."""
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize()
    torch.cuda._sleep(_AHEAD_CLOCKS)
    start.record()
    kept = forward(step)
    middle.record()
    if backward:
        backward(kept)
    end.record()
    torch.cuda.synchronize()
    first, second, both = (a.elapsed_time(b) / 1e3 for a, b in ((start, middle), (middle, end), (start, end)))
    return first, second if backward else 0.0, both


class Stopwatch:
    """A variant's times so far."""

    def __init__(self) -> None:
        self.stats = [Stats() for _ in range(3)]
        self.problem: str | None = None

    @property
    def done(self) -> bool:
        both = self.stats[2]
        return self.problem is not None or (len(both.data) >= MIN_ROUNDS and both.total > PATIENCE_S)

    def add(self, times: Times) -> None:
        for stats, seconds in zip(self.stats, times):
            stats.update(seconds)

    def summary(self) -> dict[str, Any]:
        """{"forward_ms": {"median", "iqr", "min", "max"}, ...}, or what went wrong."""
        if self.problem is not None:
            return {"problem": self.problem}
        named = zip(("forward_ms", "backward_ms", "both_ms"), self.stats)
        spread = ("median", "iqr", "min", "max")
        made: dict[str, Any] = {
            name: {field: getattr(s, field) * 1e3 for field in spread} for name, s in named
        }
        return {"rounds": len(self.stats[2].data), **made}


def what_went_wrong(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def round_robin(case: Case, variants: list[Variant], device: str, rounds: int = ROUNDS) -> list[Stopwatch]:
    """Every variant's times over ``rounds`` rounds after one of warming up."""
    sets = input_sets(case, device)
    watches = [Stopwatch() for _ in variants]
    pairs, turn = list(zip(variants, watches)), 0
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + 1):
            for variant, watch in random.Random(number).sample(pairs, len(pairs)):
                if watch.done:
                    continue
                inputs, turn = sets[turn % len(sets)], turn + 1
                try:
                    times = timed_step(variant, Step(inputs, inplace=variant.inplace), device)
                    if number:
                        watch.add(times)
                except Exception as error:  # a peer's failure is a result, not the end of the run
                    watch.problem = what_went_wrong(error)
                if variant.inplace:
                    inputs.restore()
                if device == "cuda" and watch.problem:
                    torch.cuda.empty_cache()
    finally:
        gc.enable()
    return watches
