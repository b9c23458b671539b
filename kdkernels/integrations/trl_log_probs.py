"""TRL's log-probabilities, entropies and fused lm_head, which :func:`kdkernels.integrations.trl.patch` puts in its place."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..heads import LinearHead
from ..log_probs import TokenLogProbs, token_log_probs
from ..losses import cross_entropy
from .common import IGNORED, entropies, given_ids, head, without_ids


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log softmax(logits / temperature) at ``index``, ``[...]`` or ``[..., K]``; 0 where ``row_mask``, of the same
    shape, is 0."""
    return token_log_probs(logits, _unmasked(index, row_mask, -1), temperature=temperature).log_probs


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of every row, ``[...]``; rows are read once, in pieces that no ``chunk_size`` has to say."""
    return entropies(logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities at ``index`` and entropies from one pass; both are 0 for a masked row."""
    ids = _unmasked(index, row_mask, IGNORED)
    of = token_log_probs(logits, ids, temperature=temperature, entropy=True)
    assert of.entropy is not None
    return of.log_probs, of.entropy if entropy_requires_grad else of.entropy.detach()


def _unmasked(index: Tensor, row_mask: Tensor | None, masked: int) -> Tensor:
    if row_mask is None:
        return given_ids(index, None)
    return given_ids(index.where(row_mask != 0, 0), None).masked_fill(row_mask == 0, masked)


class ChunkedLogProbFunction:
    """Takes the place of the autograd function that TRL's fused lm_head calls: (log-probabilities, entropy,
    log_sum_sq_probs, mean logit, whether the target is the most probable token), with None for what ``outputs`` does not
    name; the last three are constants. Under ZeRO-3, which gathers weights for the backward, TRL's own serves."""

    @staticmethod
    def forward(
        ctx: None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        if hasattr(weight, "ds_id"):
            theirs: Any = importlib.import_module("trl.kernels").ChunkedLogProbFunction
            return theirs.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        student = head(hidden, weight, bias, logit_scale=logit_scale, softcap=final_logit_softcapping)
        of = token_log_probs(
            student,
            given_ids(targets, None),
            temperature=temperature,
            entropy="entropy" in outputs,
            return_stats=bool({"is_top1", "log_sum_sq_probs"} & set(outputs)),
        )
        squares = mean = is_top1 = None
        if "log_sum_sq_probs" in outputs:
            squares = _log_sum_squares(student, of, temperature)
        if "mean_logits" in outputs:
            mean = _mean_logit(student) / temperature
        if "is_top1" in outputs:
            is_top1 = None if of.top1 is None else of.top1.eq(targets)
        return of.log_probs, of.entropy, squares, mean, is_top1

    @classmethod
    def apply(cls, *arguments: Any) -> tuple[Tensor | None, ...]:
        return cls.forward(None, *arguments)


def _log_normaliser(student: LinearHead, temperature: float) -> Tensor:
    """log sum exp(logits / temperature) ``[N]``."""
    found = without_ids(student, temperature=temperature, return_stats=True).logsumexp
    assert found is not None
    return found


@torch.no_grad()
def _log_sum_squares(student: LinearHead, of: TokenLogProbs, temperature: float) -> Tensor:
    """log sum q^2 ``[N]``: q^2 is what half the temperature makes of the logits, with another normaliser."""
    assert of.logsumexp is not None
    return _log_normaliser(student, temperature / 2) - 2 * of.logsumexp


@torch.no_grad()
def _mean_logit(student: LinearHead) -> Tensor:
    """Each row's mean logit ``[N]``, fp32: from the mean of the lm_head's rows, or under a softcap from label smoothing."""
    if student.softcap is not None:
        last = torch.full(student.leading_shape, student.vocab_size - 1, device=student.hidden.device)
        apart = cross_entropy(student, last, label_smoothing=1.0, reduction="none")
        return _log_normaliser(student, 1.0) - apart
    with torch.autocast(student.hidden.device.type, enabled=False):
        mean = student.hidden.float() @ student.weight.mean(0, dtype=torch.float32)
    if student.bias is not None:
        mean = mean + student.bias.mean(dtype=torch.float32)
    return mean * student.logit_scale
