"""Modules of installed packages, loaded file by file: their packages want more than a test can have."""

import importlib.metadata
import importlib.util
import sys

import pytest


def load(distribution, path, name=None):
    """The module in ``path`` of an installed distribution; skips the tests where there is none."""
    try:
        file = importlib.metadata.distribution(distribution).locate_file(path)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed", allow_module_level=True)
    name = name or "original_" + path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
