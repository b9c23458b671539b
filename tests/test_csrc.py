"""The C++ side: every instruction set gives the same answers, and the shared headers serve a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kdkernels as kd

ROOT = Path(__file__).parent.parent
DEVICE_SOURCE = """
#include "divergence.h"
#include "row_state.h"
using namespace kd;
using namespace kd::KD_ISA;

template <class D>
__device__ void terms(const Spec& spec, const float* in, float* out) {
  const Terms t = D(spec, in[7] > 0.5f)(in[0], in[1], in[2], in[3], in[4]);
  out[0] = t.phi;
  out[1] = t.q_psi;
}

__global__ void kernel(Spec spec, const float* in, float* out, double* results) {
  terms<JSD>(spec, in, out);
  terms<SkewKL>(spec, in, out);
  terms<SkewReverseKL<true>>(spec, in, out);
  terms<TotalVariation>(spec, in, out);
  terms<AlphaBeta>(spec, in, out);
  terms<Mixed>(spec, in, out);
  RowState row = empty_state();
  raise(row, in[5], in[6], spec.temperature);
  finish(row, spec, true, true, 100, results);
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
    files = ["tests/test_conformance.py", "tests/test_inputs.py", "tests/test_sparse.py"]
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
