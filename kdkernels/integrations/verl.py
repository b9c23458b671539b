"""verl's log-probabilities and entropies, for its actors: one line in every worker before verl builds them::

    from kdkernels.integrations import verl; verl.patch()

What is replaced are ``logprobs_from_logits``, ``entropy_from_logits`` and ``entropy_from_logits_with_chunking`` of
``verl.utils.torch_functional``, wherever verl has imported them, ``FusedLinearForPPO``, and what its distillation on a
teacher's top k takes of the student's logits with ``use_chunked_topk``. What differs from verl 0.9
(tests in ``tests/integrations/test_verl.py``):

* Results are fp32 (fp64 for fp64 logits). verl's entropies, and without flash-attn its log-probabilities, are in the
  dtype of the logits or hidden states.
* At logits of -inf (a vocabulary that is padded, or top-p) the entropy is that of the others, and its gradient is
  finite; verl's is NaN.
* A label of -100 gives a log-probability of 0 without a gradient, as with flash-attn, on any device.
* ``inplace_backward`` overwrites logits with their gradient where verl would with flash-attn, on any device; never
  logits that are a leaf, or parts of one another, or that the loss on a teacher's top k (``use_chunked_topk``) reads
  again in its backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.layout import overlaps_itself
from ..log_probs import token_log_probs
from .common import IGNORED, entropies, given_ids, head
from .patches import Patch, Patches, Target

#: The versions that the test suite is run with: from the first, below the second.
TESTED = ((0, 9), (0, 10))
#: Logits, or what they are views of, that the backward of chunked_topk_log_probs reads.
_read_again = WeakTensorKeyDictionary()


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log softmax(logits ``[..., V]``) at ``labels`` ``[...]``."""
    inplace = (
        inplace_backward
        and not torch.compiler.is_compiling()  # compiled code overwrites nothing
        and not logits.is_leaf
        and not overlaps_itself(logits)
        and _source(logits) not in _read_again
    )
    return token_log_probs(logits, given_ids(labels, IGNORED), inplace=inplace).log_probs


def entropy_from_logits(logits: Tensor) -> Tensor:
    """The entropy of every row, ``[...]``."""
    return entropies(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """The entropy of every row; no ``chunk_size`` has to say in which pieces rows are read."""
    return entropies(logits)


def chunked_topk_log_probs(logits: Tensor, topk_ids: Tensor, chunk_size: int = 4096) -> Tensor:
    """log softmax(logits ``[B, T, V]``) at ``topk_ids`` ``[B, T, K]``, fp32 and without a chunk of them in fp32."""
    if logits.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _read_again[_source(logits)] = None
    return token_log_probs(logits, given_ids(topk_ids, None)).log_probs


def _source(logits: Tensor) -> Tensor:
    """What ``logits`` are a view of, else themselves."""
    return logits if logits._base is None else logits._base


class FusedLinearForPPO(nn.Module):
    """(log-probabilities, entropies) ``[...]`` of tokens from hidden states and an lm_head, both differentiable.

    ``chunk_size`` and ``impl_backend`` say how verl would do it.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend must be 'torch' or 'liger', got {impl_backend!r}")

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        student = head(hidden_states, vocab_weights)
        ids = given_ids(input_ids.to(torch.int64), None)
        of = token_log_probs(student, ids, temperature=temperature, entropy=True)
        assert of.entropy is not None
        return of.log_probs, of.entropy


_PATCHES = Patches(
    "verl",
    TESTED,
    [
        *(
            Target("verl.utils.torch_functional", None, ours.__name__, ours)
            for ours in (logprobs_from_logits, entropy_from_logits, entropy_from_logits_with_chunking)
        ),
        Target("verl.utils.experimental.torch_functional", None, "FusedLinearForPPO", FusedLinearForPPO),
        Target(
            "verl.trainer.distillation.fsdp.losses", None, "_chunked_topk_log_probs", chunked_topk_log_probs
        ),
    ],
)


def patch() -> Patch:
    """Put these in the place of verl's, at once.

    ``patch()`` alone holds until :func:`unpatch`; ``with patch():`` until the block ends.

    Raises:
        RuntimeError: verl's version is outside ``TESTED``, or a function is missing or takes other arguments.
            Nothing is replaced then.
        ImportError: verl is not installed.
    """
    return _PATCHES.patch()


def unpatch() -> None:
    """Put verl's own back; without a patch it does nothing."""
    _PATCHES.unpatch()
