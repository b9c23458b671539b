"""Sparse teacher targets: a few vocabulary entries per token, and what their tail means."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Callable, Literal, Sequence, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import _utils as data_utils

from ..checks import check_tensor
from . import records

#: What happens to the mass that was not stored; the last two are defined for the forward KL only.
Tail = Literal["bucket", "conditional", "renormalize", "truncate"]
TAILS: tuple[Tail, ...] = get_args(Tail)


@dataclass(frozen=True, eq=False)
class SparseTarget:
    """What a teacher says about a few entries of the vocabulary: top-k, top-p or sampled tokens.

    Exactly one of ``logprobs`` and ``weights`` is given: log t or t, at temperature 1. They need not
    sum to 1; a = sum t. A slot is empty, and as good as not there, where its id is -1, its
    log-probability -inf, its weight 0 or its mask False; so K may differ from token to token. Slots
    may come in any order, and those with the same id add up. A token without any slot has the soft
    term 0 and still counts as a token. Ids and values are checked when a loss is taken, against its
    vocabulary and only where its labels are not masked.

    Args:
        ids: int64 ``[..., K]``, entries of the vocabulary or -1; K >= 1.
        logprobs: floating ``[..., K]``.
        weights: floating ``[..., K]``, >= 0.
        mask: bool ``[..., K]`` or None; False empties a slot.
        tail: what the loss does about the entries that were not stored:

            * "bucket": the rest of either distribution is one more outcome; any divergence on K + 1
              outcomes. Needs a <= 1, up to rounding; where all V ids are stored, a = 1.
            * "conditional": teacher and student are rescaled to 1 over the stored ids; any divergence.
              From hidden states only the lm_head's rows at these ids are needed.
            * "renormalize": the teacher is rescaled to 1 over the stored ids, the student stays over
              the whole vocabulary. ForwardKL only.
            * "truncate": sum t log(t / q) as it stands: biased for top-k (it may be negative),
              unbiased in its gradient for samples. ForwardKL only.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the tail is unknown.

    >>> ids = torch.tensor([[3, 7, -1], [0, 1, 2]])
    >>> target = SparseTarget(ids, torch.tensor([[-0.1, -3.0, 0.0], [-1.0, -2.0, -2.5]]))
    >>> target.leading_shape, target.slots, target[:1].ids.shape
    (torch.Size([2]), 3, torch.Size([1, 3]))
    """

    ids: Tensor
    logprobs: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = field(default=None, kw_only=True)
    tail: Tail = field(default="bucket", kw_only=True)

    def __post_init__(self) -> None:
        if (self.logprobs is None) == (self.weights is None):
            both = "both" if self.weights is not None else "neither"
            raise ValueError(f"SparseTarget needs exactly one of logprobs and weights, got {both}")
        if self.tail not in TAILS:
            raise ValueError(f"unknown tail {self.tail!r}; there are {', '.join(TAILS)}")
        for name in ("ids", self._kind) if self.mask is None else ("ids", self._kind, "mask"):
            check_tensor(f"SparseTarget's {name}", getattr(self, name))
        if self.ids.dim() < 1 or self.ids.shape[-1] == 0:
            raise ValueError(f"SparseTarget needs ids [..., K] with K >= 1, got {tuple(self.ids.shape)}")
        if self.ids.dtype != torch.int64:
            raise ValueError(f"SparseTarget needs int64 ids, got {self.ids.dtype}")
        if not self.values.is_floating_point():
            raise ValueError(f"SparseTarget needs floating {self._kind}, got {self.values.dtype}")
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ValueError(f"SparseTarget needs a bool mask, got {self.mask.dtype}")
        for name, tensor in ((self._kind, self.values), ("mask", self.mask)):
            if tensor is None:
                continue
            if tensor.shape != self.ids.shape:
                raise ValueError(
                    f"SparseTarget has ids {tuple(self.ids.shape)} but {name} {tuple(tensor.shape)}"
                )
            if tensor.device != self.ids.device:
                raise ValueError(f"SparseTarget has ids on {self.ids.device} but {name} on {tensor.device}")

    @property
    def _kind(self) -> str:
        return "weights" if self.logprobs is None else "logprobs"

    @property
    def values(self) -> Tensor:
        """``logprobs`` or ``weights``, whichever was given."""
        values = self.weights if self.logprobs is None else self.logprobs
        assert values is not None
        return values

    @property
    def leading_shape(self) -> torch.Size:
        return self.ids.shape[:-1]

    @property
    def slots(self) -> int:
        """K, the most slots that a token has."""
        return self.ids.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def _each(self, change) -> SparseTarget:
        tensors = {name: getattr(self, name) for name in ("ids", "logprobs", "weights", "mask")}
        return self._with(**{name: change(t) for name, t in tensors.items() if t is not None})

    def _with(self, **tensors: Any) -> SparseTarget:
        return replace(self, **tensors)

    def __getitem__(self, index) -> SparseTarget:
        """The target of some tokens: ``index`` goes over the leading dimensions only. IndexError where it has more."""
        self.ids[..., 0][index]  # without slots there is no dimension for more
        index = index if isinstance(index, tuple) else (index,)
        last = slice(None) if any(i is Ellipsis for i in index) else Ellipsis
        return self._each(lambda t: t[(*index, last)])

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> SparseTarget:
        """The same target on another device, or with its values (ids stay int64) in another dtype.

        >>> target = SparseTarget(torch.tensor([[3, 7]]), torch.tensor([[-0.1, -3.0]]))
        >>> target.to(torch.bfloat16).logprobs.dtype, target.to("cpu", torch.float64).ids.dtype
        (torch.bfloat16, torch.int64)
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        moved = self._each(lambda t: t.to(device or t.device, non_blocking=non_blocking))
        return moved if dtype is None else moved._with(**{self._kind: moved.values.to(dtype)})

    def pin_memory(self) -> SparseTarget:
        """The same target in pinned memory; a DataLoader with ``pin_memory=True`` calls this."""
        return self._each(lambda t: t.pin_memory())

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # checked again: a file may hold anything

    def _padded(self, shape: tuple[int, ...], masked: bool) -> SparseTarget:
        """Padded with empty slots to ``shape`` ``[..., K]``; with a mask if ``masked``."""
        nothing = 0.0 if self.logprobs is None else -torch.inf
        grow = [n for have, want in zip(reversed(self.ids.shape), reversed(shape)) for n in (0, want - have)]
        mask = torch.ones_like(self.ids, dtype=torch.bool) if masked and self.mask is None else self.mask
        if not any(grow) and mask is self.mask:
            return self
        return self._with(
            ids=F.pad(self.ids, grow, value=-1),
            mask=None if mask is None else F.pad(mask, grow, value=False),
            **{self._kind: F.pad(self.values, grow, value=nothing)},
        )

    @staticmethod
    def cat(targets: Sequence[SparseTarget], dim: int = 0) -> SparseTarget:
        """Joins the targets along the leading dimension ``dim``. K may differ: narrower
        ones get empty slots. ValueError unless tails are the same and all hold log-probabilities or weights.

        >>> one, two = (SparseTarget(torch.zeros(2, k, dtype=torch.int64), torch.zeros(2, k)) for k in (1, 3))
        >>> SparseTarget.cat([one, two]).ids.shape
        torch.Size([4, 3])
        """
        wide = _of_one_width(targets)
        dim = _leading(dim, len(wide[0].leading_shape))
        return _joined(wide, lambda tensors: torch.cat(tensors, dim))

    @staticmethod
    def stack(targets: Sequence[SparseTarget], dim: int = 0) -> SparseTarget:
        """As :meth:`cat`, along a new leading dimension; what ``default_collate`` of a DataLoader does."""
        wide = _of_one_width(targets)
        dim = _leading(dim, len(wide[0].leading_shape) + 1)
        return _joined(wide, lambda tensors: torch.stack(tensors, dim))

    @staticmethod
    def collate(targets: Sequence[SparseTarget]) -> SparseTarget:
        """A batch ``[B, T, K]`` of sequences ``[T, K]`` of several lengths: shorter ones end in tokens without any
        slot, which count as tokens unless labels or a mask say otherwise.

        >>> one, two = (SparseTarget(torch.zeros(t, 2, dtype=torch.int64), torch.zeros(t, 2)) for t in (1, 3))
        >>> SparseTarget.collate([one, two]).ids[0].tolist()
        [[0, 0], [-1, -1], [-1, -1]]
        """
        targets, slots, masked = _alike(targets)
        longest = max(t.ids.shape[0] for t in targets)
        wide = [t._padded((longest, *t.ids.shape[1:-1], slots), masked) for t in targets]
        return _joined(wide, torch.stack)

    # What other programs wrote; kdkernels.targets.records says what shape each of them has.

    @classmethod
    def from_vllm(cls, prompt_logprobs, *, top_k: int | None = None, tail: Tail = "bucket") -> SparseTarget:
        """[T, K] of vLLM's ``prompt_logprobs`` of one prompt; see :func:`kdkernels.targets.records.vllm`."""
        return cls(*records.vllm(prompt_logprobs, top_k=top_k), tail=tail)

    @classmethod
    def from_distillkit(cls, row, config, *, tail: Tail = "bucket") -> SparseTarget:
        """[T, K] of a row of DistillKit's captured logits; see :func:`kdkernels.targets.records.distillkit`."""
        return cls(*records.distillkit(row, config), tail=tail)

    @classmethod
    def from_axolotl(cls, row, *, shift: int = 0, tail: Tail = "bucket") -> SparseTarget:
        """[T, K] or [B, T, K] of axolotl's columns; see :func:`kdkernels.targets.records.axolotl`."""
        return cls(*records.axolotl(row, shift=shift), tail=tail)

    @classmethod
    def from_trl_server(
        cls, result, *, prompt_lengths=None, length: int | None = None, tail: Tail = "bucket"
    ) -> SparseTarget:
        """[B, T, K] of what TRL's teacher server answers; see :func:`kdkernels.targets.records.trl_server`."""
        return cls(*records.trl_server(result, prompt_lengths=prompt_lengths, length=length), tail=tail)

    @classmethod
    def from_tinker(cls, topk_prompt_logprobs, *, tail: Tail = "bucket") -> SparseTarget:
        """[T, K] of tinker's ``topk_prompt_logprobs``; see :func:`kdkernels.targets.records.tinker`."""
        return cls(*records.tinker(topk_prompt_logprobs), tail=tail)

    @classmethod
    def from_megatron(cls, payload, *, tail: Tail = "bucket") -> SparseTarget:
        """[B, S, K] of Megatron-LM's cached logits; see :func:`kdkernels.targets.records.megatron`."""
        return cls(*records.megatron(payload), tail=tail)


def _of_one_width(targets: Sequence[SparseTarget]) -> list[SparseTarget]:
    targets, slots, masked = _alike(targets)
    return [t._padded((*t.leading_shape, slots), masked) for t in targets]


def _alike(targets: Sequence[SparseTarget]) -> tuple[list[SparseTarget], int, bool]:
    """(the targets, the slots of the widest, whether any has a mask). ValueError where they cannot be one."""
    targets = list(targets)
    if not targets:
        raise ValueError("expected at least one SparseTarget, got none")
    for what in ("tail", "_kind"):
        found = {getattr(t, what) for t in targets}
        if len(found) > 1:
            raise ValueError(f"SparseTargets of one batch must agree, got {', '.join(sorted(found))}")
    return targets, max(t.slots for t in targets), any(t.mask is not None for t in targets)


def _leading(dim: int, count: int) -> int:
    """``dim`` of ``count`` leading dimensions, from 0 on. The slots are none of them."""
    if not -count <= dim < count:
        raise IndexError(f"dim={dim} is none of the {count} leading dimensions of these SparseTargets")
    return dim % count


def _joined(targets: list[SparseTarget], join: Callable[[list[Tensor]], Tensor]) -> SparseTarget:
    tensors = {name: [getattr(t, name) for t in targets] for name in ("ids", "logprobs", "weights", "mask")}
    return targets[0]._with(**{n: join(given) for n, given in tensors.items() if given[0] is not None})


# torch.load with weights_only=True, its default, reads these; so does a DataLoader's default_collate.
torch.serialization.add_safe_globals([SparseTarget])
data_utils.collate.default_collate_fn_map[SparseTarget] = lambda batch, **_: SparseTarget.stack(batch)
