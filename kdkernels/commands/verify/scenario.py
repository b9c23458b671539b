"""What is verified, as data: problems, options, and the function that is called with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...divergences import (
    JSD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    Mixed,
    Overlap,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)
from ...log_probs import token_log_probs
from ...losses import distillation_loss
from ...testing import ROWS, Problem, plain_loss

#: Every kind, and every branch of those that have several; the tests take theirs from here.
DIVERGENCES: tuple[Divergence, ...] = (
    ForwardKL(),
    ReverseKL(),
    JSD(0.5),
    JSD(0.1),
    SkewKL(0.1),
    SkewReverseKL(0.1),
    SkewReverseKL(0.3, detach_mixture=True),
    TotalVariation(),
    Overlap(),
    AlphaBeta(0.2, 0.7),
    AlphaBeta(0.5, 0.0),
    AlphaBeta(0.0, 0.5),
    AlphaBeta(0.5, -0.5),
    AlphaBeta(0.0, 0.0),
    Mixed(0.4),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMS = (("logits", "logits"), ("head", "head"), ("head", "logits"), ("logits", "head"))
VOCABS = (1, 2, 31, 128, 2049, 32768, 131072, 262144)
#: Budgets of the logit tiles that make token chunks and vocabulary chunks of the problem below.
CHUNKS = (16_000, 240_000)
_TERMS = dict(temperature=2.0, hard_weight=0.5)
_TEMPERED = dict(temperature=2.0)
#: Beside a divergence in one pass.
_OTHERS: tuple[Divergence, ...] = (ForwardKL(), Overlap())


def _several(
    student: Any, teacher: Any, labels: Tensor | None, *, divergence: Divergence, **options
) -> Tensor:
    """Token losses ``[D, ...]`` of a divergence and of others, from one pass."""
    each = divergence, *_OTHERS
    return torch.stack(
        distillation_loss(student, teacher, labels, divergence=each, reduction="none", **options)
    )


def _plain_several(s: Tensor, t: Tensor, labels: Tensor | None, divergence: Divergence, **options) -> Tensor:
    each = divergence, *_OTHERS
    return torch.stack([plain_loss(s, t, labels, one, reduction="none", **options) for one in each])


def _weighted(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """Each token's numbers, with other weights for each, so that each has a gradient of its own."""
    return torch.cat([-log_probs, 0.3 * entropy[..., None]], -1)


def _ids(labels: Tensor) -> Tensor:
    """Two ids a token, or none where it is masked."""
    return torch.stack([labels, torch.where(labels >= 0, labels // 2, labels)], -1)


def _log_probs(student: Any, teacher: Any, labels: Tensor, *, divergence: None, **options) -> Tensor:
    of = token_log_probs(student, _ids(labels), entropy=True, **options)
    assert of.entropy is not None
    return _weighted(of.log_probs, of.entropy)


def _plain_log_probs(
    s: Tensor, t: Tensor, labels: Tensor, divergence: None, *, temperature: float = 1.0
) -> Tensor:
    log_q, ids = (s / temperature).log_softmax(-1), _ids(labels)
    entropy = -(log_q.exp() * log_q.masked_fill(log_q.isneginf(), 0.0)).sum(-1)
    asked = log_q.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    return _weighted(asked, entropy.masked_fill(labels < 0, 0.0))


class Function(NamedTuple):
    """What is called with a problem's student, teacher and labels, and the plain formula of it."""

    ours: Callable[..., Any]
    plain: Callable[..., Tensor]


FUNCTIONS = {
    "distillation_loss": Function(distillation_loss, plain_loss),
    "several divergences": Function(_several, _plain_several),
    "token_log_probs": Function(_log_probs, _plain_log_probs),
}


@dataclass(frozen=True)
class Scenario:
    """One problem and the options of its loss; ``label`` says in the report what is special. ``divergence`` None: it
    is a function that has none."""

    label: str
    divergence: Divergence | None
    dtype: torch.dtype
    form: tuple[str, str] = ("logits", "logits")
    rows: str = "random"
    shape: tuple[int, ...] = (4, 16)
    vocab: int = 257
    options: dict[str, Any] = field(default_factory=dict)
    function: str = "distillation_loss"

    @property
    def about(self) -> str:
        """The divergence, or the function where it has none."""
        return self.function if self.divergence is None else str(self.divergence)

    def problem(self, device: str) -> Problem:
        torch.manual_seed(0)
        return Problem(
            student=self.form[0],
            teacher=self.form[1],
            dtype=self.dtype,
            rows=self.rows,
            shape=self.shape,
            vocab=self.vocab,
            device=device,
        )


def scenarios() -> Iterator[Scenario]:
    """Everything that is verified, as data. The problems in most use come first, each for every divergence."""
    yield from sorted(_all_scenarios(), key=_rank)


def _rank(scenario: Scenario) -> int:
    wide = 2 * (scenario.vocab > 10_000)
    return DTYPES.index(scenario.dtype) + FORMS.index(scenario.form) + wide


def _all_scenarios() -> Iterator[Scenario]:
    for rows, dtype, form in itertools.product(ROWS, DTYPES, FORMS):
        if rows != "equal" or form[0] == form[1]:
            yield from (Scenario(rows, d, dtype, form, rows, options=_terms(rows)) for d in DIVERGENCES)
    for chunk_bytes, dtype in itertools.product(CHUNKS, DTYPES):
        options = {**_TERMS, "chunk_bytes": chunk_bytes}
        for divergence in DIVERGENCES:
            yield Scenario("chunked", divergence, dtype, ("head", "head"), vocab=700, options=options)
    for vocab, dtype in itertools.product(VOCABS, (torch.float32, torch.bfloat16)):
        shape = (64 if vocab < 10_000 else 8,)
        yield from (Scenario(f"V={vocab}", d, dtype, shape=shape, vocab=vocab) for d in DIVERGENCES)
    for dtype, form in itertools.product(DTYPES, FORMS[:2]):
        options = dict(entropy_weight=-0.5, **_TERMS)
        yield from (Scenario("entropy", d, dtype, form, options=options) for d in DIVERGENCES)
        for d in DIVERGENCES:
            yield Scenario("several", d, dtype, form, options=_TEMPERED, function="several divergences")
    yield from _of_tokens()


def _of_tokens() -> Iterator[Scenario]:
    """Log-probabilities and entropies."""
    alone: dict[str, Any] = dict(divergence=None, function="token_log_probs")
    for rows, dtype, form in itertools.product(("random", "ties", "padding", "extreme"), DTYPES, FORMS[:2]):
        yield Scenario(f"ids: {rows}", dtype=dtype, form=form, rows=rows, options=_TEMPERED, **alone)
    for chunk_bytes, dtype in itertools.product(CHUNKS, DTYPES):
        options = {**_TEMPERED, "chunk_bytes": chunk_bytes}
        yield Scenario(
            "ids: chunked", dtype=dtype, form=("head", "head"), vocab=700, options=options, **alone
        )
    for vocab, dtype in itertools.product(VOCABS, (torch.float32, torch.bfloat16)):
        yield Scenario(f"ids: V={vocab}", dtype=dtype, shape=(8,), vocab=vocab, **alone)


def _terms(rows: str) -> dict[str, Any]:
    # Equal models must have gradient 0. A hard term would hide whether they do.
    return {} if rows == "equal" else dict(_TERMS)
