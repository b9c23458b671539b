"""What every patch() asks before it replaces anything."""

import importlib.metadata

import pytest

from kdkernels.integrations.patches import Patches, Target


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


@pytest.mark.parametrize("version", ["1.16", "1.16.1", "1.16.2", "1.16.10rc1", "1.17", "1.17.1", "2"])
def test_versions_of_three_parts(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    patches = Patches("thing", ((1, 16, 2), (1, 17)), [])
    if version in ("1.16.2", "1.16.10rc1"):
        patches.patch()
        return
    with pytest.raises(RuntimeError, match="tested with thing >=1.16.2,<1.17 and thing"):
        patches.patch()


def test_a_version_that_leaves_out_its_zeros(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.16")
    Patches("thing", ((1, 16, 0), (1, 17)), []).patch()


@pytest.mark.parametrize("module", ["no_such", "no_such.at_all", "decoder.no_such"])
def test_a_module_that_the_package_has_not(module, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.16")
    patches = Patches("json", ((1, 16), (1, 17)), [Target(f"json.{module}", None, "loads", print)])
    with pytest.raises(RuntimeError, match=f"json has no json.{module}.loads, which patch.. would replace"):
        patches.patch()


def test_a_package_that_the_module_needs_is_named(monkeypatch, tmp_path):
    """The module is there, and fails by itself."""
    (tmp_path / "needy.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.16")
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        Patches("needy", ((1, 16), (1, 17)), [Target("needy", None, "loads", print)]).patch()
