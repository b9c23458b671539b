"""The Triton backend without a GPU: its kernels interpreted, and compiled for GPUs that are not here.

Both change triton for the whole process, so each has one of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels.__main__ import main
from kdkernels.backends import triton as backend
from kdkernels.backends.spec import Spec

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(file, which="not slow", every=1, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "isolated" / file]
    command += ["-m", which, f"--every={every}"]
    done = subprocess.run(
        command, cwd=HERE.parent, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@pytest.mark.parametrize(("file", "every"), [("triton_rows.py", 2), ("triton_sparse.py", 1)])
def test_interpreted(file, every):
    run(file, every=every, TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["triton_rows.py", "triton_sparse.py", "triton_mutations.py"])
def test_all_interpreted(file):
    run(file, which="slow or not slow", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_the_rest_compiled():
    run("triton_compiled.py", which="slow", TRITON_INTERPRET="0")


def test_compiled():
    run("triton_compiled.py", TRITON_INTERPRET="0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_says_why_not(monkeypatch, capsys):
    assert "GPU" in kd.backends()["triton"]
    with pytest.raises(RuntimeError, match="not usable here: torch sees no GPU"), kd.use_backend("triton"):
        pass
    monkeypatch.setenv("KDKERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="not usable here: torch sees no GPU"):
        kd.kl_div(torch.randn(2, 5), torch.randn(2, 5))
    main(["info"])
    assert "chosen     KDKERNELS_BACKEND: backend 'triton' is not usable here" in capsys.readouterr().out


def test_says_what_it_serves():
    assert backend.cannot(torch.device("cuda"), [torch.bfloat16, torch.float32], Spec()) is None
    assert "float64" in backend.cannot(torch.device("cuda"), [torch.float64], Spec())
    assert "cuda" in backend.cannot(torch.device("mps"), [torch.float32], Spec())

    class Unknown(kd.JSD):
        pass

    unknown = Spec(kind=Unknown.code)
    assert "not Unknown" in backend.cannot(torch.device("cuda"), [torch.float32], unknown)


@pytest.mark.parametrize("module", ["kdkernels", "kdkernels.commands.info"])
def test_triton_is_not_imported_before_it_is_needed(module):
    code = f"import sys, torch, {module}; torch_only = 'triton' in sys.modules; print(torch_only)"
    plain = "import sys, torch; print('triton' in sys.modules)"
    runs = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True)
        for c in (code, plain)
    ]
    assert runs[0].stdout == runs[1].stdout
