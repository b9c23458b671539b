"""The CPU's row loops without torch: built for another processor, and run in an emulator of it."""

import struct
import subprocess
from pathlib import Path

import torch

from kdkernels.backends.spec import OUTPUTS, RESULTS, Asked, Output, Spec, packed

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
#: setup.py's flags for the loops.
FLAGS = "-std=c++20 -O2 -fno-math-errno -ffp-contract=fast -Wno-psabi -w".split()


def compile(compiler, folder, *sources, flags=()):
    made = folder / "program"
    command = [compiler, *FLAGS, *flags, "-I", ROOT / "csrc", *sources, "-o", made]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def build(compiler, folder):
    return compile(
        compiler, folder, HERE / "driver.cpp", ROOT / "csrc/cpu/rows_baseline.cpp", flags=["-static"]
    )


def solve(command, problem, divergence, *, temperature, hard_weight, chunk):
    """(the sum of the rows' losses, [d/d(student's logits)]) of a Problem of logits, as ``command`` computes them."""
    student, teacher = problem.student[0], problem.teacher[0]
    rows, width = student.shape
    spec = Spec(divergence.kind, 0, Asked.SOFT | Asked.LABEL, int(temperature != 1))
    weights = torch.zeros(rows, OUTPUTS, dtype=torch.float64)
    weights[:, Output.SOFT], weights[:, Output.LABEL] = 1.0, hard_weight
    labels = problem.labels.clamp(min=-1)
    dtype = [torch.float32, torch.bfloat16, torch.float16].index(student.dtype)
    parameters = torch.tensor(divergence.parameters, dtype=torch.float64)
    given = [packed(spec), torch.tensor([temperature], dtype=torch.float64), parameters, weights, labels]
    sent = struct.pack("=4q", rows, width, dtype, chunk) + b"".join(map(as_bytes, [*given, student, teacher]))
    done = subprocess.run(command, input=sent, capture_output=True, check=True).stdout
    end = rows * RESULTS * 8
    results = torch.frombuffer(bytearray(done[:end]), dtype=torch.float64).view(rows, RESULTS)
    grad = torch.frombuffer(bytearray(done[end:]), dtype=student.dtype).view(rows, width)
    return (results[:, :OUTPUTS] * weights).sum().float(), [grad]


def as_bytes(t):
    return t.contiguous().view(torch.uint8).numpy().tobytes()
