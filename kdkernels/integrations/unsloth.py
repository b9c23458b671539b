"""unsloth_zoo's loss of draft heads (MTP), for its trainer: one line after ``import unsloth`` and before training::

    from kdkernels.integrations import unsloth; unsloth.patch()

Where unsloth_zoo's chunks hold up to six tensors ``[rows, V]`` in fp32 and are computed again in the backward, the
divergences here need one product with each lm_head and one for each gradient, and the cross entropy of a head that is
frozen nothing of its forward again. What differs from unsloth_zoo 2026.10 (tests in
``tests/integrations/test_unsloth.py``):

* A token that both models rule out (logits of -inf) is no term; unsloth_zoo's teacher losses are NaN there.
* A teacher's vocabulary of another size is a ValueError that names both.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..divergences import ForwardKL, Overlap, TotalVariation
from ..heads import LinearHead
from ..log_probs import token_log_probs
from ..losses import distillation_loss
from .common import IGNORED, given_ids
from .patches import Patch, Patches, Target

#: The versions that the test suite is run with: from the first, below the second.
TESTED = ((2026, 10, 6), (2026, 11))
#: unsloth_zoo's own budget for logits.
_CHUNK_BYTES = 2**28
LOSS_TYPES = ("ce", "kl_div", "tv", "lk_hybrid")


def chunked_lm_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    loss_type: str = "ce",
    teacher_hidden: Tensor | None = None,
    teacher_lm_head_weight: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int = 1024,
    lk_eta: float = 3.0,
    logit_softcap: float | None = None,
) -> tuple[Tensor, int, int]:
    """(the loss's sum, tokens, how many of them have the label as the most probable token), over the tokens whose
    label is not ``ignore_index``.

    Hidden states ``[..., H]`` and the labels ``[...]`` of a draft head; the teacher's hidden states go through
    ``teacher_lm_head_weight``, by default the draft's own. "lk_hybrid" is w KL + (1 - w) TV with w = exp(-lk_eta *
    overlap), a constant. ``chunk_size`` says how unsloth_zoo would do it.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is none of {', '.join(LOSS_TYPES)}")
    if loss_type != "ce" and teacher_hidden is None:
        raise ValueError(f"loss_type={loss_type!r} needs teacher_hidden")
    labels = labels.reshape(-1).to(hidden.device)
    student = _head(hidden, lm_head_weight, hidden.device, logit_softcap)
    live = labels != ignore_index
    tokens = int(live.sum())
    ids = labels.where(live, IGNORED)
    # A divergence only compares labels with the most probable token, and takes any.
    ids = given_ids(ids, IGNORED) if loss_type == "ce" else ids.masked_fill(live, -1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and loss_type == "ce"):
        of = token_log_probs(student, ids, return_stats=True, chunk_bytes=_CHUNK_BYTES)
    assert of.top1 is not None
    correct = int(((of.top1 == labels) & live).sum())
    if loss_type == "ce":
        return -of.log_probs.sum(), tokens, correct
    assert teacher_hidden is not None
    weight = lm_head_weight if teacher_lm_head_weight is None else teacher_lm_head_weight
    teacher = _head(teacher_hidden.detach(), weight.detach(), hidden.device, logit_softcap)
    return _divergence(loss_type, student, teacher, live, lk_eta), tokens, correct


def _head(hidden: Tensor, weight: Tensor, device: torch.device, softcap: float | None) -> LinearHead:
    hidden = hidden.reshape(-1, hidden.shape[-1]).to(device, weight.dtype)
    return LinearHead(hidden, weight.to(device), softcap=softcap)


def _divergence(name: str, student: LinearHead, teacher: LinearHead, mask: Tensor, eta: float) -> Tensor:
    shared: dict[str, Any] = dict(mask=mask, chunk_bytes=_CHUNK_BYTES)
    if name != "lk_hybrid":
        divergence = ForwardKL() if name == "kl_div" else TotalVariation()
        return distillation_loss(student, teacher, divergence=divergence, reduction="sum", **shared)
    both = (ForwardKL(), Overlap())
    kl, overlap = distillation_loss(student, teacher, divergence=both, reduction="none", **shared)
    weight = (-eta * overlap.detach()).exp()
    return (weight * kl + (1 - weight) * (1 - overlap).where(mask, 0.0)).sum()


_PATCHES = Patches(
    "unsloth_zoo",
    TESTED,
    [Target("unsloth_zoo.speculative.losses", None, "chunked_lm_loss", chunked_lm_loss)],
    name="unsloth",
)


def patch() -> Patch:
    """Put this in the place of unsloth_zoo's ``chunked_lm_loss``, wherever it has imported it, at once.

    ``patch()`` alone holds until :func:`unpatch`; ``with patch():`` until the block ends.

    Raises:
        RuntimeError: unsloth_zoo's version is outside ``TESTED``, or the function takes other arguments. Nothing is
            replaced then.
        ImportError: unsloth_zoo is not installed, or unsloth, which it wants, is not imported yet.
    """
    try:
        return _PATCHES.patch()
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) or "UNSLOTH_IS_PRESENT" in os.environ:
            raise
        raise ImportError(
            "unsloth_zoo can only be imported where unsloth is; import unsloth before unsloth.patch()"
        ) from error


def unpatch() -> None:
    """Put unsloth_zoo's own back; without a patch it does nothing."""
    _PATCHES.unpatch()
