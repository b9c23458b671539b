"""What half precision is, and what is added up in instead."""

from __future__ import annotations

import torch

HALF = (torch.bfloat16, torch.float16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What products in ``dtype`` are added up in: fp32 for half precision."""
    return torch.float32 if dtype in HALF else dtype
