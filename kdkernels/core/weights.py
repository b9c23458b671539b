"""What each token's outputs are multiplied by: its own weight, the reduction's scale, and the weights of the terms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.spec import OUTPUTS, Asked, Output
from . import tokens
from .checked import checked_items
from .request import Terms, Tokens, may_count
from .sides import Side


def token_weights(
    given: Tokens, student: Side, live: Tensor | None, terms: Terms, vocab: int
) -> tuple[Tensor | float, Tensor | float]:
    """(each token's weight, fp64 ``[N]``, or 1.0 for all; what the reduction multiplies it by)."""
    part = None if live is None else live >= 0
    weights = tokens.token_weights(given.token_weights, student, live, part)
    classes = None
    if given.class_weights is not None:
        assert live is not None
        classes = tokens.class_weights(given.class_weights, live, terms.label_smoothing, vocab)
        weights = weights * classes
    return weights, _scale(given, part, weights, student, classes)


def _scale(
    given: Tokens, part: Tensor | None, weights: Tensor | float, student: Side, classes: Tensor | None
) -> Tensor | float:
    """``part`` is which tokens take part; None: all."""
    leading, device = student.leading, student.device
    if isinstance(given.num_items, Tensor):
        if given.num_items.device.type != "cpu" and given.num_items.device != device:
            raise ValueError(f"num_items is on {given.num_items.device}, student on {device}")
        if not isinstance(weights, Tensor):
            weights = torch.full((math.prod(leading),), weights, dtype=torch.float64, device=device)
        return checked_items(given.num_items.reshape(()), weights).reciprocal()
    if given.num_items is not None:
        return 1.0 / given.num_items
    if given.reduction == "mean":
        if classes is not None:
            total = classes.sum()
            return 1.0 / torch.where(total == 0, 1.0, total)
        if part is None:
            return _one_over(math.prod(leading), device)
        return part.sum(dtype=torch.float64).clamp(min=1).reciprocal()
    if given.reduction == "batchmean":
        return _one_over(leading[0] if leading else 1, device)
    return 1.0


def _one_over(count: int, device: torch.device) -> Tensor | float:
    """1 / count, and 1 of nothing."""
    if torch.compiler.is_exporting():  # which takes a size for 2 or more, and max() for the size
        return torch.full((), count, dtype=torch.float64, device=device).clamp(min=1).reciprocal()
    return 1.0 / max(count, 1)


def output_weights(
    terms: Terms, each: Tensor | float, temperature: Tensor, student: Side, live: Tensor | None
) -> Tensor:
    """fp64 ``[N, D * OUTPUTS]``: what each token's outputs are multiplied by, whose own weight is ``each`` (``[N]`` or a number).
    Python's numbers stay such, and cost nothing, until a column is made of them."""
    columns: list[Tensor | float | None] = [None] * OUTPUTS
    if terms.asked & Asked.SOFT and may_count(terms.soft_weight):
        soft = tokens.factor("soft_weight", terms.soft_weight, student, live)
        columns[Output.SOFT] = each * (soft * temperature.square() if terms.temperature_squared else soft)
    if terms.has_hard_term:
        hard = each * tokens.factor("hard_weight", terms.hard_weight, student, live)
        columns[Output.LABEL] = hard
        if terms.label_smoothing:
            columns[Output.LABEL] = hard * (1 - terms.label_smoothing)
            columns[Output.SMOOTH] = hard * terms.label_smoothing
        if terms.z_loss:
            columns[Output.LSE_SQUARED] = hard * terms.z_loss
    if terms.asked & Asked.ENTROPY:
        entropy = tokens.factor("entropy_weight", terms.entropy_weight, student, live)
        columns[Output.ENTROPY] = each * entropy
    if terms.teacher_learns:
        columns[Output.TEACHER_LABEL] = each
    size = math.prod(student.leading), OUTPUTS
    weights = torch.zeros(size, dtype=torch.float64, device=student.device)
    for at, column in enumerate(columns):
        if column is not None:
            weights[:, at].add_(column)  # a number stays a symbol in compiled code, as in tokens.constants
    return weights if len(terms.divergences) == 1 else weights.repeat(1, len(terms.divergences))
