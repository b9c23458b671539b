"""divergence=(A, B): which arguments go with a tuple of divergences."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends.spec import Asked
from ..divergences import Divergence
from ..targets import SparseTarget
from .option_checks import checked_divergence
from .request import Terms, Tokens
from .sides import Teacher


def checked_divergences(given: Any) -> tuple[Divergence, ...]:
    """One, or a tuple of them."""
    each = given if isinstance(given, tuple) else (given,)
    if not each:
        raise ValueError("divergence is an empty tuple; name one or more, such as (kd.ForwardKL(),)")
    return tuple(checked_divergence(divergence) for divergence in each)


def check_several(terms: Terms, given: Tokens, teacher: Teacher, inplace: bool) -> None:
    """ValueError for what does not go with a tuple of divergences."""
    if given.reduction != "none":
        raise ValueError(
            f'a tuple of divergences is a tuple of token losses: reduction="none", not {given.reduction!r}'
        )
    names = {
        "hard_weight": terms.has_hard_term,
        "entropy_weight": bool(terms.asked & Asked.ENTROPY),
        "return_stats": terms.return_stats,
        "inplace": inplace,
    }
    if any(names.values()):
        raise ValueError(
            f"a tuple of divergences takes no {next(name for name in names if names[name])}; it is the soft term alone"
        )
    if not isinstance(terms.soft_weight, Tensor) and terms.soft_weight == 0:
        raise ValueError("a tuple of divergences is the soft term alone, but soft_weight=0")
    if isinstance(teacher, SparseTarget):
        raise ValueError(
            "a tuple of divergences needs a dense teacher, got a kd.SparseTarget; take one at a time"
        )
