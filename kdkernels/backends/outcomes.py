"""A sparse target as a small dense problem: the distinct stored ids, and one outcome for the rest.

Every tail compares K + 1 outcomes with the dense divergences. With t the stored weights, each id
once, a = sum t, T the temperature, and z the student's logits:

============ ========================= ============================= ============ =======================
tail         teacher's log-masses      student's log-masses          at           the row's soft term
============ ========================= ============================= ============ =======================
bucket       log t_k, log(1 - a)       z_k, lse of the other z       T            D
renormalize  log t_k / T, nothing      z_k / T, lse of the other z/T 1            D
truncate     log t_k, nothing          z_k / T, lse of the other z/T 1            a D + a log a
conditional  log t_k, nothing          z_k, nothing                  T            D
============ ========================= ============================= ============ =======================

The divergence normalises both columns. So at T != 1 "conditional" and "renormalize" are exactly what
the teacher's logits at these ids would give; "bucket" tempers the K + 1 masses, tail included, since
the tail's shape was not stored; "truncate" takes t as the teacher's distribution at T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import require, warn
from ..divergences import Divergence, ForwardKL, NoDivergence, simplified
from .spec import Asked, Spec, Tail

#: The tail's mass where the stored weights leave none, rounding included: far less than any of them
#: resolves, and enough to keep every divergence finite. A tail that may be rounding alone is no outcome where
#: the student has no rest either.
LEAST_TAIL = 2.0**-40
#: How far above 1 a stored distribution may sum, at the least: producers sum in fp32.
_SLACK = 1e-4


class Outcomes(NamedTuple):
    """The outcomes of n tokens. A token without slots has one outcome, the rest, with mass 1, and scale 0."""

    ids: Tensor  # int64 [n, K], ascending and distinct, with -1 for "none" anywhere in between
    teacher: Tensor  # [n, K + 1], log-masses; -inf where there is none; the rest comes last
    scale: Tensor  # [n] fp64, the row's soft term is scale * D + constant
    constant: Tensor  # [n] fp64
    rounding: Tensor  # [n] bool: the teacher's rest may be rounding alone


_APPROXIMATE = {
    "bucket": "tempers the stored mass and the tail's as K + 1 outcomes, since the tail's shape was not stored",
    "truncate": "takes the stored weights as they are, tempering the student only",
}


def check_divergence(tail: str, divergence: Divergence) -> None:
    """ValueError for a divergence that the tail cannot define."""
    if tail in ("renormalize", "truncate") and simplified(divergence) != ForwardKL():
        raise ValueError(
            f"tail={tail!r} defines kd.ForwardKL() only, got {divergence!r}; tail='bucket' and "
            "tail='conditional' take any divergence"
        )


def warn_if_approximate(spec: Spec) -> None:
    """A warning where the tail does not say what the teacher is at that temperature."""
    tail = Tail(spec.tail).word if spec.tail and spec.tempered else None
    if tail not in _APPROXIMATE:
        return
    # The temperature's value is left out on purpose: Python shows a warning's text once per line of the
    # caller, and an annealed temperature would make a new text at every step.
    warn(
        f"a temperature other than 1 with tail={tail!r} {_APPROXIMATE[tail]}; tail='conditional' and "
        "tail='renormalize' are exact at any temperature"
    )


def student_spec(spec: Spec) -> Spec:
    """What the pass over the student's logits is told: the hard term, and where log-masses are taken."""
    tempered = int(spec.tempered and Tail(spec.tail).tempers_student)
    return spec._replace(
        kind=NoDivergence.code,
        tail=Tail.DENSE,
        asked=spec.asked & (Asked.HARD | Asked.ENTROPY),
        tempered=tempered,
    )


def outcome_spec(spec: Spec) -> Spec:
    """The dense problem over outcomes."""
    tempered = int(spec.tempered and not Tail(spec.tail).tempers_student)
    return Spec(kind=spec.kind, asked=Asked.SOFT, tempered=tempered, stats=spec.stats)


def outcomes(ids: Tensor, values: Tensor, temperature: Tensor, spec: Spec, *, dtype: torch.dtype) -> Outcomes:
    """Checked ids and values ``[n, K]`` as outcomes, with the teacher's log-masses in ``dtype``.

    All that comes out is contiguous: what torch makes of a transposed tensor is often transposed too.
    """
    ids, values = ids.contiguous(), values.contiguous()
    ids, log_t = _distinct(ids, _log_weights(ids, values, bool(spec.linear)))
    tail = torch.full_like(log_t[:, 0], -torch.inf)
    some = (ids >= 0).any(-1)
    scale, constant, rounding = some.to(tail.dtype), torch.zeros_like(tail), torch.zeros_like(some)
    if spec.tail == Tail.BUCKET:
        rest, slack = missing_mass(log_t, values.dtype)
        tail, rounding = torch.where(rest > 0, rest, LEAST_TAIL).log(), some & (rest <= slack)
    elif spec.tail == Tail.RENORMALIZE:
        log_t = log_t / temperature[:, None]
    elif spec.tail == Tail.TRUNCATE:
        log_a = log_t.logsumexp(-1)
        scale = log_a.exp()
        constant = (scale * log_a).masked_fill_(~some, 0.0)
    tail.masked_fill_(~some, 0.0)
    return Outcomes(ids, torch.cat([log_t, tail[:, None]], 1).to(dtype), scale, constant, rounding)


def _log_weights(ids: Tensor, values: Tensor, linear: bool) -> Tensor:
    log_t = values.double().log() if linear else values.to(torch.float64, copy=True)
    return log_t.masked_fill_(ids < 0, -torch.inf)


def _ascending(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the ids in ascending order, -1 last; the order; whether an id is the first of its kind)."""
    last = torch.iinfo(torch.int64).max  # which is -1 without its sign
    ids, order = (ids & last).sort(-1)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return ids.masked_fill_(ids == last, -1), order, new


def distinct_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(each id of a row ``[n, K]`` once, ascending, with -1 in between; where each given slot's id is there)."""
    if ids.shape[1] == 1:
        return ids, torch.zeros_like(ids)
    found, order, new = _ascending(ids)
    first = (torch.arange(ids.shape[1], device=ids.device) * new).cummax(-1).values
    return found.masked_fill_(~new, -1), torch.zeros_like(order).scatter_(1, order, first)


def _distinct(ids: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Each id once, ascending; what is stored under it several times is added up. ``log_t`` is -inf where an id is -1,
    and nowhere else."""
    if ids.shape[1] == 1:
        return ids, log_t
    ids, order, new = _ascending(ids)
    log_t = log_t.gather(1, order)
    if ids.device.type == "cpu" and not (~new & (ids >= 0)).any():  # elsewhere looking would stop the stream
        return ids, log_t
    group = new.cumsum(-1) - 1
    peak = torch.full_like(log_t, -torch.inf).scatter_reduce_(1, group, log_t, "amax").gather(1, group)
    each = (log_t - peak).exp_().masked_fill_(ids < 0, 0.0)
    total = torch.zeros_like(log_t).scatter_add_(1, group, each).gather(1, group)
    # log(1) is exactly 0: what is stored once comes out as it went in.
    ids.masked_fill_(~new, -1)
    return ids, (peak + total.log_()).masked_fill_(ids < 0, -torch.inf)


def missing_mass(log_t: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """(1 - a, what of it may be rounding) of distinct outcomes, ``[n]`` fp64.

    The largest weight enters as -expm1(log t), which keeps the digits of a tail that is tiny beside it.
    """
    top, at = log_t.max(-1)
    t = log_t.exp()
    rest = -torch.expm1(top) - t.scatter(1, at[:, None], 0.0).sum(-1)
    spread = (t * (1 + log_t.abs())).masked_fill_(t == 0, 0.0).sum(-1)
    return rest, torch.clamp(4 * torch.finfo(stored).eps * spread, min=_SLACK)


def checked_slots(
    ids: Tensor,
    values: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    spec: Spec,
    vocab: int,
) -> Tensor:
    """Ids ``[N, K]`` with -1 in every empty slot and for every masked token.

    ValueError on the CPU, a device-side assertion on an accelerator (looking would stop the stream)
    for what is neither empty nor masked and is out of range.
    """
    ids, values = ids.reshape(-1, ids.shape[-1]), values.reshape(-1, values.shape[-1])
    linear = bool(spec.linear)
    nothing = 0.0 if linear else -torch.inf
    empty = values == nothing
    if mask is not None:
        empty = empty | ~mask.reshape(ids.shape)
    if labels is not None:
        empty = empty | (labels < 0)[:, None]
    ids = ids.masked_fill(empty, -1)
    kind = "weights" if linear else "logprobs"
    good = (values > 0) & (values < torch.inf) if linear else values < torch.inf
    require(
        (ids < -1) | (ids >= vocab),
        ids,
        f"SparseTarget has the id {{}} at token {{}}; ids must be in [0, {vocab}), or -1 for an empty slot",
    )
    require(
        ~good & (ids != -1),
        values,
        f"SparseTarget has {kind} of {{}} at token {{}}; they must be "
        + ("finite and >= 0" if linear else "finite, or -inf for an empty slot"),
    )
    if spec.tail == Tail.BUCKET:
        _check_bucket(ids, _log_weights(ids, values, linear), values.dtype, vocab)
    return ids


def _check_bucket(ids: Tensor, log_t: Tensor, dtype: torch.dtype, vocab: int) -> None:
    """The stored weights leave a rest of at least 0, and of 0 where all ids are stored."""
    rest, slack = missing_mass(log_t, dtype)
    require(
        rest < -slack,
        1 - rest,
        "tail='bucket' needs weights that sum to at most 1, but they sum to {} at token {}; "
        "rescale them, or take tail='conditional', 'renormalize' or 'truncate'",
    )
    if ids.shape[1] >= vocab:
        distinct, _ = _distinct(ids, log_t)
        require(
            ((distinct >= 0).sum(-1) == vocab) & (rest > slack),
            1 - rest,
            f"tail='bucket' has all {vocab} ids and so no rest, but their weights sum to {{}} at token {{}}; "
            "rescale them, or take tail='conditional' or 'renormalize'",
        )
