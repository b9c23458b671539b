"""``python -m kdkernels info``: what is usable on this machine, and why the rest is not."""

from __future__ import annotations

import argparse
import platform

import torch

from .. import __version__
from ..backends import backends, chosen_backend, native
from ..backends.spec import Spec


def main(arguments: list[str]) -> None:
    argparse.ArgumentParser(prog="python -m kdkernels info", description=__doc__).parse_args(arguments)
    print(
        f"kdkernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    for name, problem in backends().items():
        detail = f" ({native.instruction_set()})" if name == "native" and problem is None else ""
        print(f"  {name:<10} {'usable' + detail if problem is None else 'not usable: ' + problem}")
    if torch.cuda.is_available():
        problem = native.cannot(torch.device("cuda"), [], Spec())
        print(f"  native's CUDA kernels: {'usable' if problem is None else problem}")
    try:
        print(f"  chosen     {chosen_backend()}")
    except RuntimeError as error:
        print(f"  chosen     {error}")
