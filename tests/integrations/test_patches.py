"""What every patch() asks before it replaces anything."""

import importlib.metadata

import pytest

from kdkernels.integrations.patches import Patches


@pytest.mark.parametrize(
    "version", ["1.16", "1.16.0", "1.16rc1", "1.16.0.dev3", "1.16+local", "1.17.dev0", "2", "2rc1", "x"]
)
def test_versions(version, monkeypatch):
    """Candidates and local builds are what they become."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    patches = Patches("thing", ((1, 16), (1, 17)), [])
    if version.startswith("1.16"):
        patches.patch()
        return
    with pytest.raises(RuntimeError, match="tested with thing >=1.16,<1.17 and thing"):
        patches.patch()
