"""Which backends there are, which are usable here, and which one serves a call.

A backend is a module with ``name``, ``why_not()`` (None where it is usable), ``cannot(device,
dtypes)`` (None where it serves them), ``bytes_per_logit(dtypes)`` (temporaries), and the entry
points ``fused``, ``accumulate``, ``accumulate_value`` and ``gradient`` with eager's signatures. One
that has ``fused_sparse`` serves sparse targets too; its ``accumulate`` then takes ``skipped`` and its
``gradient`` ``emission``.
"""

from __future__ import annotations

import contextlib
import os
from types import ModuleType
from typing import Iterator, Optional

import torch

from . import eager, native, triton

#: Best first.
_ORDER: tuple[ModuleType, ...] = (native, triton, eager)
_NAMES = tuple(module.name for module in _ORDER)
_CHOICES = ("auto", *_NAMES, "reference")
_chosen: str = "auto"


def _checked(name: str) -> str:
    if name not in _CHOICES:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(_CHOICES)}")
    return name


def chosen_backend() -> str:
    """What ``use_backend`` chose, else what KDKERNELS_BACKEND says, else "auto"."""
    if _chosen != "auto":
        return _chosen
    return _checked(os.environ.get("KDKERNELS_BACKEND", "auto"))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Prefer the backend ``name`` inside a ``with`` block; "auto" takes the best for each call.

    Raises ValueError for an unknown name and RuntimeError for one that is not usable here.

    >>> import kdkernels as kd
    >>> with kd.use_backend("eager"):
    ...     pass
    """
    global _chosen
    _checked(name)
    if name in _NAMES and (reason := by_name(name).why_not()):
        raise RuntimeError(f"backend {name!r} is not usable here: {reason}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


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
    preferred: str, device: torch.device, dtypes: list[torch.dtype], entry: str = "fused"
) -> list[tuple[ModuleType, Optional[str]]]:
    """Backends in the order they are tried, each with why it cannot serve the call."""
    missing = f"it has no {entry}"
    first = [by_name(preferred)] if preferred in _NAMES else []
    order = first + [module for module in _ORDER if module not in first]
    return [
        (m, m.why_not() or (None if hasattr(m, entry) else missing) or m.cannot(device, dtypes)) for m in order
    ]


def serving(
    preferred: str, device: torch.device, dtypes: list[torch.dtype], entry: str = "fused"
) -> ModuleType:
    return next(m for m, reason in candidates(preferred, device, dtypes, entry) if reason is None)
