"""The lock holds what pyproject asks for, on every Python, beside every build of torch."""

import json
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lock.refresh import CONSTRAINTS, PYTHONS, TORCH, left_to_torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
BUILDS = json.loads(TORCH.read_text())
PINS = [Requirement(line) for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
MAKEFILE = dict(re.findall(r"^(\w+) \?= (.*)$", (ROOT / "Makefile").read_text(), flags=re.M))


def machine(python):
    """A Linux with this Python, for markers."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.99",
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "extra": "",
    }


def pins(python):
    """Name -> version there."""
    there = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(machine(python))]
    versions = {pin.name: next(iter(pin.specifier)).version for pin in there}
    assert len(versions) == len(there), "one version of each"
    return versions


def contradictions(requirements, python):
    """What the lock has otherwise, or not at all."""
    versions, found = pins(python), []
    for one in map(Requirement, requirements):
        name = one.name.lower().replace("_", "-")
        if (one.marker is None or one.marker.evaluate(machine(python))) and not left_to_torch(name):
            if name not in versions or not one.specifier.contains(versions[name], prereleases=True):
                found.append(f"{one}: {versions.get(name)}")
    return found


def test_one_exact_public_version_a_line():
    lines = CONSTRAINTS.read_text().splitlines()[1:]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+( ; [^:+@]+)?", line)] == []
    assert [pin.name for pin in PINS if left_to_torch(pin.name)] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_holds_what_pyproject_asks_for(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = [
        *project["project"]["dependencies"],
        *project["build-system"]["requires"],
        *sum(extras.values(), []),
        *sum(project["dependency-groups"].values(), []),
    ]
    assert contradictions([one for one in asked if not one.startswith("kdkernels")], python) == []


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("python", PYTHONS)
def test_agrees_with_a_cuda_build_of_torch(python, build):
    """Which brings exact pins of its own for what the lock leaves to it, and may be newer than ours."""
    if python in SpecifierSet(BUILDS[build]["python"]):
        assert contradictions(BUILDS[build]["requires"], python) == []


def test_the_makefile_pins_the_pair_that_torch_brings():
    brought = map(Requirement, BUILDS[MAKEFILE["TORCH"]]["requires"])
    assert [str(one.specifier) for one in brought if one.name == "triton"] == [
        MAKEFILE["TRITON"].replace("triton", "")
    ]


def test_finds_a_contradiction():
    assert contradictions(["sympy<1", "filelock", "nowhere", "triton==1"], "3.11") == [
        "sympy<1: " + pins("3.11")["sympy"],
        "nowhere: None",
    ]
