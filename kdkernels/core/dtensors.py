"""DTensors at the boundary: which of them are vocabulary shards. Their gradients come back as DTensors."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from ..heads import LinearHead, MappedLogits, ShardedLogits
from .shards import even_shard

_WAYS_OUT = "give DTensors for all of them, or local parts with kd.Shard(group)"


def unwrapped(role: str, given: Any) -> Any:
    """The same with local parts, and with a :class:`Shard` where DTensors shard the vocabulary.

    Logits are ``Shard(-1)`` on one mesh dimension; an lm_head is ``Shard(0)`` on one, with hidden states that are
    ``Replicate`` on it, or shards of the tokens (sequence parallelism, whose gradient of the lm_head is a sum over the
    ranks). Where any mesh dimension shards the tokens, the loss is that of the local ones.
    """
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:  # nobody has made one
        return given
    names = ("hidden", "weight", "bias") if isinstance(given, LinearHead) else ("logits",)
    tensors = (
        {"logits": given}
        if isinstance(given, Tensor)
        else {name: getattr(given, name, None) for name in names}
    )
    if not any(isinstance(t, module.DTensor) for t in tensors.values()):
        return given
    if getattr(given, "shard", None) is not None:
        raise ValueError(f"{role} has DTensors and a kd.Shard; DTensors say themselves how they are sharded")
    plain = [name for name, t in tensors.items() if t is not None and not isinstance(t, module.DTensor)]
    if plain:
        raise ValueError(f"{role} has DTensors, but {plain[0]} is a plain Tensor; {_WAYS_OUT}")
    if isinstance(given, LinearHead):
        return _head(role, given)
    logits: Any = given if isinstance(given, Tensor) else given.logits
    dim = _vocabulary(role, "logits", logits, logits.dim() - 1)
    scale, softcap = (given.logit_scale, given.softcap) if isinstance(given, MappedLogits) else (1.0, None)
    if dim is None:
        return MappedLogits(logits.to_local(), scale, softcap)
    shard = even_shard(logits.device_mesh.get_group(dim), logits.shape[-1])
    return ShardedLogits(logits.to_local(), shard, scale, softcap)


def _head(role: str, given: LinearHead) -> LinearHead:
    hidden: Any = given.hidden
    weight: Any = given.weight
    bias: Any = given.bias
    dim = _vocabulary(role, "weight", weight, 0)
    if dim is None or any(not p.is_replicate() for p in weight.placements if not p.is_shard()):
        raise ValueError(
            f"{role}'s weight is a DTensor {_shown(weight)}; it needs Shard(0) on one mesh dimension, or {_WAYS_OUT}"
        )
    if hidden.device_mesh != weight.device_mesh or (
        bias is not None and bias.placements != weight.placements
    ):
        raise ValueError(f"{role}'s hidden, weight and bias are DTensors of different meshes or placements")
    if _sharded_on(role, "hidden", hidden, hidden.dim() - 1):
        raise ValueError(
            f"{role}'s hidden is a DTensor {_shown(hidden)}, sharded over H; on a mesh dimension it needs Replicate, or "
            "shards of the tokens"
        )
    options = {"tokens": "sharded", "data_parallel": "sum"} if hidden.placements[dim].is_shard() else {}
    shard = even_shard(weight.device_mesh.get_group(dim), weight.shape[0], **options)
    own_bias = None if bias is None else bias.to_local()
    return LinearHead(
        hidden.to_local(), weight.to_local(), own_bias, given.logit_scale, given.softcap, shard=shard
    )


def _vocabulary(role: str, name: str, tensor: Any, vocabulary: int) -> int | None:
    """The mesh dimension that shares out the tensor's dimension ``vocabulary``; None where none does."""
    dims = _sharded_on(role, name, tensor, vocabulary)
    if len(dims) > 1:
        raise ValueError(
            f"{role}'s {name} is a DTensor {_shown(tensor)}, sharded over the vocabulary on more than one mesh "
            "dimension; gather one of them first"
        )
    return dims[0] if dims else None


def _sharded_on(role: str, name: str, tensor: Any, dim: int) -> list[int]:
    """The mesh dimensions that share out the tensor's dimension ``dim``."""
    for placement in tensor.placements:
        if type(placement).__name__ not in ("Shard", "Replicate"):
            raise ValueError(
                f"{role}'s {name} is a DTensor {_shown(tensor)}, which is not a shard; redistribute it first"
            )
    return [at for at, p in enumerate(tensor.placements) if p.is_shard() and p.dim % tensor.dim() == dim]


def _shown(tensor: Any) -> str:
    return "(" + ", ".join(map(str, tensor.placements)) + ")"
