"""``python -m benchmarks.tune_triton``: measures launch options of the Triton kernels on this GPU.

For each width, dtype and family of divergences every candidate is timed beside the floor,
``torch.add(s, t, out=g)``, round robin in one run. Prints the best few of each and writes everything to
JSON (``--out``); the table in ``kdkernels/backends/triton/launch.py`` is then edited by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import statistics
from typing import Callable, Iterator

import torch

import kdkernels as kd
from kdkernels.backends.protocol import Gradients, Tile
from kdkernels.backends.spec import OUTPUTS, Asked, Spec

#: (tokens, vocabulary), narrow to wide, as models have them.
SHAPES = [(65_536, 1024), (16_384, 32_000), (8192, 128_256), (8192, 256_000), (64, 256_000)]
SMALL_SHAPES = [(512, 1024), (64, 32_000)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DIVERGENCES = {"closed": kd.ForwardKL(), "other": kd.JSD(0.5)}


def candidates(columns: int) -> list:
    from kdkernels.backends.triton.launch import Options

    made = itertools.product((4, 8, 16, 32), (1, 2), (1, 2, 4, 8))
    return [
        Options(columns, warps, lanes, programs)
        for warps, lanes, programs in made
        if warps * programs <= 32 and warps * lanes <= 64
    ]


@contextlib.contextmanager
def only(option) -> Iterator[None]:
    """The launch code with one row in its table."""
    from kdkernels.backends.triton import launch

    before = launch._TABLE
    launch._TABLE = {maker: (option._replace(columns=2**31),) for maker in before}
    try:
        yield
    finally:
        launch._TABLE = before


def step(tile: Tile, weights: torch.Tensor, kind: int, grad: torch.Tensor, option) -> None:
    from kdkernels.backends.triton import launch

    with only(option):
        launch.fused(tile, weights, Spec(kind=kind, asked=Asked.SOFT), Gradients(grad, None))


def milliseconds(variants: dict, rounds: int) -> dict:
    """Median time of each on the GPU, round robin after one warm-up."""
    times: dict = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(taken) for name, taken in times.items()}


def case(tokens: int, vocab: int, dtype: torch.dtype, divergence, rounds: int) -> dict:
    torch.manual_seed(0)
    s, t = (torch.randn(tokens, vocab, device="cuda", dtype=dtype) for _ in range(2))
    g, weights = torch.empty_like(s), torch.ones(tokens, OUTPUTS, device="cuda", dtype=torch.float64)
    one = torch.ones(1, device="cuda", dtype=torch.float64)
    parameters = torch.tensor(divergence.parameters, device="cuda", dtype=torch.float64)
    tile = Tile(s, t, None, one, parameters, 0, vocab)
    variants: dict[str, Callable[[], object]] = {"add(out=g)": functools.partial(torch.add, s, t, out=g)}
    for option in candidates(vocab):
        run = functools.partial(step, tile, weights, divergence.kind, g, option)
        try:
            run()
        except Exception as error:  # too many registers for so many warps
            print(f"  left out: {option}: {type(error).__name__}")
            continue
        variants[str(option)] = run
    return milliseconds(variants, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_triton", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--out", help="JSON file for all times")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_triton measures on a GPU, and torch sees none here")
    results = []
    shapes = SMALL_SHAPES if arguments.small else SHAPES
    for (tokens, vocab), dtype, family in itertools.product(shapes, DTYPES, DIVERGENCES):
        times = case(tokens, vocab, DTYPES[dtype], DIVERGENCES[family], arguments.rounds)
        floor = times["add(out=g)"]
        print(f"[{tokens}, {vocab}] {dtype} {family}: add(out=g) {floor:.3f} ms")
        for name, taken in sorted(times.items(), key=lambda item: item[1])[:4]:
            print(f"  {taken:8.3f} ms  {taken / floor:5.2f} x  {name}")
        results.append(dict(tokens=tokens, vocab=vocab, dtype=dtype, family=family, ms=times))
    if arguments.out:
        machine = dict(
            gpu=torch.cuda.get_device_name(), torch=torch.__version__, date=str(datetime.date.today())
        )
        with open(arguments.out, "w") as file:
            json.dump(dict(machine=machine, results=results), file, indent=1)


if __name__ == "__main__":
    main()
