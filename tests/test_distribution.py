"""What others install: the source distribution is whole, and a build that lacks something says what."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import kdkernels as kd

ROOT = Path(__file__).parent.parent
#: torch cannot be imported, as in pip's isolated builds.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "
BUILD = "from setuptools import build_meta; build_meta.{}('dist')"
#: An editable install would lend its own extension to a copy of the package.
ONLY_THE_COPY = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.argv = ["kdkernels", "info"]
runpy.run_module("kdkernels", run_name="__main__")
"""


def information(folder):
    """What `python -m kdkernels info` says of the package in this folder."""
    done = subprocess.run(
        [sys.executable, "-c", ONLY_THE_COPY],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what git has, so that nothing is found because it lies about here."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    copy = tmp_path_factory.mktemp("tree")
    for name in filter(None, files):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def build(hook, tree, where, start=WITHOUT_TORCH, **environment):
    """The archive that the hook of setuptools makes, and what it said."""
    shutil.copytree(tree, where, dirs_exist_ok=True)
    command = [sys.executable, "-c", start + BUILD.format(hook)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((where / "dist").iterdir()), done.stderr


def test_the_source_distribution_is_what_git_has(tree, tmp_path):
    made, _ = build("build_sdist", tree, tmp_path)
    with tarfile.open(made) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    added = {"PKG-INFO", "setup.cfg"} | {name for name in found if name.startswith("kdkernels.egg-info/")}
    assert found - added == {str(file.relative_to(tree)) for file in tree.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "start, environment, problem",
    [
        (WITHOUT_TORCH, {}, "it was built without torch"),
        ("", {"PATH": ""}, "it was built without a C++ compiler"),
        ("", {"CXX": "false"}, "its build failed"),
    ],
)
def test_a_build_that_lacks_something_says_so(tree, tmp_path, start, environment, problem):
    """While it builds, and afterwards: pip shows the first to nobody."""
    made, said = build("build_wheel", tree, tmp_path / "build", start, **environment)
    assert f"kdkernels: no native backend: {problem}" in said
    assert made.name.startswith(f"kdkernels-{kd.__version__}-")
    with zipfile.ZipFile(made) as wheel:
        assert "kdkernels/py.typed" in wheel.namelist()  # else a type checker takes all of it for Any
        wheel.extractall(tmp_path / "installed")
    line = next(line for line in information(tmp_path / "installed").splitlines() if "native" in line)
    assert f"not usable: kdkernels._C is not built: {problem}" in line
    assert "--no-build-isolation" in line


def test_without_the_extension_everything_works(tmp_path):
    """And `info` says why native does not."""
    without = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "kdkernels", tmp_path / "kdkernels", ignore=without)
    said = information(tmp_path)
    assert "native     not usable: kdkernels._C is not built or does not load" in said, said
    assert "eager      usable" in said
