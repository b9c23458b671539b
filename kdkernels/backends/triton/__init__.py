"""The Triton backend: any GPU that Triton reaches, half precision and fp32 rows.

By file: ``divergences`` is what a divergence is, ``state`` the online state of a row, ``rows`` the passes
over a row, ``kernels`` what is launched, ``launch`` how. They are imported at the first call: a machine
without a GPU never pays for Triton. TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from ..protocol import why_not_dtypes
from ..spec import Spec

if TYPE_CHECKING:
    from .launch import accumulate as accumulate
    from .launch import accumulate_value as accumulate_value
    from .launch import fused as fused
    from .launch import fused_sparse as fused_sparse
    from .launch import gradient as gradient
    from .launch import scale_ as scale_

name = "triton"
_ENTRY_POINTS = ("fused", "fused_sparse", "accumulate", "accumulate_value", "gradient", "scale_")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
    return None


def cannot(device: torch.device, dtypes: list[torch.dtype], spec: Spec) -> str | None:
    if problem := spec.why_no_kernel():
        return problem
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"it serves cuda tensors, not {device.type}"
    return why_not_dtypes(dtypes)


def bytes_per_logit(dtypes: list[torch.dtype]) -> int:
    return 0


def __getattr__(attribute: str) -> Any:
    """The entry points of the waist, and ``scale_``."""
    if attribute not in _ENTRY_POINTS:
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    return getattr(importlib.import_module(".launch", __name__), attribute)
