"""The C++ backend (csrc/): half precision and fp32 rows, each logit read from memory once.

On the CPU ``kdkernels._C``, on CUDA ``kdkernels._cuda``; the same operators, by the tensors' device.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from . import row_state as rs
from .outcomes import Outcomes, outcome_spec, student_spec
from .sparse_rows import Emission, in_two_passes
from .spec import Spec

name = "native"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ops = torch.ops.kdkernels_native
#: Of a sparse target, beside a row in a GPU's shared memory; beyond it the row is read twice.
_MOST_SLOTS = 4096
#: Written by setup.py where it leaves the extension out.
_WHY_NOT_BUILT = Path(__file__).parent.parent / "_C.txt"


def _load(module: str) -> Optional[str]:
    try:
        importlib.import_module(f"kdkernels.{module}")
    except ImportError as error:
        if _WHY_NOT_BUILT.exists():
            return f"kdkernels.{module} is not built: {_WHY_NOT_BUILT.read_text().strip()}"
        return f"kdkernels.{module} is not built or does not load ({error})"
    return None


_problem = _load("_C")


def why_not() -> Optional[str]:
    return _problem


@functools.cache
def _cuda_problem(device: torch.device) -> Optional[str]:
    """Why the kernels cannot run on this GPU."""
    if problem := _load("_cuda"):
        return problem
    if torch.ops.kdkernels_native.instruction_set(torch.empty(0, device=device)) == 0:
        major, minor = torch.cuda.get_device_capability(device)
        return f"kdkernels._cuda was not built for sm_{major}{minor} (TORCH_CUDA_ARCH_LIST chooses)"
    return None


def cannot(device: torch.device, dtypes: list[torch.dtype]) -> Optional[str]:
    if device.type not in ("cpu", "cuda"):
        return f"it serves cpu and cuda tensors, not {device.type}"
    if device.type == "cuda" and (problem := _cuda_problem(device)):
        return problem
    odd = sorted({str(d) for d in dtypes if d not in _DTYPES})
    return f"it serves fp32, bf16 and fp16 rows, not {', '.join(odd)}" if odd else None


def bytes_per_logit(dtypes: list[torch.dtype]) -> int:
    return 0


def instruction_set() -> Optional[str]:
    """ "avx512", "avx2" or "baseline": what the row loops were dispatched to."""
    if _problem:
        return None
    code = torch.ops.kdkernels_native.instruction_set(torch.empty(0, device="cpu"))
    return ("baseline", "avx2", "avx512")[code]


def advise_huge_pages(fresh: Tensor) -> None:
    """Ask for huge pages under memory that nobody has touched yet: fewer faults, same bytes."""
    if _problem is None:
        torch.ops.kdkernels_native.advise_huge_pages(fresh)


def _rows(tile: Optional[Tensor]) -> Optional[Tensor]:
    """The kernels want a row's logits side by side; any row stride is fine."""
    return tile if tile is None or tile.stride(-1) == 1 or tile.shape[-1] == 1 else tile.contiguous()


def _spec(spec: Spec) -> Tensor:
    return torch.tensor(spec.to_floats(), dtype=torch.float64, device="cpu")


def fused(
    student: Tensor,
    teacher: Optional[Tensor],
    labels: Optional[Tensor],
    weights: Tensor,
    *,
    spec: Spec,
    grad: Optional[Tensor],
    teacher_grad: Optional[Tensor],
) -> Tensor:
    results = student.new_zeros(student.shape[0], rs.RESULTS, dtype=torch.float64)
    _ops.fused(
        _rows(student), _rows(teacher), labels, weights.double(), _spec(spec), results, grad, teacher_grad
    )
    return results


def accumulate(
    student: Tensor,
    teacher: Optional[Tensor],
    labels: Optional[Tensor],
    *,
    offset: int,
    spec: Spec,
    state: Tensor,
    skipped: Optional[Tensor] = None,
) -> None:
    _ops.accumulate(_rows(student), _rows(teacher), labels, _spec(spec), offset, state, skipped)


def accumulate_value(student: Tensor, teacher: Tensor, *, spec: Spec, state: Tensor) -> None:
    _ops.accumulate_value(_rows(student), _rows(teacher), _spec(spec), state)


def gradient(
    student: Tensor,
    teacher: Optional[Tensor],
    labels: Optional[Tensor],
    weights: Tensor,
    *,
    offset: int,
    vocab: int,
    spec: Spec,
    state: Tensor,
    grad: Optional[Tensor],
    teacher_grad: Optional[Tensor],
    emission: Optional[Emission] = None,
) -> None:
    _ops.gradient(
        _rows(student),
        _rows(teacher),
        labels,
        weights.double(),
        _spec(spec),
        offset,
        vocab,
        state,
        grad,
        teacher_grad,
        *_emitted(emission),
    )


def _emitted(emission: Optional[Emission]) -> tuple[Optional[Tensor], ...]:
    return (None,) * 4 if emission is None else (emission.ids, emission.rest, emission.kept, emission.lse1)


def fused_sparse(
    student: Tensor,
    target: Outcomes,
    labels: Optional[Tensor],
    weights: Tensor,
    *,
    spec: Spec,
    grad: Optional[Tensor],
) -> Tensor:
    if student.is_cuda and target.ids.shape[1] > _MOST_SLOTS:
        return in_two_passes(
            student,
            target,
            labels,
            weights,
            spec=spec,
            grad=grad,
            accumulate=accumulate,
            fused=fused,
            gradient=gradient,
        )
    results = student.new_zeros(student.shape[0], rs.RESULTS, dtype=torch.float64)
    _ops.fused_sparse(
        _rows(student),
        *target,
        labels,
        weights.double(),
        _spec(student_spec(spec)),
        _spec(outcome_spec(spec)),
        results,
        grad,
    )
    return results
