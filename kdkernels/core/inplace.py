"""Whether the student's logits can be overwritten with their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import reference_asked
from .layout import overlaps_itself


def overwrites(inplace: bool, needs_grad: list[bool]) -> bool:
    """Whether a call overwrites its logits: not where nothing learns, not by the oracle, and not in an exported program,
    whose logits may be anybody's."""
    return inplace and any(needs_grad) and not torch.compiler.is_exporting() and not reference_asked()


def check_inplace(student: list[Tensor]) -> None:
    """ValueError where ``inplace=True`` cannot write over these tensors of the student."""
    if len(student) > 1:
        raise ValueError("inplace=True overwrites the student's logits, but student is a LinearHead")
    logits = student[0]
    if not torch.compiler.is_compiling() and logits.is_neg():
        raise ValueError(
            "inplace=True needs logits as they stand in memory, but torch has yet to negate student; call "
            ".resolve_neg(), or inplace=False"
        )
    if overlaps_itself(logits):
        raise ValueError(
            "inplace=True needs logits of their own memory, but student is expanded or unfolded: shape "
            f"{tuple(logits.shape)}, strides {tuple(logits.stride())}; clone it, or inplace=False"
        )
    # A compiler cannot look behind a view; it functionalises the write, so nothing is lost there.
    source = logits if torch.compiler.is_compiling() or logits._base is None else logits._base
    if source.is_leaf and source.requires_grad:
        raise ValueError(
            "inplace=True would overwrite a leaf tensor that requires grad; pass the output of the "
            "lm_head, or inplace=False"
        )
