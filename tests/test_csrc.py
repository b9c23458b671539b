"""The C++ side: every instruction set gives the same answers, and the shared headers serve a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import row_loops
import torch
from problems import Problem, assert_exact

import kdkernels as kd
from kdkernels.backends import native
from kdkernels.backends.protocol import Gradients, Tile
from kdkernels.backends.spec import OUTPUTS, Asked, Output, Spec
from kdkernels.commands.verify.scenario import DIVERGENCES
from kdkernels.divergences import simplified

ROOT = Path(__file__).parent.parent
ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
DEVICE_SOURCE = """
#include "divergence.h"
#include "row_state.h"
using namespace kd;
using namespace kd::KD_ISA;

template <class D>
__device__ void terms(const double* parameters, const float* in, float* out) {
  const Terms t = D(parameters, in[7] > 0.5f)(in[0], in[1], in[2], in[3], in[4]);
  out[0] = t.phi;
  out[1] = t.q_psi;
}

__global__ void kernel(Spec spec, const double* parameters, const float* in, float* out, double* results) {
  terms<JSD>(parameters, in, out);
  terms<SkewKL>(parameters, in, out);
  terms<SkewReverseKL<true>>(parameters, in, out);
  terms<TotalVariation>(parameters, in, out);
  terms<Overlap>(parameters, in, out);
  terms<AlphaBeta>(parameters, in, out);
  terms<Mixed>(parameters, in, out);
  RowState row;
  raise(row, in[5], in[6], parameters[2]);
  finish(row, spec, true, 100, results);
}
"""


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_other_instruction_sets(isa, every):
    """The conformance suite once more, or a sample of it, on what this machine would not choose itself."""
    if kd.backends()["native"] is not None or ISAS.index(isa) >= ISAS.index(kd.instruction_set()):
        pytest.skip("this machine has no better instruction set to turn off")
    environment = {**os.environ, "KDKERNELS_ISA": isa}
    check = f"import kdkernels as kd; assert kd.instruction_set() == {isa!r}"
    subprocess.run([sys.executable, "-c", check], env=environment, cwd=ROOT, check=True)
    names = ("conformance", "inputs", "sparse", "rising_rows")
    files = [f"tests/test_{name}.py" for name in names]
    # Heads make the same logits, and fp64 is eager's.
    suite = [*files, f"--every={every}", "-k", "native and not bits and not head and not float64"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", *suite],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_instruction_set_that_is_not_there_is_an_error():
    if kd.backends()["native"] is not None:
        pytest.skip("the native backend is not built")
    check = "import kdkernels as kd, torch; kd.kl_div(torch.randn(2, 5), torch.randn(2, 5))"
    environment = {**os.environ, "KDKERNELS_ISA": "avx3"}
    command = [sys.executable, "-c", check]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert "KDKERNELS_ISA=avx3, but on this machine there are baseline to" in done.stderr
    told = subprocess.run(
        [sys.executable, "-m", "kdkernels", "info"], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 1 and told.stderr.startswith("error: KDKERNELS_ISA=avx3, but on this machine")
    assert told.stderr.count("\n") == 1


def rounded_by_the_instruction(x):
    """The bits that vcvtneps2bf16 makes of normal numbers, infinities and NaNs, as Intel's manual defines it."""
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return torch.where(x.isnan(), bits >> 16 | 0x40, nearest)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("isa", ISAS)
def test_conversions(tmp_path, isa):
    """Every upper half of a float with the lower ones that rounding looks at, against torch; and bf16 against the
    instruction that AVX512_BF16 has for it."""
    if ISAS.index(isa) > ISAS.index(kd.instruction_set() or "baseline"):
        pytest.skip(f"this machine has no {isa}")
    high = torch.arange(1 << 16)
    high = high[(high >> 7 & 0xFF) > 0]  # without subnormals: the processor flushes them meanwhile (RowRange)
    # The lowest bits that bf16 and fp16 drop: ties, and one beside a tie.
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x3000])
    x = (high[:, None] << 16 | low).flatten().to(torch.int32).view(torch.float32)
    x = torch.cat([x, x.new_zeros(-len(x) % 4096)])
    flags = {"baseline": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}.get(isa, ["-march=native"])
    if isa == "avx512":
        flags += ["-mno-avx512bf16"]
    program = row_loops.compile("c++", tmp_path, row_loops.HERE / "conversions.cpp", flags=flags)
    out = bytearray(
        subprocess.run([program], input=row_loops.as_bytes(x), capture_output=True, check=True).stdout
    )
    n = len(x)
    for start, dtype in ((0, torch.bfloat16), (6 * n, torch.float16)):
        mine = torch.frombuffer(out, dtype=dtype, count=n, offset=start)
        back = torch.frombuffer(out, dtype=torch.float32, count=n, offset=start + 2 * n)
        assert torch.equal(mine.isnan(), x.isnan()) and torch.equal(back.isnan(), x.isnan())
        assert torch.equal(mine[~x.isnan()], x[~x.isnan()].to(dtype))
        assert torch.equal(back[~x.isnan()], mine[~x.isnan()].float())
        if dtype == torch.bfloat16:
            assert torch.equal(mine.view(torch.int16).long() & 0xFFFF, rounded_by_the_instruction(x))


@pytest.fixture(scope="module")
def on_aarch64(tmp_path_factory):
    """The command that runs the row loops as an ARM processor would."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip(
            "needs aarch64-linux-gnu-g++ and qemu-aarch64: apt install g++-aarch64-linux-gnu qemu-user"
        )
    return [emulator, row_loops.build(compiler, tmp_path_factory.mktemp("aarch64"))]


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [2500, 900])
def test_on_aarch64(on_aarch64, divergence, dtype, chunk):
    problem = Problem(shape=(6,), vocab=2500, dtype=dtype)
    options = dict(divergence=simplified(divergence), temperature=1.5, hard_weight=0.5)
    ours = row_loops.solve(on_aarch64, problem, chunk=chunk, **options)
    oracle, plain = (run(reduction="sum", **options) for run in (problem.oracle, problem.plain))
    assert_exact(ours, oracle, plain, dtype=dtype)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_shared_headers_compile_for_a_gpu(tmp_path, arch):
    (tmp_path / "headers.cu").write_text(DEVICE_SOURCE)
    command = ["nvcc", "-std=c++20", f"-arch={arch}", "-cubin", "-I", ROOT / "csrc", "headers.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


needs_native = pytest.mark.skipif(native.why_not() is not None, reason="needs the extension")
EVERYTHING = Asked.SOFT | Asked.HARD | Asked.ENTROPY | Asked.TEACHER_LABEL


def tile(rows=6, vocab=301, labels=True, temperature=(1.0,)):
    student = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))
    return Tile(
        student,
        teacher,
        torch.arange(rows) if labels else None,
        torch.tensor(temperature, dtype=torch.float64),
        torch.tensor([0.3, 0.4], dtype=torch.float64),
        0,
        vocab,
    )


def solved(tile, weights, spec):
    gradients = Gradients(torch.full_like(tile.student, 7.0), torch.full_like(tile.teacher, 7.0))
    return native.fused(tile, weights, spec, gradients), gradients


@needs_native
@pytest.mark.parametrize("kind", range(1, 10))
@pytest.mark.parametrize("tempered", [0, 1])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_weight_0_times_anything_is_0(kind, tempered, softcap):
    """In rows whose divergence or other side is infinite or NaN, the outputs that count come out as without it."""
    given, weights = (
        tile(temperature=(2.0 if tempered else 1.0,)),
        torch.zeros(6, OUTPUTS, dtype=torch.float64),
    )
    clean = given._replace(student=given.student.clone(), teacher=given.teacher.clone())
    given.teacher[0, ::2] = -torch.inf
    given.teacher[1] = torch.nan
    given.teacher[4] = -torch.inf
    given.student[2] = torch.nan
    given.student[3, 5] = torch.inf
    weights[[0, 1, 4], [Output.LABEL, Output.SMOOTH, Output.LSE_SQUARED]] = 0.7
    spec = Spec(kind, 0, EVERYTHING, tempered, 1, student_softcap=softcap, teacher_softcap=softcap)
    _, found = solved(given, weights, spec)
    _, wanted = solved(clean, weights, spec)
    assert torch.equal(found.student, wanted.student) and torch.equal(found.teacher, wanted.teacher)
    assert not wanted.teacher.any() and not wanted.student[[2, 3, 5]].any()
    assert (wanted.student[[0, 1, 4]].norm(dim=1) > 1e-3).all()


@needs_native
@pytest.mark.parametrize("kind", range(1, 10))
def test_statistics_change_nothing_else(kind):
    given, weights = tile(), torch.rand(6, OUTPUTS, dtype=torch.float64)
    with_them, gradients = solved(given, weights, Spec(kind, 0, EVERYTHING, stats=1))
    without, others = solved(given, weights, Spec(kind, 0, EVERYTHING, stats=0))
    assert torch.equal(with_them[:, :OUTPUTS], without[:, :OUTPUTS]) and with_them[:, :OUTPUTS].all()
    assert torch.equal(gradients.student, others.student) and torch.equal(gradients.teacher, others.teacher)
    assert not without[:, OUTPUTS:].any() and with_them[:, OUTPUTS:-1].all()


@needs_native
def test_operators_say_what_is_wrong():
    given, weights = tile(labels=False), torch.zeros(6, OUTPUTS, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="label's output is asked for, but there are no labels"):
        solved(given, weights, Spec(1, 0, Asked.LABEL))
    with pytest.raises(RuntimeError, match="another dtype, device, layout or length"):
        solved(given, weights.float(), Spec(1, 0, Asked.SOFT))
    with pytest.raises(RuntimeError, match="another dtype, device, layout or length"):
        solved(
            given._replace(temperature=torch.ones(5, dtype=torch.float64)), weights, Spec(1, 0, Asked.SOFT)
        )
