"""What half precision is, and what is computed in instead."""

from __future__ import annotations

from collections.abc import Iterable

import torch

HALF = (torch.bfloat16, torch.float16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What products in ``dtype`` are added up in: fp32 for half precision."""
    return torch.float32 if dtype in HALF else dtype


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """What rows of these are computed in together: fp64 if one of them is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
