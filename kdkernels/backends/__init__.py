"""Which backends there are, which are usable here, and which one serves a call.

A backend is a module with ``name``, ``why_not()`` (None where it is usable), ``cannot(device,
dtypes)`` (None where it serves them), ``bytes_per_logit(dtypes)`` (temporaries), and the entry
points ``fused``, ``accumulate``, ``accumulate_value`` and ``gradient`` with eager's signatures. One
that has ``fused_sparse`` serves sparse targets too; its ``accumulate`` then takes ``skipped`` and its
``gradient`` ``emission``.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Optional

import torch

from ..divergences import Divergence, NoDivergence
from . import eager, native, triton

#: Best first.
_ORDER: tuple[ModuleType, ...] = (native, triton, eager)
_NAMES = tuple(module.name for module in _ORDER)
CHOICES = ("auto", *_NAMES, "reference")


class _ThreadsChoice(threading.local):
    """Not a ContextVar: a notebook runs each cell in a context of its own, and a bare call would end with it."""

    name = "auto"


_chosen = _ThreadsChoice()


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(CHOICES)}")
    return name


def chosen_backend() -> str:
    """What ``use_backend`` chose in this thread, else what KDKERNELS_BACKEND says, else "auto"."""
    if _chosen.name != "auto":
        return _chosen.name
    return _checked(os.environ.get("KDKERNELS_BACKEND", "auto"))


def reference_asked() -> bool:
    """Whether a call goes to the oracle. Not in code that is compiled: its operators look when they run."""
    return not torch.compiler.is_compiling() and chosen_backend() == "reference"


class _Choice(AbstractContextManager):
    """Ends a choice at the end of a ``with`` block. Without one, nothing ends it."""

    def __init__(self, before: str) -> None:
        self._before = before

    def __exit__(self, *_: object) -> None:
        _chosen.name = self._before


def use_backend(name: str) -> AbstractContextManager:
    """Prefer the backend ``name`` in this thread, from now on or for a ``with`` block.

    Args:
        name: one of :func:`backends`. "auto" leaves the choice to KDKERNELS_BACKEND; where that is not
            set, the best backend serves each call. "reference" is the fp64 oracle.

    The choice holds at once and until the next one. As a context manager it ends with the block, and what
    was chosen before holds again. Each thread chooses for itself; a new thread starts with "auto". A backward
    uses what its forward used, whichever thread runs it. Compiled code asks when it runs, not when it is
    compiled, so call this outside of it.

    Raises ValueError for an unknown name and RuntimeError for one that is not usable here, or inside
    ``torch.compile(fullgraph=True)``.

    >>> import kdkernels as kd
    >>> with kd.use_backend("eager"):
    ...     pass  # eager here, what was chosen before afterwards
    >>> _ = kd.use_backend("eager")  # eager from here on
    >>> _ = kd.use_backend("auto")
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("kd.use_backend cannot be compiled; call it around the compiled function")
    _checked(name)
    if name in _NAMES and (reason := by_name(name).why_not()):
        raise RuntimeError(f"backend {name!r} is not usable here: {reason}")
    choice = _Choice(before=_chosen.name)
    _chosen.name = name
    return choice


def backends() -> dict[str, Optional[str]]:
    """Backend name -> None where it is usable, else why it is not.

    >>> import kdkernels as kd
    >>> kd.backends()["eager"] is None
    True
    """
    return {module.name: module.why_not() for module in _ORDER} | {"reference": None}


def by_name(name: str) -> ModuleType:
    return _ORDER[_NAMES.index(name)]


def candidates(
    preferred: str,
    device: torch.device,
    dtypes: list[torch.dtype],
    entry: str = "fused",
    divergence: Divergence = NoDivergence(),
) -> list[tuple[ModuleType, Optional[str]]]:
    """Backends in the order they are tried, each with why it cannot serve the call."""

    def problem(module: ModuleType) -> Optional[str]:
        if not hasattr(module, entry):
            return f"it has no {entry}"
        if divergence.code < 0 and module is not eager:
            return f"it knows kdkernels' own divergences, not {type(divergence).__name__}"
        return module.cannot(device, dtypes)

    first = [by_name(preferred)] if preferred in _NAMES else []
    order = first + [module for module in _ORDER if module not in first]
    return [(module, module.why_not() or problem(module)) for module in order]


def serving(
    preferred: str,
    device: torch.device,
    dtypes: list[torch.dtype],
    entry: str = "fused",
    divergence: Divergence = NoDivergence(),
) -> ModuleType:
    found = candidates(preferred, device, dtypes, entry, divergence)
    return next(module for module, reason in found if reason is None)
