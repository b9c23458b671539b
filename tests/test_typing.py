"""The typed surface: what a type checker knows of the losses is what the functions take."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

import kdkernels as kd
from kdkernels import options
from kdkernels.targets import TAILS, Tail

USER = Path(__file__).parent / "typed_user.py"


@pytest.mark.parametrize(
    "loss, typed",
    [
        (kd.distillation_loss, options.DistillationOptions),
        (kd.codistillation_loss, options.CodistillationOptions),
        (kd.cross_entropy, options.CrossEntropyOptions),
    ],
)
def test_the_typed_options_are_those_of_the_function(loss, typed):
    """Names and types; the overloads name ``divergence`` and ``return_stats`` themselves."""
    own = {
        name: parameter.annotation
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("divergence", "return_stats")
    }
    told = {name: reference.__forward_arg__ for name, reference in typed.__annotations__.items()}
    assert told == own


def test_the_literals_are_what_is_accepted():
    assert get_args(Tail) == TAILS
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=f"there are {', '.join(get_args(options.Reduction))}$"):
        kd.kl_div(logits, logits, reduction="average")


def test_the_package_says_that_it_is_typed():
    assert (Path(kd.__file__).parent / "py.typed").exists()


@pytest.mark.slow
def test_a_user_passes_mypy_strict(tmp_path):
    """In a process that finds the package as a user's does: mypy's own settings here are not read."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull]
    command += ["--follow-imports", "silent", "--cache-dir", str(tmp_path), str(USER)]
    environment = {**os.environ, "MYPYPATH": str(USER.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
