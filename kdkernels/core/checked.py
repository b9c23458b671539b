"""Operators that look at values. What is out of range is a ValueError on the CPU; on an accelerator it is a
device-side assertion, because looking would stop the stream. A compiler runs nothing of a function but its
operators, so warnings come from here too."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import outcomes
from ..backends.spec import Spec
from ..checks import require, warn
from ..operators import operator
from .option_checks import LEAST_TEMPERATURE, MOST_TEMPERATURE, TEMPERATURES


@operator("checked_labels")
def checked_labels(labels: Tensor | None, mask: Tensor | None, vocab: int, ignore_index: int) -> Tensor:
    """Labels ``[N]`` with -1 for every token that ``ignore_index`` or the mask takes out, 0 for the others where
    there is a mask alone."""
    if mask is not None:
        mask = mask.reshape(-1)
        if mask.dtype != torch.bool:
            require(
                (mask != 0) & (mask != 1), mask, "mask must be bool or hold 0 and 1, found {} at token {}"
            )
    if labels is None:
        assert mask is not None
        return torch.where(mask != 0, 0, -1)
    flat = labels.reshape(-1)
    ignored = flat == ignore_index if mask is None else (flat == ignore_index) | (mask == 0)
    require(
        ~ignored & ((flat < 0) | (flat >= vocab)),
        flat,
        f"labels must be in [0, {vocab}) or ignore_index={ignore_index}, found {{}}",
    )
    if mask is None and vocab > 2:
        _warn_of_a_mask(flat)
    return torch.where(ignored, -1, flat)


def _warn_of_a_mask(labels: Tensor) -> None:
    """Only where looking waits for nothing. One token says nothing."""
    if labels.device.type == "cpu" and labels.numel() > 1 and bool(((labels == 0) | (labels == 1)).all()):
        warn("labels hold nothing but 0 and 1, and are taken as class ids; a mask of tokens goes in mask=")


@torch.library.register_fake(checked_labels)
def _(labels, mask, vocab, ignore_index):
    given = mask if labels is None else labels
    return given.new_empty(given.numel(), dtype=torch.int64)


@operator("checked_ids")
def checked_ids(ids: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(ids ``[N, K]`` with -1 for none, labels ``[N]``: -1 for a token that ``ignore_index`` masks, else 0)."""
    ignored = ids == ignore_index
    masked = ignored.all(-1)
    require(
        ~ignored & ((ids < -1) | (ids >= vocab)),
        ids,
        f"ids must be in [0, {vocab}), -1 for none or ignore_index={ignore_index} for a masked token, found {{}} at "
        "token {}",
    )
    if ignore_index != -1 and ids.shape[1] > 1:
        require(
            ignored.any(-1) & ~masked,
            ignored.sum(-1),
            f"{{}} of the ids of token {{}} are ignore_index={ignore_index}, which masks a token where all of them "
            "are; -1 is no id",
        )
    return ids.masked_fill(ignored, -1), -masked.long()


@torch.library.register_fake(checked_ids)
def _(ids, vocab, ignore_index):
    return torch.empty_like(ids), ids.new_empty(ids.shape[0])


@operator("checked_numbers")
def checked_numbers(values: Tensor, labels: Tensor | None, name: str) -> Tensor:
    """``values`` ``[N]`` in fp64: finite, and what a temperature may be where they are temperatures. Where a label is -1 they may be
    anything, and are 1."""
    numbers = values.double()
    if labels is not None:
        numbers = torch.where(labels >= 0, numbers, 1.0)
    require(~numbers.isfinite(), numbers, f"{name} must be finite, got {{}} at token {{}}")
    if name == "temperature":
        beyond = (numbers < LEAST_TEMPERATURE) | (numbers > MOST_TEMPERATURE)
        require(beyond, numbers, f"{name} must be > 0, in {TEMPERATURES}, got {{}} at token {{}}")
    return numbers.clone()


@torch.library.register_fake(checked_numbers)
def _(values, labels, name):
    return torch.empty_like(values, dtype=torch.float64, memory_format=torch.contiguous_format)


@operator("checked_items")
def checked_items(num_items: Tensor, weights: Tensor) -> Tensor:
    """``num_items`` (0-dim) as a divisor, fp64 on the device of the tokens' ``weights``: > 0 and finite, or 0 where
    every weight is 0."""
    items = num_items.double()
    require(~((items >= 0) & (items < torch.inf)), items, "num_items must be > 0 and finite, got {}")
    items = items.to(weights.device, non_blocking=True)
    nothing = (items == 0) & (weights == 0).all()
    require((items == 0) & ~nothing, items, "num_items must be > 0 where any token counts, got {}")
    return torch.where(nothing, 1.0, items)


@torch.library.register_fake(checked_items)
def _(num_items, weights):
    return weights.new_empty((), dtype=torch.float64)


@operator("checked_target")
def checked_target(
    ids: Tensor, values: Tensor, mask: Tensor | None, labels: Tensor | None, vocab: int, spec: str
) -> Tensor:
    """A sparse target's ids ``[N, K]`` with -1 in empty slots and for masked tokens (labels of -1)."""
    static = Spec.from_text(spec)
    outcomes.warn_if_approximate(static)
    return outcomes.checked_slots(ids, values, mask, labels, static, vocab).contiguous()


@torch.library.register_fake(checked_target)
def _(ids, values, mask, labels, vocab, spec):
    return ids.new_empty(ids.numel() // ids.shape[-1], ids.shape[-1])
