"""``python -m benchmarks --suite shards``: losses whose vocabulary two gloo processes share out, beside the formulas
of others.

Each loss is measured on rank 0, forward and backward: milliseconds (the median of the rounds), collectives and the
bytes that a rank gives to them, and the peak above inputs and gradients in bytes a logit of this rank. The formulas
are written from what each project computes and how often its ranks meet; none of their code is here. Every
variant's gradient is compared with that of the whole vocabulary first.

``python -m benchmarks.shards [RESULT.json]`` makes a result the committed one, and fills docs/distributed.md from that.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import kdkernels as kd
from benchmarks import pages
from benchmarks.machine import describe
from benchmarks.memory import give_back_free_memory, resident_peak
from kdkernels.core import exchange

RANKS = 2
COMMITTED = Path(__file__).parent / "results" / "shards.json"


@dataclass(frozen=True)
class Size:
    """``width`` 0: logits are given; else hidden states of both models."""

    tokens: int
    vocab: int
    width: int = 0


SIZES = [Size(512, 32_000), Size(512, 151_936), Size(512, 32_000, 1024)]


class _Sum(torch.autograd.Function):
    """A sum over the group of which every rank uses its part: its gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> Tensor:
        arriving = arriving.contiguous().clone()
        dist.all_reduce(arriving)
        return arriving


class _Joined(torch.autograd.Function):
    """A sum over the group that every rank takes as the whole: its gradient is the rank's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> Tensor:
        return arriving


def _max(z: Tensor) -> Tensor:
    top = z.detach().amax(-1, keepdim=True)
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    return top


def _log_softmax(z: Tensor) -> Tensor:
    below = z.float() - _max(z.float())
    return below - _Sum.apply(below.exp().sum(-1, keepdim=True)).log()


def by_autograd(student: Tensor, teacher: Tensor, labels: Tensor, start: int) -> Tensor:
    """ModelOpt's and Automodel's: both log-softmaxes in fp32, and autograd."""
    with torch.no_grad():
        log_p = _log_softmax(teacher)
    rows = (log_p.exp() * (log_p - _log_softmax(student))).sum(-1)
    return _Joined.apply(rows).mean()


class _Analytic(torch.autograd.Function):
    """NeMo-RL's and Fast-LLM's: five all_reduces, q - p kept for the backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        below = [z.float() - _max(z.float()) for z in (student, teacher)]
        exps = [z.exp() for z in below]
        sums = [e.sum(-1, keepdim=True) for e in exps]
        for total in sums:
            dist.all_reduce(total)
        q, p = (e / total for e, total in zip(exps, sums))
        rows = (p * (below[1] - sums[1].log() - below[0] + sums[0].log())).sum(-1)
        dist.all_reduce(rows)
        ctx.save_for_backward(q.sub_(p))
        ctx.dtype = student.dtype
        return rows.mean()

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (arriving / len(difference))).to(ctx.dtype), None


def analytic(student: Tensor, teacher: Tensor, labels: Tensor, start: int) -> Tensor:
    return _Analytic.apply(student, teacher)


class _CrossEntropy(torch.autograd.Function):
    """Megatron's: the maximum, the label's logit and the sum, each by an all_reduce; an fp32 softmax is kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, labels: Tensor, start: int) -> Tensor:
        below = student.float() - _max(student.float())
        local = labels - start
        inside = (local >= 0) & (local < student.shape[1])
        local = local.clamp(0, student.shape[1] - 1)
        label = torch.where(inside, below.gather(1, local[:, None])[:, 0], 0.0)
        dist.all_reduce(label)
        exps = below.exp_()
        total = exps.sum(-1)
        dist.all_reduce(total)
        ctx.save_for_backward(exps.div_(total[:, None]), local, inside)
        ctx.dtype = student.dtype
        return (total.log() - label).mean()

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, inside = ctx.saved_tensors
        gradient = softmax.clone()
        gradient[torch.arange(len(local)), local] -= inside.float()
        return (gradient * (arriving / len(local))).to(ctx.dtype), None, None


def cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor, start: int) -> Tensor:
    return _CrossEntropy.apply(student, labels, start)


#: (loss, variant): of given logits. Ours are made where the Shard is.
FORMULAS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("kl", "ModelOpt, Automodel"): by_autograd,
    ("kl", "NeMo-RL, Fast-LLM"): analytic,
    ("ce", "Megatron"): cross_entropy,
}


def _ours(loss: str) -> Callable[..., Tensor]:
    def kl(student: Any, teacher: Any, labels: Tensor, start: int) -> Tensor:
        return kd.kl_div(student, teacher)

    def ce(student: Any, teacher: Any, labels: Tensor, start: int) -> Tensor:
        return kd.cross_entropy(student, labels)

    return {"kl": kl, "ce": ce}[loss]


class _Counted:
    """The collectives that are started meanwhile, and the bytes that this rank gives to them."""

    def __enter__(self) -> _Counted:
        self.calls, self.bytes = 0, 0
        self.kept = dist.all_reduce, exchange.all_gather
        dist.all_reduce = self._noting(dist.all_reduce, 0)
        exchange.all_gather = self._noting(exchange.all_gather, 1)
        return self

    def _noting(self, function: Callable, at: int) -> Callable:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.bytes += args[at].numel() * args[at].element_size()
            return function(*args, **kwargs)

        return noted

    def __exit__(self, *error: Any) -> None:
        dist.all_reduce, exchange.all_gather = self.kept


def _measured(run: Callable[[], tuple[Tensor, ...]], logits: int, rounds: int) -> dict[str, Any]:
    run()  # once for what is loaded and asked for the first time
    with _Counted() as counted:
        run()
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        before = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - before)
    give_back_free_memory()
    dist.barrier()
    with resident_peak() as peak:
        kept = run()
    above = max(peak.bytes - sum(g.numel() * g.element_size() for g in kept), 0)
    return {
        "ms": statistics.median(seconds) * 1e3,
        "collectives": counted.calls,
        "bytes": counted.bytes,
        "peak_bytes_per_logit": above / logits,
    }


def _logits(size: Size, rank: int, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    width = size.vocab // RANKS
    start, shard, rows = rank * width, kd.Shard(), []
    whole = [torch.randn(size.tokens, size.vocab) * 3 for _ in range(2)]
    labels = torch.randint(0, size.vocab, (size.tokens,))
    student, teacher = (z[:, start : start + width].clone() for z in whole)
    student.requires_grad_()
    for loss in ("kl", "ce"):
        leaf = whole[0].clone().requires_grad_()
        value = _ours(loss)(leaf, whole[1], labels, 0)
        (truth,) = torch.autograd.grad(value, leaf)
        sides = kd.ShardedLogits(student, shard), kd.ShardedLogits(teacher, shard)
        variants = [("kdkernels", _ours(loss), sides)]
        variants += [(name, f, (student, teacher)) for (of, name), f in FORMULAS.items() if of == loss]
        for name, function, given in variants:

            def run(function: Callable = function, given: tuple = given) -> tuple[Tensor, ...]:
                return torch.autograd.grad(function(*given, labels, start), student)

            error = (run()[0] - truth[:, start : start + width]).norm() / truth[
                :, start : start + width
            ].norm()
            if not error < 1e-4:
                raise AssertionError(f"{name}'s {loss} has a gradient that is {error:.2g} off")
            made = _measured(run, student.numel(), rounds)
            rows.append(
                {"size": asdict(size), "loss": loss, "variant": name, "gradient_error": float(error), **made}
            )
    return rows


def _hidden(size: Size, rank: int, rounds: int) -> list[dict[str, Any]]:
    """Ours, and the floor: one rank's products and the bare collectives."""
    torch.manual_seed(0)
    width, shard = size.vocab // RANKS, kd.Shard()
    hidden = [torch.randn(size.tokens, size.width) for _ in range(2)]
    weights = [torch.randn(width, size.width) / size.width**0.5 for _ in range(2)]
    leaves = [hidden[0].requires_grad_(), weights[0].requires_grad_()]
    heads = [kd.LinearHead(h, w, shard=shard) for h, w in zip(hidden, weights)]
    states = torch.zeros(size.tokens + 1, 5, dtype=torch.float64)
    heard = states.new_empty(RANKS * (size.tokens + 1), 5)

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kd.kl_div(*heads), leaves)

    @torch.no_grad()
    def floor() -> tuple[Tensor, ...]:
        tile, _ = (h @ w.t() for h, w in zip(hidden, weights))
        exchange.all_gather(heard, states)
        dh = tile @ weights[0]
        dist.all_reduce(dh)
        return dh, tile.t() @ hidden[0]

    return [
        {
            "size": asdict(size),
            "loss": "kl of hidden states",
            "variant": name,
            **_measured(run, size.tokens * width, rounds),
        }
        for name, run in (("kdkernels", ours), ("products and collectives", floor))
    ]


def _on_rank(rank: int, folder: str, sizes: list[Size], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(minutes=5),
    )
    rows = [row for size in sizes for row in (_hidden if size.width else _logits)(size, rank, rounds)]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def run(sizes: list[Size], rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_on_rank, (folder, sizes, rounds), RANKS)
        return json.loads((Path(folder) / "rows.json").read_text())


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| tokens x vocabulary | loss | variant | ms | collectives | bytes a token | peak above inputs and gradients, bytes a logit of a rank |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        size = row["size"]
        each = row["bytes"] / size["tokens"]
        lines.append(
            f"| {size['tokens']} x {size['vocab']} | {row['loss']} | {row['variant']} | {row['ms']:.1f} | "
            f"{row['collectives']} | {each:.0f} | {row['peak_bytes_per_logit']:.2f} |"
        )
    return "\n".join(lines)


def page(result: dict[str, Any]) -> str:
    """What docs/distributed.md says of a result: the goals' ratios, the table, the machine."""
    said = []
    for size in dict.fromkeys(Size(**row["size"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if Size(**row["size"]) == size and row["loss"] != "ce"]
        (ours,), others = (
            [r for r in rows if (r["variant"] == "kdkernels") is mine] for mine in (True, False)
        )
        fastest = min(others, key=lambda row: row["ms"])
        what = f"{ours['loss']} of {size.tokens} x {size.vocab} takes {ours['ms'] / fastest['ms']:.2f} times as long as "
        if size.width:
            what += fastest["variant"]
        else:
            least = min(row["peak_bytes_per_logit"] for row in others)
            what += f"the formula of {fastest['variant']}, and {ours['peak_bytes_per_logit']:.2f} bytes a logit above inputs and gradients, the others at least {least:.0f}"
        said.append(what)
    machine = result["machine"]
    where = f"Two processes of one thread each on {machine['cpu'].split(',')[0]}, torch {machine['versions']['torch']}, {machine['date'][:10]}."
    return f"Here {'; '.join(said)}.\n\n{table(result['rows'])}\n\n{where}"


def measure(folder: Path, rounds: int, sizes: list[Size] = SIZES) -> int:
    """Measures, prints the table and writes it and the numbers into ``folder``."""
    rows = run(sizes, rounds)
    result = {"suite": "shards", "ranks": RANKS, "machine": describe("cpu"), "rows": rows}
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    (folder / "tables.md").write_text(table(rows) + "\n")
    print(table(rows))
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards")
    parser.add_argument("result", type=Path, nargs="?", help="default: what is committed already")
    result = json.loads((parser.parse_args().result or COMMITTED).read_text())
    COMMITTED.write_text(json.dumps(result, indent=1) + "\n")
    pages.fill("shards", page(result))


if __name__ == "__main__":
    main()
