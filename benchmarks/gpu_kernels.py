"""``python -m benchmarks.gpu_kernels``: every kernel of every backend once, at the smallest shapes that reach it.

The first thing to run on a card: each loss and gradient is compared with the fp64 oracle. compute-sanitizer, which makes a
kernel a hundred times slower, sees ``--plain`` runs without the oracle. ``--headline`` runs the four kernels of the
headline instead, at a size that fills a card, for ncu.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Iterator

import torch

import kdkernels as kd
from kdkernels.commands.verify.scenario import DIVERGENCES

ROWS, WIDTH = 3, 16
#: One block a row, several blocks a row; the last one is no multiple of a vector.
VOCABS = (37, 20011)
HEADLINE = (kd.ForwardKL(), kd.ReverseKL(), kd.JSD(0.5), None)


def problems(vocab: int, dtype: torch.dtype) -> Iterator[tuple[str, Any, list[torch.Tensor]]]:
    """(name, function of the leaves, leaves)."""
    made = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    s, t, labels = made(ROWS, vocab), made(ROWS, vocab), torch.tensor([0, -100, vocab - 1])
    head = [made(ROWS, WIDTH), made(vocab, WIDTH) / WIDTH**0.5]
    mixed: dict[str, Any] = dict(
        hard_weight=0.5, temperature=1.5, label_smoothing=0.1, z_loss=0.01, entropy_weight=-0.3
    )
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "return_stats": True, **mixed}
        yield f"{divergence}", lambda x, o=options: kd.distillation_loss(x, t, labels, **o)[0], [s]
        yield (
            f"{divergence}, vocabulary chunks",
            lambda *x, o=options: kd.distillation_loss(
                kd.LinearHead(*x), t, labels, chunk_bytes=2 * vocab, **o
            )[0],
            head,
        )
    for tail in ("bucket", "conditional", "renormalize", "truncate"):
        target = kd.top_k_target(t.cpu(), 5, tail=tail).to(t.device)  # initcheck minds torch's own kernel
        yield tail, lambda x, u=target: kd.kl_div(x, u, labels, reduction="none"), [s]
    yield "cross entropy", lambda x: kd.cross_entropy(x, labels), [s]
    asked = lambda x, **o: sum(kd.token_log_probs(x, labels, entropy=True, **o)[:2])  # noqa: E731
    yield "log-probabilities", asked, [s]
    yield (
        "log-probabilities, vocabulary chunks",
        lambda *x: asked(kd.LinearHead(*x), chunk_bytes=2 * vocab),
        head,
    )
    yield "both learn", lambda x, y: sum(kd.codistillation_loss(x, y, labels)), [s, t]


def outcome(function: Any, leaves: list[torch.Tensor], wide: bool) -> list[torch.Tensor]:
    leaves = [(leaf.double() if wide else leaf.detach()).requires_grad_() for leaf in leaves]
    value = function(*leaves).sum()
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def every_kernel(options: argparse.Namespace, part: int) -> tuple[int, int]:
    """(how many ran, how many were wrong) of each ``options.processes``-th problem."""
    wrong = ran = 0
    names = options.backend or [name for name in ("native", "triton") if kd.backends()[name] is None]
    dtypes = [getattr(torch, name) for name in options.dtype]
    given = [(v, d, *problem) for v, d in itertools.product(VOCABS, dtypes) for problem in problems(v, d)]
    for vocab, dtype, name, function, leaves in given[part :: options.processes]:
        if options.logits and len(leaves) > 1 and leaves[0].shape != leaves[1].shape:
            continue
        expected = None
        if not options.plain:
            with kd.use_backend("reference"):
                expected = outcome(function, leaves, wide=True)
        for backend in names:
            with kd.use_backend(backend):
                found = outcome(function, leaves, wide=False)
            ran += 1
            errors = [
                ((a.double() - b).norm() / b.norm().clamp(min=1e-6)).item()
                for a, b in zip(found, expected or found)
            ]
            bound = 1e-4 if dtype == torch.float32 else 3e-2
            if not all(error < bound for error in errors):  # NaN too
                wrong += 1
                print(f"WRONG {backend}, {name}, [{ROWS}, {vocab}] {dtype}: {errors}", flush=True)
    return ran, wrong


def in_a_process(options: argparse.Namespace, part: int) -> tuple[int, int]:
    torch.manual_seed(part)
    with torch.device(options.device):
        found = every_kernel(options, part)
    if options.device == "cuda":
        torch.cuda.synchronize()
    return found


def headline(device: str) -> None:
    tokens, vocab = (2048, 151936) if device == "cuda" else (16, 4096)
    s, t = (torch.randn(tokens, vocab, device=device, dtype=torch.bfloat16) for _ in range(2))
    labels = torch.randint(0, vocab, (tokens,), device=device)
    for backend in (name for name in ("native", "triton") if kd.backends()[name] is None):
        for divergence in HEADLINE:
            leaf = s.clone().requires_grad_()
            with kd.use_backend(backend):
                if divergence is None:
                    kd.cross_entropy(leaf, labels).backward()
                else:
                    kd.distillation_loss(leaf, t, divergence=divergence).backward()
            print(backend, divergence, "ran", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--backend", action="append", help="only this one; may be repeated")
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32", "float16"])
    parser.add_argument(
        "--logits", action="store_true", help="no heads: sanitizers do not know cuBLAS's writes"
    )
    parser.add_argument("--plain", action="store_true", help="without the oracle")
    parser.add_argument("--processes", type=int, default=1, help="Triton compiles for seconds a kernel")
    parser.add_argument("--headline", action="store_true", help="the headline's kernels at full size")
    options = parser.parse_args()
    if options.headline:
        torch.manual_seed(0)
        headline(options.device)
        return 0
    if options.processes == 1:
        found = [in_a_process(options, 0)]
    else:
        with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(functools.partial(in_a_process, options), range(options.processes)))
    ran, wrong = (sum(column) for column in zip(*found))
    print(f"{ran} runs on {options.device}, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
