"""Whether a peer can be imported here, and parts of peers whose packages cannot."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType


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


def missing(distribution: str) -> str | None:
    """None where ``distribution`` is installed, whether or not its package can be imported."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    return None


def original_module(distribution: str, path: str, name: str | None = None) -> ModuleType:
    """The module in ``path`` of an installed distribution, without its package: that may want more than
    is installed. PackageNotFoundError where the distribution is not installed at all."""
    file = importlib.metadata.distribution(distribution).locate_file(path)
    name = name or "original_" + path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, str(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
