"""``python -m benchmarks.gpu_kernels``: every kernel of every backend once, at the smallest shapes that reach it.

For compute-sanitizer, which makes a kernel a hundred times slower, and as the first thing to run on a card: each loss and
gradient is compared with the fp64 oracle. ``--headline`` runs the four kernels of the headline instead, at a size that
fills a card, for ncu.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, Iterator

import torch

import kdkernels as kd
from kdkernels.commands.verify import DIVERGENCES

ROWS, WIDTH = 3, 16
#: One block a row, several blocks a row; the last one is no multiple of a vector.
VOCABS = (37, 20011)
HEADLINE = (kd.ForwardKL(), kd.ReverseKL(), kd.JSD(0.5), None)


def problems(vocab: int, dtype: torch.dtype) -> Iterator[tuple[str, Any, list[torch.Tensor]]]:
    """(name, function of the leaves, leaves)."""
    made = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    s, t, labels = made(ROWS, vocab), made(ROWS, vocab), torch.tensor([0, -100, vocab - 1])
    head = [made(ROWS, WIDTH), made(vocab, WIDTH) / WIDTH**0.5]
    mixed: dict[str, Any] = dict(hard_weight=0.5, temperature=1.5, label_smoothing=0.1, z_loss=0.01)
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
        target = kd.top_k_target(t, 5, tail=tail)
        yield tail, lambda x, u=target: kd.kl_div(x, u, labels, reduction="none"), [s]
    yield "cross entropy", lambda x: kd.cross_entropy(x, labels), [s]
    yield "both learn", lambda x, y: sum(kd.codistillation_loss(x, y, labels)), [s, t]


def outcome(function: Any, leaves: list[torch.Tensor], wide: bool) -> list[torch.Tensor]:
    leaves = [(leaf.double() if wide else leaf.detach()).requires_grad_() for leaf in leaves]
    value = function(*leaves).sum()
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def every_kernel(device: str, once: bool) -> int:
    """How many were wrong. ``once``: in one dtype, and no oracle."""
    wrong = ran = 0
    names = [name for name in ("native", "triton") if kd.backends()[name] is None]
    for vocab in VOCABS:
        for dtype in (torch.bfloat16,) if once else (torch.bfloat16, torch.float32, torch.float16):
            for name, function, leaves in problems(vocab, dtype):
                expected = None
                if not once:
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
                        print(f"WRONG {backend}, {name}, [{ROWS}, {vocab}] {dtype}: {errors}")
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} runs of {', '.join(names)} on {device}, {wrong} wrong")
    return wrong


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
    parser.add_argument("--once", action="store_true", help="in one dtype, without the oracle")
    parser.add_argument("--headline", action="store_true", help="the headline's kernels at full size")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.headline:
        headline(options.device)
        return 0
    with torch.device(options.device):
        return 1 if every_kernel(options.device, options.once) else 0


if __name__ == "__main__":
    sys.exit(main())
