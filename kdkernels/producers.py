"""Sparse targets from a live teacher: its top entries, samples of it, or what it says of given ids.

Logits of a LinearHead are made for a chunk of tokens at a time; the whole ``[tokens, vocab]`` never is.
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import chosen_backend, serving
from .backends.protocol import Tile
from .backends.row_state import Normaliser, new_state, student_side
from .backends.spec import LogitMap, Spec
from .checks import check_plain, check_tensor, integer, number, positive_integer, require
from .core.option_checks import checked
from .core.schedule import DEFAULT_CHUNK_BYTES
from .core.sides import common_vocab, side
from .core.tiles import rows_of
from .dtypes import wide
from .heads import LinearHead
from .operators import operator
from .targets import SparseTarget, Tail

#: Samples per token in Gemma 2 and 3 (arXiv 2408.00118, 2503.19786): ``sample_target(teacher, GEMMA_SAMPLES)``.
GEMMA_SAMPLES = 256
#: fp64 rows alive at once in the widest of the selections below, beside the teacher's own tile.
_TEMPORARIES = 6
#: On a CPU, bytes of one of them at a time: malloc gives the pages of larger ones back, and each pass faults them in again.
_PIECE_BYTES = 4 * 2**20
#: Entries that top_p looks at first, and how many times more where those have not the mass. Sorting all of a large
#: vocabulary takes far longer than finding its first.
_FIRST_SLOTS, _MORE_SLOTS = 128, 8

Logits = Tensor | LinearHead
_Select = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class _Given(NamedTuple):
    """A checked teacher, as the operators below take it: what :class:`Side` says of it, cut to ``vocab``."""

    teacher: list[Tensor]
    logit_map: list[float]
    vocab: int
    chunk_bytes: int


def _given(teacher: Logits, vocab_size: int | None, chunk_bytes: int | None) -> _Given:
    options = checked(vocab_size=vocab_size, chunk_bytes=chunk_bytes)
    if isinstance(teacher, SparseTarget):
        raise TypeError(
            "teacher is a kd.SparseTarget already; give the logits or the kd.LinearHead that it is of"
        )
    of = side("teacher", teacher)
    for tensor in of.tensors:
        check_plain("teacher", tensor)
    if of.shard is not None:
        raise ValueError("a sparse target is taken from a teacher's whole vocabulary, not from a shard of it")
    vocab = common_vocab(of, None, options["vocab_size"])
    tensors = [t.detach() for t in of.tensors]
    return _Given(tensors, list(of.logit_map), vocab, options["chunk_bytes"] or DEFAULT_CHUNK_BYTES)


def _normaliser(logits: Tensor, skipped: Tensor | None = None) -> Normaliser:
    """log sum exp of each row but for the ids ``skipped`` (ascending), ``[rows, 1]`` fp64."""
    spec, state = Spec(), new_state(logits.shape[0], logits.device)
    backend = serving(chosen_backend(), logits.device, [logits.dtype], spec)
    one = torch.ones(1, dtype=torch.float64, device=logits.device)
    backend.accumulate(Tile(logits, None, None, one, one, 0, logits.shape[1]), spec, state, skipped)
    of = student_side(state)
    return Normaliser(of.reference[:, None], of.log_sum_exp[:, None])


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities in fp64) of the ``k`` largest entries of each row.

    They enter the normaliser in fp64 and only the rest in a backend's fp32: so the mass they leave
    keeps its digits, however small, and is the rest's as the loss takes it from a student's logits.
    """
    values, ids = logits.topk(k, -1)
    rest = _normaliser(logits, ids.sort(-1).values) if k < logits.shape[1] else None
    return ids, _normalised(values.double(), rest)


def _normalised(values: Tensor, rest: Normaliser | None) -> Tensor:
    """Logits ``[rows, K]`` as log-probabilities, where those of all others have the log sum exp ``rest`` ``[rows, 1]``.

    What the largest leaves of the mass is added up beside it and not to it, so that it keeps its digits.
    """
    top, at = values.max(-1, keepdim=True)
    values = values - torch.where(top == -torch.inf, 0.0, top)  # a row of empty slots stays one
    normaliser = values.exp().scatter(-1, at, 0.0).sum(-1, keepdim=True).log1p()
    if rest is not None:
        normaliser = torch.logaddexp(normaliser, rest.reference - top + rest.log_sum_exp)
    return torch.where(values == -torch.inf, values, values - normaliser)


def _unfilled(teacher: list[Tensor], slots: int) -> tuple[Tensor, Tensor]:
    """Ids and values ``[..., slots]`` to be written."""
    first, shape = teacher[0], (*teacher[0].shape[:-1], slots)
    return first.new_empty(shape, dtype=torch.int64), first.new_empty(shape, dtype=wide(first.dtype))


def _collect(given: _Given, nothing: float, select: _Select, least: int = 1) -> tuple[Tensor, Tensor]:
    """``select(logits [rows, vocab], rows)`` gives (ids, values) ``[rows, K']``; here for all tokens, padded to
    one K, which is ``least`` where there is no token."""
    leading, device = given.teacher[0].shape[:-1], given.teacher[0].device
    step = max(given.chunk_bytes // (given.vocab * 8 * _TEMPORARIES), 1)
    source = rows_of(given.teacher, given.vocab, [], None)
    source.gather()
    logit_map, columns = LogitMap(*given.logit_map), slice(0, given.vocab)
    # Written into place: small results that outlive each chunk would leave the heap in pieces.
    slots = 0 if source.tokens else least
    all_ids, all_values = (t.view(source.tokens, slots) for t in _unfilled(given.teacher, slots))
    with torch.autocast(device.type, enabled=False):
        for start in range(0, source.tokens, step):
            rows = slice(start, min(start + step, source.tokens))
            tile = source.tile(rows, columns)
            if not logit_map.is_identity:
                tile = logit_map.logits(tile, wide(tile.dtype))
            ids, values = select(tile, rows)
            slots = ids.shape[1]
            more = max(slots - all_ids.shape[1], 0)
            all_ids = F.pad(all_ids, (0, more), value=-1) if more else all_ids
            all_values = F.pad(all_values, (0, more), value=nothing) if more else all_values
            all_ids[rows, :slots], all_values[rows, :slots] = ids, values
    return all_ids.view(*leading, all_ids.shape[1]), all_values.view(*leading, all_ids.shape[1])


# Operators, because a compiler could not follow: shapes decide how many chunks there are, values how many slots.


@operator("top_k")
def _top_k(
    teacher: list[Tensor], logit_map: list[float], vocab: int, chunk_bytes: int, k: int
) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities) ``[..., k]`` of the ``k`` largest entries."""
    given = _Given(teacher, logit_map, vocab, chunk_bytes)
    return _collect(given, -torch.inf, lambda logits, _: _top(logits, k), least=k)


@torch.library.register_fake(_top_k)
def _(teacher, logit_map, vocab, chunk_bytes, k):
    return _unfilled(teacher, k)


@operator("target_at")
def _target_at(
    teacher: list[Tensor], logit_map: list[float], vocab: int, chunk_bytes: int, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities) at ``ids`` ``[..., K]``; -1 where an id is one already, or was there before."""
    flat = ids.reshape(-1, ids.shape[-1])
    require(
        (flat < -1) | (flat >= vocab),
        flat,
        f"target_at got the id {{}} at token {{}}; ids must be in [0, {vocab}), or -1 for an empty slot",
    )

    def select(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        asked = _first_of_each(flat[rows])
        values = logits.gather(-1, asked.clamp(min=0)).double()
        values = torch.where(asked >= 0, values, -torch.inf)
        return asked, _normalised(values, _normaliser(logits, asked.sort(-1).values))

    return _collect(_Given(teacher, logit_map, vocab, chunk_bytes), -torch.inf, select, least=ids.shape[-1])


@torch.library.register_fake(_target_at)
def _(teacher, logit_map, vocab, chunk_bytes, ids):
    return _unfilled(teacher, ids.shape[-1])


def _first_of_each(ids: Tensor) -> Tensor:
    """``ids`` ``[rows, K]`` with -1 where a row has the same id further left."""
    ascending, order = ids.sort(dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
    return ids.masked_fill(torch.zeros_like(again).scatter_(-1, order, again), -1)


@operator("top_p")
def _top_p(
    teacher: list[Tensor], logit_map: list[float], vocab: int, chunk_bytes: int, p: float, most: int
) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities) of the fewest entries that hold the mass ``p``, of the ``most`` largest."""

    def select(logits: Tensor, _: slice) -> tuple[Tensor, Tensor]:
        k = most if p == 1 else min(_FIRST_SLOTS, most)
        ids, values, short = _nucleus(logits, p, k)
        left = short.nonzero()[:, 0]
        while k < most and len(left):
            k = min(k * _MORE_SLOTS, most)
            more_ids, more_values, short = _nucleus(logits[left], p, k)
            wider = max(more_ids.shape[1] - ids.shape[1], 0)
            ids, values = F.pad(ids, (0, wider), value=-1), F.pad(values, (0, wider), value=-torch.inf)
            ids[left, : more_ids.shape[1]], values[left, : more_ids.shape[1]] = more_ids, more_values
            left = left[short]
        return ids, values

    return _collect(_Given(teacher, logit_map, vocab, chunk_bytes), -torch.inf, select)


def _nucleus(logits: Tensor, p: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, log-probabilities) of the fewest of the ``k`` largest entries that hold the mass ``p``, and the rows whose
    ``k`` do not."""
    ids, values = _top(logits, k)
    mass = values.exp()
    total = mass.cumsum(-1)
    chosen = (total - mass < p) & (values > -torch.inf)
    chosen[:, :1] |= values[:, :1].isnan()  # a teacher of NaN is one slot of NaN, which the loss refuses
    slots = max(int(chosen.sum(-1).max()), 1)
    short = (total[:, -1] < p) & (values[:, -1] > -torch.inf)
    chosen, ids, values = chosen[:, :slots], ids[:, :slots], values[:, :slots]
    return torch.where(chosen, ids, -1), torch.where(chosen, values, -torch.inf), short


@torch.library.register_fake(_top_p)
def _(teacher, logit_map, vocab, chunk_bytes, p, most):
    return _unfilled(teacher, torch.library.get_ctx().new_dynamic_size(min=1))


@operator("sample")
def _sample(
    teacher: list[Tensor],
    logit_map: list[float],
    vocab: int,
    chunk_bytes: int,
    draws: Tensor,
    proposal_temperature: float,
) -> tuple[Tensor, Tensor]:
    """(ids, weights) of what the ``draws`` ``[tokens, n]`` of :func:`_uniform` hit."""

    def piece(logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        normaliser = _normaliser(logits)
        logprobs = (logits - normaliser.reference).sub_(normaliser.log_sum_exp)
        if proposal_temperature == 1:  # all draws weigh the same; 0 * NaN keeps a teacher of NaN one
            each = 0 * normaliser.lse + 1 / draws.shape[1]
            return _inverted(logprobs.exp_(), draws), each.expand(draws.shape)
        proposal = (logprobs / proposal_temperature).log_softmax(-1)
        drawn = _inverted(proposal.exp(), draws)
        each = (logprobs.gather(-1, drawn) - proposal.gather(-1, drawn)).exp() / draws.shape[1]
        return drawn, each

    def select(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        size = max(_PIECE_BYTES // (8 * vocab), 1) if logits.device.type == "cpu" else len(logits)
        made = map(piece, logits.split(size), draws[rows].split(size))
        return _added_up(*map(torch.cat, zip(*made)))

    return _collect(_Given(teacher, logit_map, vocab, chunk_bytes), 0.0, select)


@torch.library.register_fake(_sample)
def _(teacher, logit_map, vocab, chunk_bytes, draws, proposal_temperature):
    return _unfilled(teacher, torch.library.get_ctx().new_dynamic_size(min=1))


def top_k_target(
    teacher: Logits,
    k: int,
    *,
    tail: Tail = "bucket",
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> SparseTarget:
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
    given, k = _given(teacher, vocab_size, chunk_bytes), integer("k", k)
    if not 1 <= k <= given.vocab:
        raise ValueError(f"k={k} must be in 1..{given.vocab}, the vocabulary")
    ids, logprobs = _top_k(*given, k)
    return SparseTarget(ids, logprobs, tail=tail)


def target_at(
    teacher: Logits,
    ids: Tensor,
    *,
    tail: Tail = "bucket",
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> SparseTarget:
    """The teacher's log-probabilities at ``ids``: of the tokens that a student finds probable, say.

    On-policy distillation compares the models where the student's mass is. Its own top entries are
    ``kd.top_k_target(student, k).ids``, which carry no gradient, and the union with the teacher's is
    ``torch.cat([students, kd.top_k_target(teacher, k).ids], -1)``.

    Args:
        ids: int64 ``[..., K]`` with the teacher's leading shape, or -1 for an empty slot. What a token names twice is
            stored once, at the first place; the other becomes -1.

    Other arguments and errors as in :func:`top_k_target`; ValueError for ids out of range too (a device-side
    assertion on an accelerator).

    >>> student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> ids = torch.cat([top_k_target(model, 2).ids for model in (student, teacher)], -1)
    >>> ids, target_at(teacher, ids).ids
    (tensor([[2, 1, 0, 1]]), tensor([[ 2,  1,  0, -1]]))
    """
    given = _given(teacher, vocab_size, chunk_bytes)
    check_tensor("ids", ids)
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64, got {ids.dtype}")
    leading = given.teacher[0].shape[:-1]
    if ids.dim() < 1 or ids.shape[:-1] != leading or ids.shape[-1] == 0:
        raise ValueError(
            f"ids must be {(*leading, 'K')} with K >= 1, as the teacher's tokens, got {tuple(ids.shape)}"
        )
    if ids.device != given.teacher[0].device:
        raise ValueError(f"ids are on {ids.device}, teacher on {given.teacher[0].device}")
    ids, logprobs = _target_at(*given, ids)
    return SparseTarget(ids, logprobs, tail=tail)


def top_p_target(
    teacher: Logits,
    p: float,
    *,
    max_k: int | None = None,
    tail: Tail = "bucket",
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> SparseTarget:
    """The fewest entries of each token that hold at least the mass ``p``: K differs by token.

    ``max_k`` bounds how many are stored, at the price of less mass where the teacher is undecided; it
    also saves sorting the whole vocabulary. The target is as wide as its widest token. Other
    arguments and errors as in :func:`top_k_target`; p must be in (0, 1].

    >>> top_p_target(torch.tensor([[5.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), 0.8).ids
    tensor([[ 0, -1],
            [ 0,  1]])
    """
    given, p = _given(teacher, vocab_size, chunk_bytes), number("p", p)
    if not 0 < p <= 1:
        raise ValueError(f"p={p} must be in (0, 1]")
    most = given.vocab if max_k is None else min(positive_integer("max_k", max_k), given.vocab)
    ids, logprobs = _top_p(*given, p, most)
    return SparseTarget(ids, logprobs, tail=tail)


def sample_target(
    teacher: Logits,
    n: int,
    proposal_temperature: float = 1.0,
    *,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> SparseTarget:
    """``n`` draws of each token with replacement: random sampling distillation (arXiv 2503.16870).

    Draws come from softmax(logits / proposal_temperature); an entry's weight is the sum over its
    draws of p / (n proposal), which is its count / n at proposal_temperature 1. So the expected
    weight is p, and the forward KL's gradient is unbiased (tail "truncate"). Entries drawn several
    times take one slot; the target is as wide as its widest token, at most n.

    Args:
        n: draws per token, at least 1; :data:`GEMMA_SAMPLES` is Gemma's 256.
        proposal_temperature: > 0; above 1 rare entries are drawn more often, with smaller weights.
        generator: on the teacher's device; torch's default if None, as it must be inside torch.compile.
            There inductor draws other numbers for the same seed, of the same distribution.

    Other arguments and errors as in :func:`top_k_target`.

    >>> target = sample_target(torch.randn(3, 100), GEMMA_SAMPLES)
    >>> target.tail, target.weights.sum(-1).allclose(torch.ones(3))
    ('truncate', True)
    """
    given, n = _given(teacher, vocab_size, chunk_bytes), positive_integer("n", n)
    proposal_temperature = number("proposal_temperature", proposal_temperature)
    if not proposal_temperature > 0:
        raise ValueError(f"proposal_temperature={proposal_temperature} must be > 0")
    ids, weights = _sample(*given, _uniform(given.teacher[0], n, generator), proposal_temperature)
    return SparseTarget(ids, weights=weights, tail="truncate")


def _uniform(of: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """``n`` whole numbers below 2^53 for each token of ``of`` ``[..., W]``: all that fp64 tells apart in [0, 1).

    Drawn outside of the operator, since a compiler takes two calls with the same arguments for one; and not by
    torch.rand, which inductor makes of fp32 numbers.
    """
    if generator is not None and torch.compiler.is_compiling():
        raise RuntimeError(
            "sample_target's generator cannot be compiled; leave it out and call "
            "torch.manual_seed before the compiled function"
        )
    size = (math.prod(of.shape[:-1]), n)
    if generator is None:  # not passed on: beside one, torch takes no size that a compiler does not know
        return torch.randint(2**53, size, dtype=torch.int64, device=of.device)
    return torch.randint(2**53, size, dtype=torch.int64, device=of.device, generator=generator)


def _inverted(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Ids ``[rows, n]``, ascending, by inverting the distribution function in fp64 at draws / 2^53."""
    mass = probabilities.cumsum(-1)
    total = mass[:, -1:]
    u = draws.to(mass.dtype) * 2.0**-53 * total
    # Rounded up to the total, u would lie beyond the last entry that has any mass.
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total))).sort(-1).values
    return torch.searchsorted(mass, u, right=True).clamp(
        max=mass.shape[1] - 1
    )  # beyond: where the mass is NaN


def _added_up(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending ids with duplicates -> each once with the sum of its weights, -1 behind them."""
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = new.cumsum(-1) - 1
    slots = int(slot.max()) + 1
    once = torch.full_like(ids[:, :slots], -1).scatter_(1, slot, ids)
    return once, torch.zeros_like(weights[:, :slots]).scatter_add_(1, slot, weights)
