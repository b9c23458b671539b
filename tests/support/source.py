"""Modules of installed packages for the tests, loaded file by file."""

import importlib.metadata

import pytest

from benchmarks.peers.installed import original_module


def load(distribution, path):
    """The module in ``path`` of an installed distribution; skips the test file where there is none."""
    try:
        return original_module(distribution, path)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed", allow_module_level=True)
