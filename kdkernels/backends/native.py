"""The C++ backend (csrc/): half precision and fp32 rows, each logit read from memory once.

On the CPU ``kdkernels._C``, on CUDA ``kdkernels._cuda``; the same operators, by the tensors' device.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .outcomes import Outcomes
from .protocol import KERNEL_DTYPES, Gradients, SparseGradient, Tile, why_not_dtypes
from .sparse_rows import in_two_passes
from .spec import RESULTS, Asked, Spec, packed

name = "native"
_ops = torch.ops.kdkernels_native
#: Of a sparse target, beside a row in a GPU's shared memory; beyond it the row is read twice.
_MOST_SLOTS = 4096
#: Written by setup.py where it leaves the extension out.
_WHY_NOT_BUILT = Path(__file__).parent.parent / "_C.txt"


def _load(module: str) -> str | None:
    try:
        importlib.import_module(f"kdkernels.{module}")
    except ImportError as error:
        if _WHY_NOT_BUILT.exists():
            return f"kdkernels.{module} is not built: {_WHY_NOT_BUILT.read_text().strip()}"
        return f"kdkernels.{module} is not built or does not load ({error})"
    return None


_problem = _load("_C")
if _problem:
    warnings.warn(
        f"{_problem}. CPU tensors go through plain PyTorch operators, which are slower.", stacklevel=2
    )


def why_not() -> str | None:
    return _problem


@functools.cache
def _cuda_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on this GPU."""
    if problem := _load("_cuda"):
        return problem
    if torch.ops.kdkernels_native.compute_capability(torch.empty(0, device=device)) == 0:
        major, minor = torch.cuda.get_device_capability(device)
        return f"kdkernels._cuda was not built for sm_{major}{minor} (TORCH_CUDA_ARCH_LIST chooses)"
    return None


def cannot(device: torch.device, dtypes: list[torch.dtype], spec: Spec) -> str | None:
    if problem := spec.why_no_kernel():
        return problem
    if device.type not in ("cpu", "cuda"):
        return f"it serves cpu and cuda tensors, not {device.type}"
    if device.type == "cuda" and (problem := _cuda_problem(device)):
        return problem
    return why_not_dtypes(dtypes)


def bytes_per_logit(dtypes: list[torch.dtype]) -> int:
    return 0


def instruction_set() -> str | None:
    """The instruction set that the CPU's row loops use: "avx512bf16", "avx512", "avx2" or "baseline". None without a native
    backend. ValueError where KDKERNELS_ISA asks for one that is not here.

    >>> import kdkernels as kd
    >>> kd.instruction_set() in ("avx512bf16", "avx512", "avx2", "baseline", None)
    True
    """
    if _problem:
        return None
    try:
        code = torch.ops.kdkernels_native.instruction_set(torch.empty(0, device="cpu"))
    except RuntimeError as error:
        said = str(error).partition("kdkernels: ")[2]
        raise ValueError(said.splitlines()[0]) from None
    return ("baseline", "avx2", "avx512", "avx512bf16")[code]


def advise_huge_pages(fresh: Tensor) -> None:
    """Ask for huge pages under memory that nobody has touched yet: fewer faults, same bytes."""
    if _problem is None:
        torch.ops.kdkernels_native.advise_huge_pages(fresh)


def serves_columns(gradient: Tensor) -> bool:
    """Whether :func:`column_squares` and :func:`gather_columns` take these rows."""
    adjacent = gradient.stride(1) == 1
    return _problem is None and gradient.device.type == "cpu" and gradient.dtype in KERNEL_DTYPES and adjacent


def column_squares(gradient: Tensor) -> Tensor:
    """fp64 ``[V]``: of each column of ``gradient`` the sum of its squares, in one read."""
    squares = gradient.new_zeros(gradient.shape[1], dtype=torch.float64)
    _ops.column_squares(gradient, squares)
    return squares


def gather_columns(gradient: Tensor, ids: Tensor) -> Tensor:
    """Moves the columns ``ids``, which ascend, to the front of their rows. Gives fp32 ``[n]``: each row's sum over the
    other columns."""
    rest = gradient.new_empty(gradient.shape[0], dtype=torch.float32)
    _ops.gather_columns(gradient, ids, rest)
    return rest


def _new_results(tile: Tile) -> Tensor:
    return tile.student.new_zeros(tile.student.shape[0], RESULTS, dtype=torch.float64)


def fused(tile: Tile, weights: Tensor, spec: Spec, gradients: Gradients) -> Tensor:
    results = _new_results(tile)
    _ops.fused(
        tile.student,
        tile.teacher,
        tile.labels,
        tile.temperature,
        tile.parameters,
        weights,
        packed(spec),
        results,
        *gradients,
    )
    return results


def accumulate(tile: Tile, spec: Spec, state: Tensor, skipped: Tensor | None = None) -> None:
    _ops.accumulate(
        tile.student,
        tile.teacher,
        tile.labels,
        tile.temperature,
        packed(spec),
        tile.offset,
        state,
        skipped,
    )


def accumulate_value(tile: Tile, spec: Spec, state: Tensor) -> None:
    _ops.accumulate_value(
        tile.student,
        tile.teacher,
        tile.temperature,
        tile.parameters,
        packed(spec),
        state,
    )


def gradient(
    tile: Tile,
    weights: Tensor,
    spec: Spec,
    state: Tensor,
    gradients: Gradients,
    sparse: SparseGradient | None = None,
) -> None:
    solved = (None,) * 5 if sparse is None else (sparse.ids, sparse.rest, sparse.stored, sparse.at_1, None)
    if sparse is not None and spec.asked & Asked.ENTROPY:
        solved = (*solved[:-1], sparse.softmax)
    _ops.gradient(
        tile.student,
        tile.teacher,
        tile.labels,
        tile.temperature,
        tile.parameters,
        weights,
        packed(spec),
        tile.offset,
        tile.vocab,
        state,
        *gradients,
        *solved,
    )


def fused_sparse(tile: Tile, target: Outcomes, weights: Tensor, spec: Spec, gradients: Gradients) -> Tensor:
    if tile.student.is_cuda and target.ids.shape[1] > _MOST_SLOTS:
        return in_two_passes(sys.modules[__name__], tile, target, weights, spec, gradients)
    results = _new_results(tile)
    _ops.fused_sparse(
        tile.student,
        *target,
        tile.labels,
        tile.temperature,
        tile.parameters,
        weights,
        packed(spec),
        results,
        gradients.student,
    )
    return results
