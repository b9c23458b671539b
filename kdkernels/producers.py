"""Sparse targets from a live teacher: its top entries, or samples of it.

Logits of a LinearHead are made for a chunk of tokens at a time; the whole ``[tokens, vocab]`` never is.
"""

from __future__ import annotations

from typing import Callable, Iterator, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import checked, common_vocab, side
from .backends import chosen_backend, serving
from .backends import row_state as rs
from .checks import integer, number, positive_integer
from .divergences import NoDivergence
from .heads import HeadRows, LinearHead
from .schedule import DEFAULT_CHUNK_BYTES
from .spec import LogitMap, Spec
from .targets import SparseTarget

#: Samples per token in Gemma 2 and 3 (arXiv 2408.00118, 2503.19786): ``sample_target(teacher, GEMMA_SAMPLES)``.
GEMMA_SAMPLES = 256
#: fp64 rows alive at once in the widest of the selections below, beside the teacher's own tile.
_TEMPORARIES = 6

Logits = Union[Tensor, LinearHead]
_Select = Callable[[Tensor], tuple[Tensor, Tensor]]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _vocab(teacher: Logits, vocab_size: Optional[int]) -> int:
    given, vocab_size = side("teacher", teacher), checked(vocab_size=vocab_size)["vocab_size"]
    return common_vocab(given, None, vocab_size)


def _tiles(teacher: Logits, tensors: list[Tensor], vocab: int, step: int) -> Iterator[Tensor]:
    """Logits ``[rows, vocab]`` of ``step`` tokens at a time."""
    if isinstance(teacher, LinearHead):
        hidden, *rest = tensors
        rows = HeadRows([hidden.reshape(-1, hidden.shape[-1]), *rest], vocab, [])
        logit_map = LogitMap(float(teacher.logit_scale), float(teacher.softcap or 0.0))
        for start in range(0, rows.tokens, step):
            tile = rows.tile(slice(start, start + step), slice(0, vocab))
            if not logit_map.is_identity:
                tile = logit_map.logits(tile, _wide(tile.dtype))
            yield tile
        return
    leading = teacher.shape[:-1]
    for at in torch.arange(leading.numel(), device=teacher.device).split(step) if leading.numel() else ():
        try:
            yield teacher.view(-1, teacher.shape[-1])[int(at[0]) : int(at[-1]) + 1, :vocab]
        except RuntimeError:  # a shifted view, say: copied a chunk at a time, not as a whole
            yield teacher[torch.unravel_index(at, leading)][:, :vocab]


def _normalizer(logits: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
    """logsumexp of each row but for the ids ``skipped`` (ascending), ``[rows, 1]`` fp64."""
    state = rs.new_state(logits.shape[0], logits.device)
    backend = serving(chosen_backend(), logits.device, [logits.dtype])
    spec = Spec(NoDivergence())
    backend.accumulate(logits, None, None, offset=0, spec=spec, state=state, skipped=skipped)
    return rs.student_lse(state, spec)[:, None]


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities in fp64) of the ``k`` largest entries of each row.

    They enter the normaliser in fp64 and only the rest in a backend's fp32: so the mass they leave
    keeps its digits, however small, and is the rest's as the loss takes it from a student's logits.
    """
    values, ids = logits.topk(k, -1)
    values = values.double()
    top, values = values[:, :1], values - values[:, :1]
    normalizer = values.logsumexp(-1, keepdim=True)
    if k < logits.shape[1]:
        normalizer = torch.logaddexp(normalizer, _normalizer(logits, ids.sort(-1).values) - top)
    return ids, values - normalizer


@torch.no_grad()
def _collect(teacher: Logits, vocab: int, chunk_bytes: Optional[int], nothing: float,
             select: _Select, least: int = 1) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``select(logits [rows, vocab])`` gives (ids, values) ``[rows, K']``; here for all tokens, padded to
    one K, which is ``least`` where there is no token."""
    leading = teacher.leading_shape if isinstance(teacher, LinearHead) else teacher.shape[:-1]
    budget = checked(chunk_bytes=chunk_bytes)["chunk_bytes"] or DEFAULT_CHUNK_BYTES
    step = max(budget // (vocab * 8 * _TEMPORARIES), 1)
    tensors = teacher.tensors() if isinstance(teacher, LinearHead) else [teacher]
    device, tokens, start = tensors[0].device, leading.numel(), 0
    # Written into place: small results that outlive each chunk would leave the heap in pieces.
    all_ids = torch.empty(tokens, 0, dtype=torch.int64, device=device)
    all_values = torch.empty(tokens, 0, device=device)
    with torch.autocast(device.type, enabled=False):
        for tile in _tiles(teacher, tensors, vocab, step):
            ids, values = select(tile)
            rows, slots = slice(start, start + ids.shape[0]), ids.shape[1]
            more = max(slots - all_ids.shape[1], 0)
            all_ids = F.pad(all_ids, (0, more), value=-1) if more else all_ids
            all_values = F.pad(all_values.to(values.dtype), (0, more), value=nothing) if more else all_values
            all_ids[rows, :slots], all_values[rows, :slots] = ids, values
            start = rows.stop
    if not tokens:
        all_ids = F.pad(all_ids, (0, least))
        all_values = F.pad(all_values, (0, least)).to(_wide(tensors[0].dtype))
    return all_ids.view(*leading, all_ids.shape[1]), all_values.view(*leading, all_ids.shape[1])


def top_k_target(teacher: Logits, k: int, *, tail: str = "bucket", vocab_size: Optional[int] = None,
                 chunk_bytes: Optional[int] = None) -> SparseTarget:  # fmt: skip
    """The teacher's ``k`` most probable entries of each token, with their log-probabilities.

    Args:
        teacher: logits ``[..., V]`` or a :class:`LinearHead`.
        k: in 1..V.
        tail: what the loss does about the rest; see :class:`SparseTarget`.
        vocab_size: use only the first entries of the vocabulary (padding cut off).
        chunk_bytes: budget of the temporaries, default 512 MiB; at least one token is worked on.

    Raises:
        ValueError: k, vocab_size or chunk_bytes out of range, or logits that are not floating.

    >>> target = top_k_target(torch.tensor([[2.0, 0.0, 1.0, -1.0]]), 2)
    >>> target.ids, target.logprobs.exp().sum().item() < 1
    (tensor([[0, 2]]), True)
    """
    vocab, k = _vocab(teacher, vocab_size), integer("k", k)
    if not 1 <= k <= vocab:
        raise ValueError(f"k={k} must be in 1..{vocab}, the vocabulary")

    def select(logits: Tensor) -> tuple[Tensor, Tensor]:
        ids, logprobs = _top(logits, k)
        return ids, logprobs.to(_wide(logits.dtype))

    ids, logprobs = _collect(teacher, vocab, chunk_bytes, -torch.inf, select, least=k)
    return SparseTarget(ids, logprobs, tail=tail)


def top_p_target(teacher: Logits, p: float, *, max_k: Optional[int] = None, tail: str = "bucket",
                 vocab_size: Optional[int] = None, chunk_bytes: Optional[int] = None) -> SparseTarget:  # fmt: skip
    """The fewest entries of each token that hold at least the mass ``p``: K differs by token.

    ``max_k`` bounds how many are kept, at the price of less mass where the teacher is undecided; it
    also saves sorting the whole vocabulary. The target is as wide as its widest token. Other
    arguments and errors as in :func:`top_k_target`; p must be in (0, 1].

    >>> top_p_target(torch.tensor([[5.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), 0.8).ids
    tensor([[ 0, -1],
            [ 0,  1]])
    """
    vocab, p = _vocab(teacher, vocab_size), number("p", p)
    if not 0 < p <= 1:
        raise ValueError(f"p={p} must be in (0, 1]")
    most = vocab if max_k is None else min(positive_integer("max_k", max_k), vocab)

    def select(logits: Tensor) -> tuple[Tensor, Tensor]:
        ids, values = _top(logits, most)
        mass = values.exp()
        kept = (mass.cumsum(-1) - mass < p) & (values > -torch.inf)
        kept[:, :1] |= values[:, :1].isnan()  # a teacher of NaN is one slot of NaN, which the loss refuses
        slots = max(int(kept.sum(-1).max()), 1)
        kept, ids, values = kept[:, :slots], ids[:, :slots], values[:, :slots]
        return torch.where(kept, ids, -1), torch.where(kept, values, -torch.inf).to(_wide(logits.dtype))

    ids, logprobs = _collect(teacher, vocab, chunk_bytes, -torch.inf, select)
    return SparseTarget(ids, logprobs, tail=tail)


def sample_target(teacher: Logits, n: int, proposal_temperature: float = 1.0, *,
                  generator: Optional[torch.Generator] = None, vocab_size: Optional[int] = None,
                  chunk_bytes: Optional[int] = None) -> SparseTarget:  # fmt: skip
    """``n`` draws of each token with replacement: random sampling distillation (arXiv 2503.16870).

    Draws come from softmax(logits / proposal_temperature); an entry's weight is the sum over its
    draws of p / (n proposal), which is its count / n at proposal_temperature 1. So the expected
    weight is p, and the forward KL's gradient is unbiased (tail "truncate"). Entries drawn several
    times take one slot; the target is as wide as its widest token, at most n.

    Args:
        n: draws per token, at least 1; :data:`GEMMA_SAMPLES` is Gemma's 256.
        proposal_temperature: > 0; above 1 rare entries are drawn more often, with smaller weights.
        generator: on the teacher's device; torch's default if None.

    Other arguments and errors as in :func:`top_k_target`.

    >>> target = sample_target(torch.randn(3, 100), GEMMA_SAMPLES)
    >>> target.tail, target.weights.sum(-1).allclose(torch.ones(3))
    ('truncate', True)
    """
    vocab, n = _vocab(teacher, vocab_size), positive_integer("n", n)
    proposal_temperature = number("proposal_temperature", proposal_temperature)
    if not proposal_temperature > 0:
        raise ValueError(f"proposal_temperature={proposal_temperature} must be > 0")

    def select(logits: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = logits - _normalizer(logits)
        proposal = (logprobs / proposal_temperature).log_softmax(-1)
        drawn = _draw(proposal.exp(), n, generator)
        each = (logprobs.gather(-1, drawn) - proposal.gather(-1, drawn)).exp() / n
        ids, weights = _added_up(drawn, each)
        return ids, weights.to(_wide(logits.dtype))

    ids, weights = _collect(teacher, vocab, chunk_bytes, 0.0, select)
    return SparseTarget(ids, weights=weights, tail="truncate")


def _draw(probabilities: Tensor, n: int, generator: Optional[torch.Generator]) -> Tensor:
    """Ids ``[rows, n]``, ascending, by inverting the distribution function in fp64."""
    mass = probabilities.cumsum(-1)
    total = mass[:, -1:]
    u = torch.rand(mass.shape[0], n, dtype=mass.dtype, device=mass.device, generator=generator) * total
    # Rounded up to the total, u would lie beyond the last entry that has any mass.
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total))).sort(-1).values
    return torch.searchsorted(mass, u, right=True).clamp(max=mass.shape[1] - 1)  # beyond: where the mass is NaN


def _added_up(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending ids with duplicates -> each once with the sum of its weights, -1 behind them."""
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = new.cumsum(-1) - 1
    slots = int(slot.max()) + 1
    once = torch.full_like(ids[:, :slots], -1).scatter_(1, slot, ids)
    return once, torch.zeros_like(weights[:, :slots]).scatter_add_(1, slot, weights)
