"""What is measured: the suites are data, one :class:`Case` a line.

A new case is a line in a suite; a new loss is a line in :data:`LOSSES` and its variants.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch

import kdkernels as kd
from benchmarks import real

#: Loss name -> its divergence; None where there is no soft term.
LOSSES: dict[str, kd.Divergence | None] = {
    "kl": kd.ForwardKL(),
    "rkl": kd.ReverseKL(),
    "jsd": kd.JSD(0.5),
    "ce": None,
    "codistill": kd.ForwardKL(),
    "kl conditional": kd.ForwardKL(),  # a sparse teacher's stored entries alone, both sides rescaled
}
SOFT = ("kl", "rkl", "jsd")
#: Token log-probabilities, of the label or of so many ids, and the entropy: what a policy's loss is made of.
POLICY = ("log-probs", "log-probs + entropy", "log-probs of 20")
LOSSES |= dict.fromkeys(POLICY)

#: Multiplications of a bf16 product that take seconds on a processor that has none of bf16.
MOST_WITHOUT_BF16 = 10**9


@dataclass(frozen=True)
class Case:
    """One set of shapes, and the losses that are timed on it in one round robin.

    ``width`` 0 means that logits are given; otherwise hidden states of this width and an lm_head,
    ``teacher_width`` for the teacher (None: the same). ``masked`` is the share of tokens whose label
    is -100. ``top_k`` > 0: of the teacher only its so many most probable entries are known, and the
    rest is one bucket. ``compiled`` are the losses whose plain formula is also timed under torch.compile, which
    costs a compilation each. ``plain`` are those whose plain formula is timed at all (None: every one): at the largest
    sizes it takes seconds a step. ``plot`` names the curves that this case is a point of, "tokens" or "vocabulary";
    a case that is there for its curves only is no ``headline``, and not in README. ``peers`` False
    leaves the other libraries out. ``spectrum`` is what the logits are like where hidden states make them: "random", or
    "real", those of :mod:`benchmarks.real`, whose width and vocabulary the case then has, or "peaked": random heads that
    know how frequent each token is. In the latter two most columns hardly matter, as with a language model, and our losses
    are timed with a gradient_tolerance too.
    """

    tokens: int
    vocab: int
    dtype: str = "float32"
    losses: tuple[str, ...] = ("kl",)
    width: int = 0
    teacher_width: int | None = None
    frozen_head: bool = False
    masked: float = 0.0
    top_k: int = 0
    compiled: tuple[str, ...] = ()
    plain: tuple[str, ...] | None = None
    plot: tuple[str, ...] = ()
    headline: bool = True
    peers: bool = True
    spectrum: Literal["random", "real", "peaked"] = "random"

    def __post_init__(self) -> None:
        unknown = set(self.losses) - set(LOSSES)
        if unknown:
            raise ValueError(f"unknown losses {sorted(unknown)}; there are {', '.join(LOSSES)}")

    @property
    def name(self) -> str:
        kind = f"[{self.tokens}, {self.vocab}]"
        if self.width:
            kind = f"[{self.tokens}, {self.width}] -> {self.vocab}"
        extras = [f"teacher {self.teacher_width}"] if self.teacher_width else []
        extras += ["frozen head"] if self.frozen_head else []
        extras += [f"{self.masked:.0%} masked"] if self.masked else []
        extras += [f"top {self.top_k}"] if self.top_k else []
        extras += [self.spectrum] if self.spectrum != "random" else []
        extras += ["co-distillation"] if "codistill" in self.losses else []
        return ", ".join([f"{'hidden' if self.width else 'logits'} {kind} {self.dtype}", *extras])

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def live_tokens(self) -> int:
        return self.tokens - round(self.masked * self.tokens)

    def can_run(self, device: str) -> bool:
        """False while nobody has made the real model's hidden states, and where a CPU without bf16 arithmetic would take
        minutes for each product."""
        large = self.tokens * self.width * self.vocab > MOST_WITHOUT_BF16
        slow = large and device == "cpu" and self.dtype == "bfloat16"
        there = self.spectrum != "real" or real.FIXTURE.exists()
        return there and not (slow and not torch.ops.mkldnn._is_mkldnn_bf16_supported())

    @property
    def teacher_trains(self) -> bool:
        return "codistill" in self.losses

    def shrunk(self, *, tokens: int, vocab: int | None = None, width: int | None = None) -> Case:
        """The same case at no more than these sizes: for errors, and for tests. A real model's lm_head has one size."""
        less = lambda size, most: size if most is None else min(size, most)  # noqa: E731
        teacher = None if self.teacher_width is None else less(self.teacher_width, width and width + 16)
        return replace(
            self,
            tokens=less(self.tokens, tokens),
            vocab=less(self.vocab, vocab),
            width=less(self.width, width),
            teacher_width=teacher,
            top_k=less(self.top_k, vocab and vocab // 8),
            spectrum="peaked" if self.spectrum == "real" and (vocab or width) else self.spectrum,
        )


def _both(case: Case) -> list[Case]:
    return [replace(case, dtype=dtype) for dtype in ("float32", "bfloat16")]


def _over_tokens(case: Case, sizes: tuple[int, ...]) -> list[Case]:
    return [replace(case, tokens=n, plot=("tokens",), headline=False) for n in sizes]


def _over_vocab(case: Case, sizes: tuple[int, ...]) -> list[Case]:
    return [replace(case, vocab=v, plot=("vocabulary",), headline=False) for v in sizes]


_ALL = (*SOFT, "ce")
_HIDDEN = Case(256, 32768, width=512)
_REAL = Case(1024, real.VOCAB, width=real.WIDTH, losses=("kl", "ce"), plain=(), peers=False, spectrum="real")
_GPU = Case(8192, 128256, "bfloat16")
_GPU_HIDDEN = replace(_GPU, width=4096)
_ON_CURVES = {"plot": ("tokens", "vocabulary")}

#: Suite -> cases, the most telling first: a suite that runs out of time loses its tail.
SUITES: dict[str, list[Case]] = {
    "small": [
        *_both(Case(64, 32768, losses=_ALL)),
        *_both(Case(64, 8192, width=256, losses=("kl", "jsd", "ce"))),
        Case(64, 8192, width=256, losses=("codistill",), peers=False),
        Case(64, 32768, top_k=64),
        Case(128, 8192, width=256, frozen_head=True, losses=POLICY, peers=False),
    ],
    "cpu": [
        Case(
            512,
            131072,
            losses=(*_ALL, "log-probs + entropy"),
            compiled=("kl",),
            plain=("kl", "jsd"),
            peers=False,
        ),
        Case(512, 131072, "bfloat16", losses=SOFT, compiled=("kl",), plain=("kl",), peers=False),
        replace(_HIDDEN, tokens=512, losses=("kl", *POLICY), plain=(), peers=False),
        _REAL,
        replace(_HIDDEN, losses=("kl", "jsd", "ce", "log-probs + entropy")),
        *_over_tokens(Case(0, 32768, peers=False), (64, 512, 2048)),
        *_over_tokens(Case(0, 32768, width=256, peers=False), (64, 256, 512)),
        *_over_vocab(Case(256, 0, peers=False), (8192, 32768, 131072)),
        *_over_vocab(Case(128, 0, width=256, peers=False), (8192, 32768, 131072)),
        replace(_HIDDEN, frozen_head=True, losses=("kl", *POLICY), plain=("kl",), peers=False),
        replace(_HIDDEN, masked=0.5, peers=False),
        replace(_HIDDEN, losses=("codistill",), peers=False),
        replace(_HIDDEN, teacher_width=768, peers=False),
        Case(512, 32768, top_k=64, losses=("kl", "kl conditional")),
        replace(_HIDDEN, top_k=64, losses=("kl", "kl conditional")),
        Case(128, 131072, losses=_ALL),
        replace(_HIDDEN, dtype="bfloat16", plain=(), peers=False),
        replace(_REAL, dtype="bfloat16"),
    ],
    "gpu": [
        replace(_GPU, vocab=151936, losses=_ALL, compiled=("kl",), plot=("vocabulary",)),
        replace(_GPU_HIDDEN, losses=("kl", "jsd", "ce"), **_ON_CURVES),
        replace(_GPU, losses=_ALL, peers=False, **_ON_CURVES),
        replace(_GPU, vocab=256000, losses=_ALL, peers=False, plot=("vocabulary",)),
        replace(_GPU_HIDDEN, losses=("kl", "ce"), spectrum="peaked", peers=False),
        replace(_GPU_HIDDEN, frozen_head=True, losses=("kl", *POLICY), peers=False),
        replace(_GPU_HIDDEN, masked=0.5, losses=("kl", "ce"), peers=False),
        replace(_GPU_HIDDEN, losses=("codistill",), peers=False),
        replace(_GPU_HIDDEN, width=2048, teacher_width=4096, peers=False),
        *(replace(_GPU, top_k=k, losses=("kl", "kl conditional"), peers=False) for k in (64, 256)),
        replace(_GPU_HIDDEN, top_k=64, losses=("kl", "kl conditional"), peers=False),
        replace(_GPU, dtype="float32", losses=("kl", "jsd", "ce"), peers=False),
        *_over_tokens(replace(_GPU, peers=False), (1024, 2048, 16384)),
        *_over_tokens(_GPU_HIDDEN, (1024, 2048, 16384)),
        *_over_vocab(replace(_GPU, peers=False), (32768,)),
        *_over_vocab(_GPU_HIDDEN, (32768, 256000)),
    ],
}


_SHAPE = re.compile(r"(?:logits (\d+)|hidden (\d+) (\d+)) (\d+)(?: (float32|bfloat16|float16))?")


def chosen(suite: str, text: str) -> list[Case]:
    """The suite's cases with ``text`` in their name; or the case that it is the shape of; or none."""
    if found := [case for case in SUITES[suite] if text in case.name]:
        return found
    if (shape := _SHAPE.fullmatch(text)) is None:
        return []
    tokens, hidden_tokens, width, vocab, dtype = shape.groups()
    return [
        Case(int(tokens or hidden_tokens), int(vocab), dtype or "float32", losses=_ALL, width=int(width or 0))
    ]
