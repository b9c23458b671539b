"""Whether a peer can be imported here."""

from __future__ import annotations

import importlib


def why_not(module: str, device: str, *, needs_cuda: bool = False) -> str | None:
    """None where ``module`` can be imported and run on ``device``, else the reason in a few words."""
    if needs_cuda and device != "cuda":
        return "needs a GPU"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"not installed ({error.name})"
    except Exception as error:  # a peer that breaks on import must not stop the others
        return f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None
