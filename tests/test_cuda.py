"""The CUDA C++ backend without a GPU: its source run on the host, compiled for GPUs, and broken on purpose.

On the host a CUDA thread is a fiber (tests/support/cuda_host); the conformance suite itself runs there, in
processes of their own, on chips of several sizes, so that rows are laid out in every way there is.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_host
import pytest
import torch

from benchmarks import compile_cuda, instructions

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="needs a C++ compiler")

#: Name -> chip, and what of the suite runs on it: everything once, and elsewhere what depends on how a row lies.
LAYOUTS = "widths or adversarial or leading or equal_models or bits or begin_anywhere"
SUITES = {
    "small": (
        "small",
        "tests/test_conformance.py tests/test_log_probs.py",
        "native and not float64 and not float16 and not head-logits and not logits-head",
    ),
    "large": (
        "large",
        "tests/test_sparse.py tests/test_entropy.py tests/test_far_logits.py",
        "native and not float64 and not float16",
    ),
    "registers": (
        "large",
        "tests/isolated/cuda_wide.py tests/test_conformance.py",
        f"wide or weight_of_0 or native and ({LAYOUTS} or without_a_softmax or masked)",
    ),
    "tiny": ("tiny", "tests/test_conformance.py tests/test_log_probs.py", f"native and ({LAYOUTS})"),
    "no clusters": (
        "no clusters",
        "tests/test_conformance.py",
        f"native and ({LAYOUTS} or codistillation)",
    ),
}


NAMES = {f"test_conformance_on_the_host[{name}]" for name in SUITES}

REPRESENTATIVES = [
    ("kForwardKL", "ClosedForm", "PlainBFloat16"),
    ("kJSD", "JSD", "PlainBFloat16"),
    ("kJSD", "JSD", "PlainFloat"),
    ("kForwardKL", "ClosedForm", "Held<PlainBFloat16>"),
    ("kJSD", "JSD", "Held<PlainBFloat16>"),
    ("kNone", "ClosedForm", "Anything"),  # it has the other divergences in it, for a sparse target's outcomes
]


class Running:
    """A process beside the tests, its output in a file."""

    def __init__(self, command, output):
        self.output = output
        with open(output, "w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def result(self):
        """(exit code, output)"""
        return self.process.wait(), self.output.read_text()


def suite(chip, files, which, library):
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *files.split(),
        "-k",
        which,
        "--chip",
        chip,
        "--cuda-host",
        library,
    ]


@pytest.fixture(scope="module")
def running(tmp_path_factory, request):
    """All that are asked for begun at once: each is one process on one core."""
    folder, library = tmp_path_factory.mktemp("cuda"), cuda_host.build()
    chosen = {item.callspec.params["name"] for item in request.session.items if item.name in NAMES}
    made = {name: Running(suite(*SUITES[name], library), folder / f"{name}.log") for name in chosen}
    yield made
    for one in made.values():
        one.process.kill()


@pytest.mark.parametrize(
    "name", [pytest.param("tiny", marks=pytest.mark.slow), *sorted({*SUITES} - {"tiny"})]
)
def test_conformance_on_the_host(running, name):
    code, said = running[name].result()
    assert code == 0, said[-20_000:]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", compile_cuda.ARCHITECTURES)
def test_compiles_without_spills(tmp_path, architecture):
    source = tmp_path / "representatives.cu"
    source.write_text(compile_cuda.instances(*REPRESENTATIVES))
    code, said = Running(compile_cuda.command(architecture, source), tmp_path / "log").result()
    assert code == 0, said[-5_000:]
    found = compile_cuda.parsed(said)
    assert len(found) == len(REPRESENTATIVES)
    assert all(usage.fits for usage in found), found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_instructions_are_counted(monkeypatch):
    """A pair of logits in registers has two exponentials; a loop of them again has two more."""
    only = {"forward KL": instructions.DIVERGENCES["forward KL"]}
    monkeypatch.setattr(instructions, "DIVERGENCES", only)
    held, streamed, _ = instructions.of_cuda()
    in_triton, _ = instructions.of_triton()
    assert held["special"] == 2 and streamed["special"] == pytest.approx(4, abs=0.2)
    assert in_triton["special"] == pytest.approx(4, abs=0.3)
    assert 10 < held["instructions"] < streamed["instructions"] < in_triton["instructions"] < 60


def geometry(chip, width, student_bytes, teacher_bytes, rows=8192, in_registers=False):
    cuda_host.load(cuda_host.build())
    torch.ops.kdkernels_cuda_host.set_chip(*chip, 1)
    out = torch.zeros(7, dtype=torch.int64)
    torch.ops.kdkernels_cuda_host.geometry(in_registers, width, rows, student_bytes, teacher_bytes, out)
    return dict(zip(("cluster", "warps", "span", "chunk", "student", "teacher", "bytes"), out.tolist()))


HOPPER = (132, 227 * 1024, 16)
A100 = (108, 163 * 1024, 1)


@pytest.mark.parametrize(
    "width, size, cluster",
    [
        (32000, 2, 2),
        (128256, 2, 8),
        (151936, 2, 8),
        (256000, 2, 8),
        (128256, 4, 8),
        (151936, 4, 8),
        (262144, 4, 16),
    ],
)
def test_rows_are_on_the_chip(width, size, cluster):
    found = geometry(HOPPER, width, size, size)
    assert found["student"] and found["teacher"] and found["cluster"] == cluster


@pytest.mark.parametrize("chip", [HOPPER, (132, 227 * 1024, 8), (46, 99 * 1024, 8), A100], ids=str)
@pytest.mark.parametrize("sizes", [(2, 2), (4, 4), (4, 2), (2, 0), (4, 0)], ids=str)
def test_every_layout_covers_the_row_and_fits(chip, sizes):
    resident = []
    for width in (1, 7, 256, 257, 5000, 32000, 50257, 151936, 262144, 400_000, 700_000, 1_000_000, 2**30):
        for rows in (1, 100, 8192):
            found = geometry(chip, width, *sizes, rows=rows)
            covered = found["cluster"] * found["warps"] * found["span"]
            assert covered >= width and found["span"] % 256 == 0 and found["warps"] <= 16
            assert found["bytes"] <= chip[1] and found["cluster"] <= chip[2]
            assert not found["student"] or 16 * found["chunk"] >= found["span"]
            resident.append((found["student"], found["teacher"]))
    if chip == A100:
        assert set(resident) == {(0, 0)}
    elif sizes[1]:
        assert {(1, 1), (1, 0), (0, 0)} == set(resident)


@pytest.mark.parametrize(
    "width, size, found", [(5000, 2, 2), (32000, 2, 2), (128256, 2, 8), (151936, 4, 8), (256000, 2, 0)]
)
def test_rows_are_held_in_registers(width, size, found):
    assert geometry(HOPPER, width, size, size, in_registers=True)["cluster"] == found


@pytest.mark.parametrize("chip", [HOPPER, (132, 227 * 1024, 8), (46, 99 * 1024, 8)], ids=str)
@pytest.mark.parametrize("sizes", [(2, 2), (4, 4), (2, 0), (4, 0)], ids=str)
def test_every_held_row_is_covered_and_fits(chip, sizes):
    held = []
    for width in (1, 7, 256, 257, 5000, 32000, 50257, 151936, 262144, 400_000, 2**30):
        for rows in (1, 100, 8192):
            found = geometry(chip, width, *sizes, rows=rows, in_registers=True)
            held.append(found["cluster"] > 0)
            if held[-1]:
                assert found["cluster"] * found["warps"] * found["span"] >= width
                assert found["warps"] <= 15 and found["cluster"] <= 8 and found["bytes"] <= chip[1]
    assert held[0] and not held[-1]


@pytest.mark.slow
def test_mutations_are_seen(tmp_path):
    library = cuda_host.build(cuda_host.mutated(tmp_path / "csrc"), tmp_path / "built")
    code, said = Running(
        suite("small", "tests/isolated/cuda_mutations.py", "", library), tmp_path / "log"
    ).result()
    assert code == 0, said[-20_000:]
