"""Which backends there are, which are usable here, and which one serves a call.

A backend is a module that is a :class:`.protocol.Backend`.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch

from . import eager, native, triton
from .protocol import Backend
from .spec import Spec

_native: Backend = native  # one by one: so mypy holds each module against the protocol
_triton: Backend = triton
_eager: Backend = eager
#: Best first.
_ORDER = (_native, _triton, _eager)
_NAMES = tuple(module.name for module in _ORDER)
BackendName = Literal["auto", "native", "triton", "eager", "reference"]
CHOICES: tuple[BackendName, ...] = get_args(BackendName)
assert CHOICES == ("auto", *_NAMES, "reference")


class _ThreadsChoice(threading.local):
    """Not a ContextVar: a notebook runs each cell in a context of its own, and a bare call would end with it."""

    name = "auto"


_chosen = _ThreadsChoice()


def _usable(name: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(CHOICES)}")
    if name in _NAMES and (reason := by_name(name).why_not()):
        raise RuntimeError(f"backend {name!r} is not usable here: {reason}")
    return name


def chosen_backend() -> str:
    """What ``use_backend`` chose in this thread, else what KDKERNELS_BACKEND says, else "auto"."""
    if _chosen.name != "auto":
        return _chosen.name
    try:
        return _usable(os.environ.get("KDKERNELS_BACKEND") or "auto")
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"KDKERNELS_BACKEND: {error}") from None


def as_tensor(name: str) -> torch.Tensor:
    """``name``, for a backward: its thread has not chosen one, and compiled code hands it nothing but tensors."""
    return torch.tensor(CHOICES.index(name), dtype=torch.uint8, device="cpu")


def name_of(choice: torch.Tensor) -> str:
    """The inverse of :func:`as_tensor`."""
    return CHOICES[int(choice)]


def reference_asked() -> bool:
    """Whether a call goes to the oracle. Not in code that is compiled: its operators look when they run."""
    return not torch.compiler.is_compiling() and chosen_backend() == "reference"


class _Choice(AbstractContextManager):
    """Ends a choice at the end of a ``with`` block. Without one, nothing ends it."""

    def __init__(self, before: str) -> None:
        self._before = before

    def __exit__(self, *_: object) -> None:
        _chosen.name = self._before


def use_backend(name: BackendName) -> AbstractContextManager:
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
    choice = _Choice(before=_chosen.name)
    _chosen.name = _usable(name)
    return choice


def backends() -> dict[str, str | None]:
    """Backend name -> None where it is usable, else why it is not.

    >>> import kdkernels as kd
    >>> kd.backends()["eager"] is None
    True
    """
    return {module.name: module.why_not() for module in _ORDER} | {"reference": None}


def by_name(name: str) -> Backend:
    return _ORDER[_NAMES.index(name)]


def candidates(
    preferred: str, device: torch.device, dtypes: list[torch.dtype], spec: Spec
) -> list[tuple[Backend, str | None]]:
    """Backends in the order they are tried, each with why it cannot serve the call."""
    first = [by_name(preferred)] if preferred in _NAMES else []
    order = first + [backend for backend in _ORDER if backend not in first]
    return [(backend, backend.why_not() or backend.cannot(device, dtypes, spec)) for backend in order]


def serving(preferred: str, device: torch.device, dtypes: list[torch.dtype], spec: Spec) -> Backend:
    found = candidates(preferred, device, dtypes, spec)
    return next(backend for backend, reason in found if reason is None)
