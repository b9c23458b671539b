"""What the drop-ins share: the ignored label, ids as trainers give them or none at all, lm_heads as trainers hold them
(sharded, or in another dtype), and a module's forward replaced for one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import require
from ..heads import LinearHead
from ..log_probs import TokenLogProbs, token_log_probs
from ..operators import operator

IGNORED = -100


@operator("given_ids")
def given_ids(ids: Tensor, ignore_index: int | None) -> Tensor:
    """``ids`` with ``IGNORED`` for ``ignore_index``. Other negative ones are an error as in checked_ids: to trainers' own
    functions -1 is out of range, and to token_log_probs no id."""
    ignored = torch.zeros_like(ids, dtype=torch.bool) if ignore_index is None else ids == ignore_index
    unless = "" if ignore_index is None else f" or ignore_index={ignore_index}"
    require(~ignored & (ids < 0), ids, f"ids must be >= 0{unless}, found {{}}")
    return torch.where(ignored, IGNORED, ids).contiguous()


@torch.library.register_fake(given_ids)
def _(ids, ignore_index):
    return ids.new_empty(ids.shape)


def without_ids(student: Tensor | LinearHead, **options: Any) -> TokenLogProbs:
    """:func:`kdkernels.token_log_probs` of no id: entropy and statistics alone."""
    rows = student.hidden if isinstance(student, LinearHead) else student
    no_ids = torch.full(rows.shape[:-1], -1, dtype=torch.int64, device=rows.device)
    return token_log_probs(student, no_ids, **options)


def entropies(logits: Tensor) -> Tensor:
    """The entropy of every row, ``[...]``."""
    entropy = without_ids(logits, entropy=True).entropy
    assert entropy is not None
    return entropy


def whole(parameter: Any) -> Tensor:
    """A DTensor parameter (FSDP2, tensor parallel) gathered; other tensors as they are.

    Its gradient is the mean over ranks, which is data parallelism's rule. With the same data on every rank the mean is
    the gradient itself. Otherwise each rank would use a slice of its own gradient, not reduced over ranks.
    """
    if not is_dtensor(parameter):
        return parameter
    from torch.distributed.tensor import Partial

    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, without an import of torch.distributed.tensor, which few callers need."""
    return hasattr(tensor, "full_tensor")


def replicated(hidden: Tensor, weight: Any) -> Tensor:
    """Hidden states that every rank has, as a DTensor where tensor parallelism left the lm_head one.

    Ranks of any other mesh (FSDP2's) have hidden states of their own. These stay as they are, which the loss refuses.
    """
    if not is_dtensor(weight) or weight.device_mesh.mesh_dim_names != ("tp",):
        return hidden
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(hidden, weight.device_mesh, [Replicate()], run_check=False)


@contextlib.contextmanager
def forward_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """``module(...)`` runs ``function`` between the module's own hooks."""
    own = module.__dict__.get("forward")
    module.forward = function  # type: ignore[assignment]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[assignment]


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **logit_map) -> LinearHead:
    """A LinearHead of parameters that may be sharded, or wider than the hidden states (master weights).

    >>> import torch
    >>> head(torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(50, 8), softcap=30.0).vocab_size
    50
    """
    weight = whole(weight).to(hidden.dtype)
    bias = None if bias is None else whole(bias).to(hidden.dtype)
    return LinearHead(hidden, weight, bias, **logit_map)
