"""A random call of one of the losses, from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd

from . import oracle
from .layouts import LAYOUTS, Laid, expanded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TAILS = ("bucket", "conditional", "renormalize", "truncate")
SHAPES = [(), (1,), (5,), (16,), (2, 3), (3, 1), (1, 4), (2, 1, 3), (0,), (2, 0)]


@dataclass
class Side:
    """What a call is given for one model: laid-out tensors, and what a head does to its logits."""

    tensors: list[Laid]
    head: dict[str, Any] | None = None
    learned: tuple[bool, ...] = (True, True, True)

    def given(self, memories: list[Tensor]) -> Any:
        views = [laid.view(memory) for laid, memory in zip(self.tensors, memories)]
        return views[0] if self.head is None else kd.LinearHead(*views, **self.head)

    def truth(self, vocab: int) -> Any:
        first, *rest = (numbers(laid.view(laid.memory)) for laid in self.tensors)
        rows = first.reshape(-1, first.shape[-1])
        if self.head is None:
            return rows[:, :vocab]
        return oracle.Head(rows, *(t[:vocab] for t in rest), **self.head)


def numbers(t: Tensor):
    """Exactly what a tensor holds, for numpy."""
    return t.detach().double().numpy() if t.is_floating_point() else t.detach().numpy()


@dataclass
class Call:
    """One call: its inputs, and its options as kdkernels and as the oracle take them."""

    kind: str
    leading: tuple[int, ...]
    vocab: int
    student: Side
    teacher: Side | kd.SparseTarget | None
    divergence: tuple
    labels: Laid | None
    token_weights: Laid | None
    ignore_index: int
    mask: Laid | None = None
    class_weights: Laid | None = None
    ids: Laid | None = None  # of token_log_probs, ``[...]`` or ``[..., K]``
    id_weights: Tensor | None = None  # ``[N, K]``, what its log-probabilities are multiplied by
    options: dict[str, Any] = field(default_factory=dict)
    inplace: bool = False
    factor: Tensor = field(default_factory=lambda: torch.ones(()))

    @property
    def tokens(self) -> int:
        return torch.Size(self.leading).numel()

    def live(self) -> Tensor:
        """Which tokens are not masked, by their label or by the mask."""
        live = torch.ones(self.leading, dtype=torch.bool)
        if self.labels is not None:
            live &= self.labels.view(self.labels.memory) != self.ignore_index
        if self.ids is not None:
            live &= (self.asked_ids() != self.ignore_index).any(-1).reshape(self.leading)
        if self.mask is not None:
            live &= self.mask.view(self.mask.memory) != 0
        return live

    def asked_ids(self) -> Tensor:
        """``[N, K]``"""
        given = self.ids.view(self.ids.memory)
        return given.reshape(self.tokens, *given.shape[len(self.leading) :] or (1,))

    def counting(self) -> Tensor:
        """Which of these have a loss: their weight is not 0."""
        counts = self.live()
        if self.token_weights is not None:
            counts &= self.token_weights.view(self.token_weights.memory) != 0
        return counts

    def describe(self) -> str:
        def side(s):
            if s is None or isinstance(s, kd.SparseTarget):
                return repr(s)
            return f"{[(str(t.memory.dtype), t.layout) for t in s.tensors]} {s.head} learned={s.learned}"

        return "\n".join(
            f"  {name}: {value}"
            for name, value in {
                "kind": self.kind,
                "tokens": self.leading,
                "vocabulary": self.vocab,
                "student": side(self.student),
                "teacher": side(self.teacher),
                "divergence": self.divergence,
                "options": self.options,
                "inplace": self.inplace,
                "factor": self.factor,
                "labels": self.labels
                and (self.labels.layout, self.labels.view(self.labels.memory), self.ignore_index),
                "ids": self.ids and (self.ids.layout, self.asked_ids(), self.id_weights, self.ignore_index),
            }.items()
        )


def shipped(divergence: tuple) -> kd.Divergence | tuple[kd.Divergence, ...]:
    name, *parameters = divergence
    if name == "sum":
        return tuple(shipped(one) for _, one in parameters)
    classes = {
        "forward": kd.ForwardKL,
        "reverse": kd.ReverseKL,
        "jsd": kd.JSD,
        "skew": kd.SkewKL,
        "skew_reverse": kd.SkewReverseKL,
        "total_variation": kd.TotalVariation,
        "overlap": kd.Overlap,
        "alpha_beta": kd.AlphaBeta,
        "mixed": kd.Mixed,
    }
    return classes[name](*parameters)


class Draw:
    """Draws a :class:`Call`; every choice comes from the seed."""

    def __init__(self, seed: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
        self.random, self.dtypes = random.Random(seed), dtypes
        self.numbers = torch.Generator().manual_seed(seed)

    def one(self, *choices):
        return self.random.choice(choices)

    def often(self, usual, *rare):
        return usual if self.random.random() < 0.6 else self.one(*rare)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.numbers, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.numbers, dtype=torch.float64)

    def laid(self, values: Tensor, unused: float = torch.nan) -> Laid:
        return Laid.out(values, self.often("contiguous", *LAYOUTS), unused)

    def given(self, values: Tensor, unused: float = torch.nan) -> Tensor:
        laid = self.laid(values, unused)
        return laid.view(laid.memory)

    def call(self) -> Call:
        kind = self.often("distillation", "cross_entropy", "codistillation", "several", "log_probs")
        leading, vocab = self.one(*SHAPES), self.often(self.random.randint(2, 70), 1, 129, 500, 2049)
        if kind == "log_probs":
            return self.log_probs(leading, vocab)
        hard = kind == "cross_entropy" or (kind != "several" and self.one(True, False))
        labels, ignore_index = (
            self.labels(leading, vocab)
            if hard or kind == "codistillation" or self.one(0, 1)
            else (None, -100)
        )
        cut = self.often(0, 1, 7)
        z = self.logits(leading, vocab)
        student = self.side(z, cut, self.one(*self.dtypes))
        divergence = self.divergence()
        if kind == "several":
            divergence = (
                "sum",
                (1.0, divergence),
                *((w, self.divergence()) for w in self.often([0.5], [], [2.0, 0.25])),
            )
        teacher: Any = None
        if kind != "cross_entropy":
            near = self.often(self.logits(leading, vocab), z + 0.01 * self.normal(*z.shape), z)
            if kind == "distillation" and self.often(False, True):
                teacher, divergence = self.target(leading, near, divergence)
            else:
                teacher = self.side(near, self.one(0, cut and 3), self.one(*self.dtypes))
        call = Call(kind, leading, vocab, student, teacher, divergence, labels, None, ignore_index)
        if self.often(False, True):
            call.token_weights = self.laid(self.weights(leading))
        if self.often(False, True):
            kept = self.uniform(*leading) < self.often(0.7, 0.0, 1.0)
            call.mask = self.laid(kept.to(self.one(torch.bool, torch.int64)), unused=0)
        if kind == "cross_entropy" and self.often(False, True):
            call.class_weights = self.laid(self.uniform(vocab).to(torch.float32))
        if self.often(False, True):
            self.spoil(call)
        self.losses(call, hard)
        self.how(call, cut)
        return call

    def log_probs(self, leading: tuple[int, ...], vocab: int) -> Call:
        """Of token_log_probs; its loss is -sum of weights times log-probabilities + a weight times the entropy."""
        cut, slots = self.often(0, 1, 7), self.often(1, 2, 5)
        student = self.side(self.logits(leading, vocab), cut, self.one(*self.dtypes))
        ignore_index = self.often(-100, vocab, -1)
        ids = torch.randint(0, vocab, (*leading, slots), generator=self.numbers)
        ids = torch.where(self.uniform(*leading, slots) < self.often(0.2, 0.0, 1.0), -1, ids)
        ids[self.uniform(*leading) < self.often(0.3, 0.0, 1.0)] = ignore_index
        ids = ids[..., 0] if slots == 1 and self.one(True, False) else ids
        call = Call("log_probs", leading, vocab, student, None, ("none",), None, None, ignore_index)
        call.ids = self.laid(ids, unused=10**9)
        weights = (8 * self.uniform(call.tokens, slots)).round() / 8
        call.id_weights = weights * (self.uniform(call.tokens, slots) < 0.8)
        if self.often(False, True):
            self.spoil(call)
        call.options = {
            "temperature": self.often(1.0, 2.0, 0.5),
            "entropy_weight": self.often(0.5, 0.0, 2.0),
            "reduction": "none",
        }
        self.how(call, cut)
        call.inplace = False  # its gradient is written in the backward, of which a call has two here
        return call

    def spoil(self, call: Call) -> None:
        """NaN or infinities in what a model says about tokens that do not count."""
        sides = [side for side in (call.student, call.teacher) if isinstance(side, Side)]
        for side in sides:
            rows = side.tensors[0].view(side.tensors[0].memory)
            rows[~call.counting()] = self.one(torch.nan, torch.inf, -torch.inf)

    def logits(self, leading: tuple[int, ...], vocab: int) -> Tensor:
        z = self.normal(*leading, vocab) * self.often(2.0, 0.05, 8.0, 30.0) + self.often(0.0, 100.0, -1000.0)
        z = z.round() if self.often(False, True) else z
        if self.often(False, True):
            z[..., vocab - vocab // 5 :] = -torch.inf
        return z

    def side(self, z: Tensor, cut: int, dtype: torch.dtype) -> Side:
        """A model whose logits are ``z``, or nearly so, with ``cut`` columns that are not to be looked at."""
        z = torch.cat([z, z.new_full((*z.shape[:-1], cut), torch.nan)], -1)
        if self.one(True, False):
            return Side([self.laid(z.to(dtype))])
        width, leading, vocab = self.one(1, 4, 16, 33), z.shape[:-1], z.shape[-1]
        weight, spread = self.normal(vocab, width) / width**0.5, self.often(2.0, 0.1, 6.0)
        bias = [self.laid(self.normal(vocab).to(dtype))] if self.one(True, False) else []
        head = {"logit_scale": self.often(1.0, 0.25, -2.0), "softcap": self.often(None, 5.0, 30.0)}
        tensors = [
            self.laid((self.normal(*leading, width) * spread).to(dtype)),
            self.laid(weight.to(dtype)),
            *bias,
        ]
        return Side(
            tensors,
            head,
            self.often((True,) * 3, (True, False, False), (False, True, False), (False, False, True)),
        )

    def labels(self, leading: tuple[int, ...], vocab: int) -> tuple[Laid, int]:
        ignore_index = self.often(-100, -1, 0, vocab)
        labels = torch.randint(0, vocab, leading, generator=self.numbers)
        masked = self.uniform(*leading) < self.often(0.3, 0.0, 1.0)
        return self.laid(torch.where(masked, ignore_index, labels), unused=10**9), ignore_index

    def weights(self, leading: tuple[int, ...]) -> Tensor:
        weights = self.often(self.uniform(*leading), self.normal(*leading), self.uniform(*leading).round())
        weights = expanded(weights, 0) if leading and self.often(False, True) else weights
        return weights.to(self.often(torch.float32, *DTYPES))

    def divergence(self) -> tuple:
        share = self.often(0.5, 0.1, 0.9, 0.0, 1e-3)
        return self.one(
            ("forward",),
            ("reverse",),
            ("jsd", self.often(share, 1.0)),
            ("skew", share),
            ("skew_reverse", share, self.one(True, False)),
            ("total_variation",),
            ("overlap",),
            ("mixed", self.often(share, 1.0)),
            (
                "alpha_beta",
                *self.one(
                    (0.2, 0.7),
                    (0.5, 0.5),
                    (1.0, 0.0),
                    (0.0, 1.0),
                    (0.0, 0.6),
                    (0.6, 0.0),
                    (0.4, -0.4),
                    (0.0, 0.0),
                    (1.2, -0.3),
                ),
            ),
        )

    def target(self, leading: tuple[int, ...], z: Tensor, divergence: tuple) -> tuple[kd.SparseTarget, tuple]:
        vocab = z.shape[-1]
        tail = self.one(*TAILS) if vocab > 1 else "conditional"
        slots = min(self.often(self.random.randint(1, 8), 1, vocab), vocab, 64)
        p = z.softmax(-1)
        # Of a bucket whose rest is only rounding the library has its own word; that is not fuzzed here.
        ids = p.topk(slots - (tail == "bucket" and slots == vocab), -1).indices
        t = p.gather(-1, ids) * (0.9 if tail == "bucket" else self.often(1.0, 0.5, 3.0))
        if self.one(True, False) and ids.shape[-1] > 1:  # the same id twice
            ids = ids.clone()
            ids[..., -1] = ids[..., 0]
        order = torch.randperm(ids.shape[-1], generator=self.numbers)
        ids, t = ids[..., order], t[..., order].to(self.often(torch.float32, *DTYPES))
        ids = torch.where(self.uniform(*ids.shape) < self.often(0.0, 0.3, 1.0), -1, ids)
        mask = self.given(self.uniform(*ids.shape) < 0.8, False) if self.often(False, True) else None
        linear = self.one(True, False)
        values = {"weights" if linear else "logprobs": self.given(t if linear else t.log())}
        target = kd.SparseTarget(self.given(ids, 10**9), mask=mask, tail=tail, **values)
        return target, ("forward",) if tail in ("truncate", "renormalize") else divergence

    def losses(self, call: Call, hard: bool) -> None:
        options = call.options
        if call.kind != "cross_entropy":
            options |= {
                "temperature": self.often(1.0, 2.0, 0.5, 3.3),
                "temperature_squared": self.one(True, False),
                "soft_weight": self.often(1.0, 0.3, 0.0),
                "hard_weight": self.often(1.0, 0.25) if hard else 0.0,
            }
        if call.kind == "several":
            options |= {"soft_weight": self.often(1.0, 0.3), "reduction": "none"}
            return
        conditional = isinstance(call.teacher, kd.SparseTarget) and call.teacher.tail == "conditional"
        if call.kind == "distillation" and (hard or not conditional):
            options["entropy_weight"] = self.often(0.0, 0.5, -0.25)
        if hard and call.kind != "codistillation":
            smoothing = self.often(0.0, 0.1, 1.0) if call.class_weights is None else 0.0
            options |= {"label_smoothing": smoothing, "z_loss": self.often(0.0, 1e-4)}
        options["reduction"] = self.often("mean", "sum", "none", "batchmean")
        if options["reduction"] in ("sum", "mean") and self.often(False, True):
            options["num_items"] = self.one(3, 2.5, torch.tensor(7), torch.tensor(4.0))

    def how(self, call: Call, cut: int) -> None:
        options, per_token = call.options, call.options["reduction"] == "none"
        options["chunk_bytes"] = self.often(None, 1, 500, 5000, 100_000)
        if cut:
            options["vocab_size"] = call.vocab
        inplace = call.kind not in ("codistillation", "several") and call.student.head is None
        call.inplace = inplace and self.often(False, True)
        call.factor = (
            self.normal(*call.leading)
            if per_token and self.one(True, False)
            else torch.tensor(self.often(1.0, -0.5, 3.0, 0.0), dtype=torch.float64)
        )
