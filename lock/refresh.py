"""``make lock``: pins today's newest of everything, for Python 3.10 to 3.13, into ``lock/constraints.txt``.

torch is pinned in the Makefile, where another may be asked for. Triton and the CUDA libraries that a CUDA build of
torch names, with exact versions of its own, are left to it. What such builds ask for besides is kept in
``lock/torch.json``, and ``tests/test_lock.py`` compares the two: torch of the Makefile and the newest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from packaging.specifiers import SpecifierSet

HERE = Path(__file__).parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
CONSTRAINTS, TORCH = HERE / "constraints.txt", HERE / "torch.json"
HEADER = "# Written by `make lock`. torch, and Triton where torch brings none, are pinned in the Makefile.\n"
#: What uv is not to read: indexes of this machine alone.
PLAIN = {
    name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_FIND", "PIP_EXTRA"))
}


def left_to_torch(name: str) -> bool:
    """True of torch and what a CUDA build of it pins; nvidia-modelopt and the like are not that."""
    return name in ("torch", "triton") or name.startswith(("cuda-", "nvidia-c", "nvidia-n"))


def resolve(*arguments: str, given: str = "") -> list[str]:
    """One ``name==version ; marker`` a line, of the newest versions that agree on every platform and Python."""
    options = "--no-config --universal --quiet --no-header --no-annotate".split()
    command = [sys.executable, "-m", "uv", "pip", "compile", *options, *arguments]
    done = subprocess.run(command, input=given, env=PLAIN, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout.splitlines()


GROUPS = [word for name in ("peers", "tools", "docs") for word in ("--group", name)]
EVERYTHING = ("pyproject.toml", "-", "--all-extras", *GROUPS)


def locked(torch: str) -> list[str]:
    together = resolve(*EVERYTHING, "--python-version", PYTHONS[0], given=torch)
    # One version for all Pythons: nothing of theirs is used but files, those that the drop-ins stand in for and weights.
    alone = resolve(
        "--group",
        "alone",
        "--group",
        "weights",
        "--no-deps",
        "--fork-strategy",
        "fewest",
        "--python-version",
        PYTHONS[0],
    )
    return sorted(line for line in together + alone if not left_to_torch(line.partition("==")[0]))


def requirements_of(torch: str) -> dict:
    """What the CUDA build of it for Linux says in its metadata: PyPI's, whatever other index pip knows here."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        "--report",
        "-",
        "--target",
        "nowhere",
        "--only-binary",
        ":all:",
        "--python-version",
        "3.13",
        "--platform",
        "manylinux_2_28_x86_64",
        torch,
    ]
    environment = {**PLAIN, "PIP_CONFIG_FILE": os.devnull}
    environment.pop("PIP_CONSTRAINT", None)
    found = json.loads(subprocess.check_output(command, env=environment, text=True))["install"][0]["metadata"]
    own = [r for r in found["requires_dist"] if "extra ==" not in r]
    return {f"torch=={found['version']}": {"python": found["requires_python"], "requires": own}}


def main(torch: str) -> None:
    """``torch``: the requirement that the Makefile pins."""
    lines = locked(torch)
    builds = requirements_of(torch) | requirements_of("torch")
    CONSTRAINTS.write_text(HEADER + "".join(f"{line}\n" for line in lines))
    TORCH.write_text(json.dumps(builds, indent=1) + "\n")
    for build, said in builds.items():  # a contradiction, however deep, ends this with uv's reason
        oldest = next(python for python in PYTHONS if python in SpecifierSet(said["python"]))
        resolve(*EVERYTHING, "--python-version", oldest, "--constraint", str(CONSTRAINTS), given=build)
        print(f"{len(lines)} pins agree with {build} and all that its CUDA build brings")


if __name__ == "__main__":
    main(sys.argv[1])
