"""What users hand over besides plain logits: hidden states and an lm_head, logits that are still to be mapped, and
either of them of one rank's part of the vocabulary."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import check_tensor, flag, integer, is_wrapped, number, shown


def under_autocast(device: torch.device) -> bool:
    # Compilers before torch 2.13 cannot trace the question; the devices that they know have autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


_keys = itertools.count(1)


def _new_key() -> str:
    return "" if torch.compiler.is_compiling() else str(next(_keys))


#: The largest scale or cap. Its reciprocal is a normal number in fp32 too.
MOST = 1e30


@dataclass(frozen=True, eq=False)
class Shard:
    """One rank's part of a vocabulary that a group of ranks shares out, as tensor parallelism does.

    Every rank of the group makes the same calls in the same order. How the ranks share out the vocabulary is asked
    once, at the first call, and belongs to the object from then on: make one for each lm_head, and keep it. Shards
    may differ in width, and be empty. The student's and the teacher's have the same rows on a rank, once
    ``vocab_size`` has cut off the padding; one object serves both where their widths are the same.

    Args:
        group: a ``torch.distributed`` process group that this rank is in; None: all ranks.
        start: the first id of this rank's part; None: the parts lie in the order of the ranks.
        tokens: "replicated": hidden states, labels and all that is given for each token are the same on all ranks.
            "sharded": each rank has tokens of its own, as many as it likes, and its loss is that of its own tokens,
            as if the lm_head were whole on every rank; they are gathered inside. Needs LinearHeads, and the same
            arriving gradient on every rank where the loss is one number.
        data_parallel: of sharded tokens: how the ranks' gradients of everything before the lm_head become one.
            "mean" as DDP and FSDP do, "sum" as sequence parallelism does; the shard's gradient comes out so.
        reduce_hidden: the gradient for hidden states is summed over the group. False: it is this rank's part, for
            a caller whose own mapping sums it, as Megatron's does. Replicated tokens only.
        reduce_dtype: what it is summed in; fp64 stays fp64.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind. What needs the other ranks is found out at the first
            loss: ValueError on all of them.

    >>> import torch, kdkernels as kd
    >>> shard = kd.Shard(reduce_dtype=torch.float32)
    """

    group: Any = None
    start: int | None = None
    tokens: Literal["replicated", "sharded"] = "replicated"
    reduce_hidden: bool = True
    reduce_dtype: torch.dtype = torch.float32
    data_parallel: Literal["mean", "sum"] = "mean"
    #: Filled once, by core/shards.py: how the group shares out this vocabulary.
    known: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    #: No other Shard has it, so compiled code can tell them apart. "" for one that compiled code makes: each run of
    #: the code makes another, all with what was a constant when it was compiled.
    key: str = field(default_factory=_new_key, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.start is not None and integer("Shard's start", self.start) < 0:
            raise ValueError(f"Shard needs start >= 0 or None, got start={self.start}")
        if self.tokens not in ("replicated", "sharded"):
            raise ValueError(f"Shard's tokens are 'replicated' or 'sharded', got {shown(self.tokens)}")
        if self.data_parallel not in ("mean", "sum"):
            raise ValueError(f"Shard's data_parallel is 'mean' or 'sum', got {shown(self.data_parallel)}")
        if not flag("Shard's reduce_hidden", self.reduce_hidden) and self.tokens == "sharded":
            raise ValueError(
                "reduce_hidden=False leaves dH to the caller, who cannot sum it with tokens='sharded'"
            )
        if not isinstance(self.reduce_dtype, torch.dtype) or not self.reduce_dtype.is_floating_point:
            raise TypeError(f"Shard needs a floating reduce_dtype, got {self.reduce_dtype!r}")


def _check_shard(owner: str, given: Any) -> None:
    if not isinstance(given, Shard):
        raise TypeError(f"{owner}'s shard must be a kd.Shard, got {shown(given)}")


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Hidden states and the lm_head that would turn them into logits.

    Args:
        hidden: ``[..., H]`` floating.
        weight: ``[V, H]``, the lm_head's weight, same dtype and device (autocast casts both).
        bias: ``[V]`` or None.
        logit_scale: logits are multiplied by it (Cohere); a constant, not 0, between 1e-30 and 1e30 in size.
        softcap: ``softcap * tanh(logits / softcap)`` after the scale (Gemma 2); None, or a constant in [1e-30, 1e30].
        shard: a :class:`Shard`, where weight and bias are this rank's rows of the lm_head.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a number is out of range or requires
            grad. TypeError: something is no Tensor, or no number.

    >>> head = LinearHead(torch.randn(2, 3, 8), torch.randn(50, 8), softcap=30.0)
    >>> head.vocab_size, head.leading_shape
    (50, torch.Size([2, 3]))
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    shard: Shard | None = None

    def __post_init__(self) -> None:
        hidden, weight = self.hidden, self.weight
        for name in ("hidden", "weight") if self.bias is None else ("hidden", "weight", "bias"):
            check_tensor(f"LinearHead's {name}", getattr(self, name))
        if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"LinearHead needs hidden [..., H] and weight [V, H], got hidden "
                f"{tuple(hidden.shape)} and weight {tuple(weight.shape)}"
            )
        if self.bias is not None and tuple(self.bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"LinearHead needs bias [V] = ({weight.shape[0]},), got {tuple(self.bias.shape)}"
            )
        tensors = [hidden, weight] + ([] if self.bias is None else [self.bias])
        if len({t.device for t in tensors}) > 1:
            raise ValueError(f"LinearHead is spread over devices {[str(t.device) for t in tensors]}")
        if self.shard is not None:
            _check_shard("LinearHead", self.shard)
        for t in tensors[1:]:
            if not torch.compiler.is_compiling() and is_wrapped(t):
                raise ValueError(
                    f"LinearHead has a {type(t).__name__}, which computes its own products (quantized, perhaps); give "
                    "a plain Tensor (its dequantize(), if it has one), or the logits"
                )
        self._check_dtypes(tensors)
        _check_map(self)

    @property
    def vocab_size(self) -> int:
        """Rows of ``weight``: of a shard, this rank's."""
        return self.weight.shape[0]

    @property
    def leading_shape(self) -> torch.Size:
        return self.hidden.shape[:-1]

    def _are_cast(self, tensors: list[Tensor]) -> bool:
        """By autocast, which leaves fp64 alone."""
        return under_autocast(self.hidden.device) and all(t.dtype != torch.float64 for t in tensors)

    def _check_dtypes(self, tensors: list[Tensor]) -> None:
        if not all(t.is_floating_point() for t in tensors) or (
            not self._are_cast(tensors) and len({t.dtype for t in tensors}) > 1
        ):
            raise ValueError(
                f"LinearHead needs one floating dtype, got {[str(t.dtype) for t in tensors]}; "
                "cast hidden or weight, or use torch.autocast"
            )

    def tensors(self) -> list[Tensor]:
        """[hidden, weight] or [hidden, weight, bias], cast as F.linear would under autocast."""
        given = [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])
        self._check_dtypes(given)  # again: autocast may have ended since
        kind = self.hidden.device.type
        if self._are_cast(given):
            given = [t.to(torch.get_autocast_dtype(kind)) for t in given]
        return given


@dataclass(frozen=True, eq=False)
class MappedLogits:
    """Logits ``[..., V]`` that are still to be scaled and capped, as a :class:`LinearHead`'s are.

    The pass that reads them does it, in its arithmetic: a half-precision cap would round the logits
    again, and cost a tensor of their size. Gradients are those of the logits as they are given.
    """

    logits: Tensor
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        check_tensor("logits", self.logits)
        _check_map(self)

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[-1]

    @property
    def leading_shape(self) -> torch.Size:
        return self.logits.shape[:-1]

    def tensors(self) -> list[Tensor]:
        return [self.logits]


@dataclass(frozen=True, eq=False)
class ShardedLogits:
    """This rank's columns ``[..., V_rank]`` of logits whose vocabulary a group of ranks shares out.

    Their gradient is that of these columns.

    Args:
        logits: ``[..., V_rank]`` (fp64, fp32, bf16, fp16); V_rank may be 0.
        shard: where these columns lie.
        logit_scale: multiplies the logits.
        softcap: caps the scaled logits; None does not.

    Raises:
        TypeError, ValueError: something is no Tensor or no Shard, logits are a scalar, a number is out of range.

    >>> import torch, kdkernels as kd
    >>> kd.ShardedLogits(torch.randn(2, 3, 50), kd.Shard()).leading_shape
    torch.Size([2, 3])
    """

    logits: Tensor
    shard: Shard
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        check_tensor("ShardedLogits' logits", self.logits)
        if self.logits.dim() < 1:
            raise ValueError("ShardedLogits need a vocabulary dimension, got a scalar")
        _check_shard("ShardedLogits", self.shard)
        _check_map(self)

    @property
    def vocab_size(self) -> int:
        """This rank's columns."""
        return self.logits.shape[-1]

    @property
    def leading_shape(self) -> torch.Size:
        return self.logits.shape[:-1]

    def tensors(self) -> list[Tensor]:
        return [self.logits]


def _check_map(given: LinearHead | MappedLogits | ShardedLogits) -> None:
    """Makes the scale and the cap Python numbers. An error where one is out of range, not a number, or learned."""
    owner = type(given).__name__
    object.__setattr__(given, "logit_scale", number(f"{owner}'s logit_scale", given.logit_scale))
    if not 1 / MOST <= abs(given.logit_scale) <= MOST:
        raise ValueError(f"{owner} needs |logit_scale| in [{1 / MOST:g}, {MOST:g}], got {given.logit_scale}")
    if given.softcap is not None:
        object.__setattr__(given, "softcap", number(f"{owner}'s softcap", given.softcap))
        if not 1 / MOST <= given.softcap <= MOST:
            raise ValueError(
                f"{owner} needs softcap in [{1 / MOST:g}, {MOST:g}] or None, got softcap={given.softcap}"
            )
