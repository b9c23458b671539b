"""The C++ side: every instruction set gives the same answers, and the shared headers serve a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels.backends import native
from kdkernels.backends.protocol import Gradients, Tile
from kdkernels.backends.spec import OUTPUTS, Asked, Output, Spec

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets(isa):
    """The conformance suite once more, on what this machine would not choose itself."""
    if kd.backends()["native"] is not None or kd.instruction_set() in (isa, "baseline"):
        pytest.skip("this machine has no better instruction set to turn off")
    environment = {**os.environ, "KDKERNELS_ISA": isa}
    check = f"import kdkernels as kd; assert kd.instruction_set() == {isa!r}"
    subprocess.run([sys.executable, "-c", check], env=environment, cwd=ROOT, check=True)
    names = ("conformance", "inputs", "sparse", "rising_rows")
    files = [f"tests/test_{name}.py" for name in names]
    suite = [*files, "-k", "native and not bits and not head"]  # what is projected is the same logits
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", *suite],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


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
