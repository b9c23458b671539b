"""``python -m benchmarks.core``: the core's speed and memory on this machine, beside the floor and peers.

Everything is timed in one run, round robin over the variants, and reported as the median with the
fastest and slowest. Prints a table and writes JSON (``--out``); ``--small`` shrinks the shapes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from typing import Callable

import torch
import torch.nn.functional as F

import kdkernels as kd
from benchmarks.memory import resident_peak


class _Handed(torch.autograd.Function):
    """Logits as an lm_head hands them over: not a leaf, and nobody else reads them."""

    @staticmethod
    def forward(ctx, anchor, logits):
        return torch.empty(0, dtype=logits.dtype).set_(logits.untyped_storage(), 0, logits.shape)

    @staticmethod
    def backward(ctx, grad):
        return None, None


def handed(logits: torch.Tensor) -> torch.Tensor:
    anchor = torch.zeros((), requires_grad=True)
    return _Handed.apply(anchor, logits)


def rounds(variants: dict[str, Callable[[], object]], count: int) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(count + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            keep = run()
            elapsed = time.perf_counter() - start
            del keep
            if turn:  # the first is a warm-up
                times[name].append(elapsed * 1e3)
    return {
        name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t)}
        for name, t in times.items()
    }


def eager_kl(s, t):
    return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")


def step(loss_fn, s, t):
    leaf = s.detach().requires_grad_()
    loss_fn(leaf, t).backward()
    return leaf.grad


def logits_case(n: int, v: int, dtype: torch.dtype, count: int, compile_peer: bool) -> dict:
    torch.manual_seed(0)
    s, t = torch.randn(n, v).to(dtype), torch.randn(n, v).to(dtype)
    out = torch.empty_like(s)
    variants: dict[str, Callable[[], object]] = {
        "add(out=g)": lambda: torch.add(s, t, out=out),
        "add": lambda: torch.add(s, t),
        "kd ForwardKL inplace": lambda: kd.kl_div(handed(s), t, inplace=True).backward(),
        "kd ReverseKL inplace": lambda: kd.distillation_loss(
            handed(s), t, divergence=kd.ReverseKL(), inplace=True).backward(),
        "kd JSD inplace": lambda: kd.js_divergence(handed(s), t, inplace=True).backward(),
        "kd ForwardKL": lambda: step(kd.kl_div, s, t),
        "kd JSD": lambda: step(kd.js_divergence, s, t),
        "F.kl_div eager": lambda: step(eager_kl, s, t),
    }  # fmt: skip
    if compile_peer:
        compiled = torch.compile(eager_kl)
        variants["F.kl_div compiled"] = lambda: step(compiled, s, t)
    result = rounds(variants, count)
    return {"case": f"logits [{n}, {v}] {str(dtype)[6:]}", "variants": result,
            "floors": {"inplace": "add(out=g)", "fresh": "add"}}  # fmt: skip


def gemms(h, w, th, tw, g):
    """Student logits, teacher logits, dH, dW: what no schedule can avoid."""
    return h @ w.t(), th @ tw.t(), g @ w, g.t() @ h


def heads_case(n: int, h: int, v: int, dtype: torch.dtype, count: int) -> dict:
    torch.manual_seed(0)
    hidden, weight, t_hidden, t_weight = (
        (torch.randn(*shape) * 0.1).to(dtype) for shape in ((n, h), (v, h), (n, h), (v, h))
    )
    g = torch.randn(n, v).to(dtype)
    hidden.requires_grad_(), weight.requires_grad_()

    def ours(divergence):
        hidden.grad = weight.grad = None
        teacher = kd.LinearHead(t_hidden, t_weight)
        kd.distillation_loss(kd.LinearHead(hidden, weight), teacher, divergence=divergence).backward()

    def eager():
        hidden.grad = weight.grad = None
        eager_kl(F.linear(hidden, weight), F.linear(t_hidden, t_weight)).backward()

    with torch.no_grad():
        plain_hidden, plain_weight = hidden.detach(), weight.detach()
    variants = {
        "four GEMMs": lambda: gemms(plain_hidden, plain_weight, t_hidden, t_weight, g),
        "kd ForwardKL": lambda: ours(kd.ForwardKL()),
        "kd JSD": lambda: ours(kd.JSD(0.5)),
        "F.kl_div eager": eager,
    }
    return {"case": f"hidden [{n}, {h}] -> {v} {str(dtype)[6:]}", "variants": rounds(variants, count),
            "floors": {"fresh": "four GEMMs"}}  # fmt: skip


def peak_memory(kind: str, n: int, v: int) -> int:
    """Peak resident bytes above what was there before the call, in a fresh process."""
    code = f"from benchmarks.core import measure_memory; measure_memory({kind!r}, {n}, {v})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_memory(kind: str, n: int, v: int) -> None:
    def run(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor | None:
        if kind == "inplace":
            return kd.kl_div(handed(s), t, inplace=True).backward()
        return step(kd.kl_div if kind == "kd" else eager_kl, s, t)

    run(torch.randn(4, 64), torch.randn(4, 64))
    s, t = torch.ones(n, v), torch.ones(n, v)
    with resident_peak() as peak:
        gradient = run(s, t)
    print(peak.bytes - (0 if gradient is None else gradient.numel() * 4))


def environment() -> dict:
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        revision = commit.stdout.strip()
    except OSError:
        revision = ""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "machine": f"{model}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "kdkernels": kd.__version__,
        "instruction_set": kd.backends()["native"] or kd.instruction_set(),
        "commit": revision,
        "date": datetime.date.today().isoformat(),
    }


def table(case: dict) -> str:
    lines = [f"\n{case['case']}"]
    for name, t in case["variants"].items():
        ratios = [
            f"{t['median_ms'] / case['variants'][floor]['median_ms']:6.2f}x {floor}"
            for floor in case["floors"].values()
        ]
        spread = f"{t['median_ms']:9.1f} ms ({t['min_ms']:.1f}..{t['max_ms']:.1f})"
        lines.append(f"  {name:<24}{spread:<34}{'  '.join(ratios)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small shapes, no compiled peer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="write the raw results as JSON")
    options = parser.parse_args()
    n, v = (64, 32768) if options.small else (512, 131072)
    results: dict = {"environment": environment(), "cases": []}
    print(results["environment"])
    for dtype in (torch.float32, torch.bfloat16):
        results["cases"].append(logits_case(n, v, dtype, options.rounds, not options.small))
        print(table(results["cases"][-1]), flush=True)
    shape = (64, 256, 8192) if options.small else (512, 512, 32768)
    for dtype in (torch.float32, torch.bfloat16):
        results["cases"].append(heads_case(*shape, dtype, options.rounds))
        print(table(results["cases"][-1]), flush=True)
    memory = {kind: peak_memory(kind, n, v) for kind in ("kd", "inplace", "eager")}
    results["peak_bytes_above_inputs_and_gradient"] = memory
    unit = n * v * 4
    print(f"\npeak memory above inputs and gradient, logits [{n}, {v}] fp32")
    for kind, peak in memory.items():
        print(f"  {kind:<10}{peak / 2**20:9.1f} MiB  {peak / unit:6.3f} x [N, V] fp32")
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
