"""speculators' losses of draft models, for its trainer: one line before it is built::

    from kdkernels.integrations import speculators; speculators.patch()

``--loss-fn`` and JSON mixes of its names then mean these, whichever ``--loss-implementation``. They take logits
``[B, T, V]`` of the draft and of the target and give one number per position ``[B, T]``; they run on any device, where
speculators' fused ones need a GPU with Triton. What differs from speculators 0.9 (tests in
``tests/integrations/test_speculators.py``):

* The overlap is added up, not 1 - TV: ``nla`` has no floor at an acceptance of 1e-5, below which speculators' gradient
  is 0, but at 1e-38, the least that fp32 has. A draft that begins far from its target is what that loss is for.
* ``nla`` and ``lk_hybrid`` make what they are composed of in one pass.
* The target's logits are a constant, as in speculators' fused losses; its eager ones let a gradient through.
* Half-precision logits of ``ce``: rows in fp32, and so is the loss; the eager one is in the logits' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..divergences import JSD, Divergence, ForwardKL, Overlap, ReverseKL, TotalVariation
from ..losses import cross_entropy, distillation_loss
from .patches import Patch, Patches, Target

#: The versions that the test suite is run with: from the first, below the second.
TESTED = ((0, 9), (0, 10))


def _per_position(divergence: Divergence, logits: Tensor, targets: Tensor) -> Tensor:
    return distillation_loss(logits, targets, divergence=divergence, reduction="none")


def kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return _per_position(ForwardKL(), logits, targets)


def reverse_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return _per_position(ReverseKL(), logits, targets)


def js_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return _per_position(JSD(0.5), logits, targets)


def ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with the target's most probable token as the label."""
    return cross_entropy(logits, targets.argmax(-1), reduction="none")


def tv_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return _per_position(TotalVariation(), logits, targets)


def neg_log_acceptance_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-log sum min(p, q), finite also where both have nothing in common: the mask comes afterwards."""
    overlap = _per_position(Overlap(), logits, targets)
    return -overlap.clamp_min(torch.finfo(overlap.dtype).tiny).log()


def lk_hybrid_loss(logits: Tensor, targets: Tensor, eta: float = 3.0) -> Tensor:
    """w KL + (1 - w) TV with w = exp(-eta * acceptance), a constant (arXiv 2602.23881)."""
    both = (ForwardKL(), TotalVariation())
    kl, tv = distillation_loss(logits, targets, divergence=both, reduction="none")
    weight = (-eta * (1 - tv.detach())).exp()
    return weight * kl + (1 - weight) * tv


_LOSSES = {
    "kl_div": kl_div_loss,
    "rkl": reverse_kl_div_loss,
    "jsd": js_div_loss,
    "ce": ce_loss,
    "tv": tv_loss,
    "nla": neg_log_acceptance_loss,
    "lk_hybrid": lk_hybrid_loss,
}
_PATCHES = Patches(
    "speculators",
    TESTED,
    [
        Target("speculators.losses.utils", owner, name, ours)
        for owner in ("_FUSED_LOSS_FN_MAP", "_EAGER_LOSS_FN_MAP")
        for name, ours in _LOSSES.items()
    ],
)


def patch() -> Patch:
    """Put these losses in the place of speculators', for trainers that are built afterwards.

    ``patch()`` alone holds until :func:`unpatch`; ``with patch():`` until the block ends.

    Raises:
        RuntimeError: speculators' version is outside ``TESTED``, or a loss is missing or takes other arguments.
            Nothing is replaced then.
        ImportError: speculators is not installed.
    """
    return _PATCHES.patch()


def unpatch() -> None:
    """Put speculators' own losses back; without a patch it does nothing."""
    _PATCHES.unpatch()
