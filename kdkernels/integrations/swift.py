"""ms-swift's GKD loss, for its trainers: one line before training::

    from kdkernels.integrations import swift; swift.patch()

Logits are read once, where ms-swift's chunks hold a log-softmax of both models each and keep what autograd wants. What
differs from ms-swift 4.6 (tests in ``tests/integrations/test_swift.py``):

* Half-precision logits: rows in fp32, and so is the loss; ms-swift's is in the logits' dtype.
* A token that both models rule out (logits of -inf) is no term; ms-swift's loss is NaN.
* With a ``log_softmax_fn`` or ``kl_div_fn`` of your own (Megatron's vocabulary shards) it is ms-swift's own, and so it
  is with a student of more tokens than its teacher, whose logits ms-swift fills up from the student's, gradient and all.
"""

from __future__ import annotations

import importlib
from typing import Any, Callable

from torch import Tensor

from ..losses import js_divergence
from .patches import Patch, Patches, Target

#: The versions that the test suite is run with: from the first, below the second.
TESTED = ((4, 6), (4, 7))
_MODULE = "swift.rlhf_trainers.gkd_loss"


def jsd_loss(
    s_logits: Tensor,
    t_logits: Tensor,
    beta: float,
    log_softmax_fn: Callable[..., Tensor] | None = None,
    kl_div_fn: Callable[..., Tensor] | None = None,
    chunk_size: int = 512,
) -> Tensor:
    """The sum of JSD(beta) over rows ``[N, D]``, student first; beta 0 is the forward and 1 the reverse KL."""
    theirs: Any = importlib.import_module(_MODULE)
    own = log_softmax_fn in (None, theirs.default_log_softmax) and kl_div_fn in (None, theirs.default_kl_div)
    if own and not t_logits.requires_grad:
        return js_divergence(s_logits, t_logits, beta=beta, reduction="sum")
    functions = log_softmax_fn or theirs.default_log_softmax, kl_div_fn or theirs.default_kl_div
    return _PATCHES.theirs(_TARGET)(s_logits, t_logits, beta, *functions, chunk_size)


_TARGET = Target(_MODULE, None, "jsd_loss", jsd_loss)
_PATCHES = Patches("ms-swift", TESTED, [_TARGET], name="swift")


def patch() -> Patch:
    """Put this in the place of ms-swift's ``jsd_loss``, at once.

    ``patch()`` alone holds until :func:`unpatch`; ``with patch():`` until the block ends.

    Raises:
        RuntimeError: ms-swift's version is outside ``TESTED``, or the function takes other arguments. Nothing is
            replaced then.
        ImportError: ms-swift is not installed.
    """
    return _PATCHES.patch()


def unpatch() -> None:
    """Put ms-swift's own back; without a patch it does nothing."""
    _PATCHES.unpatch()
