"""axolotl's columns of a dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .arrays import Pair, earlier, emptied, refuse
from .shape import check, check_fields
from .slots import nested, rectangle

#: In an empty slot; -inf is another way.
EMPTY = -1e9


def axolotl(row: Mapping[str, Any], *, shift: int = 0) -> Pair:
    """axolotl's columns target_token_ids, target_logprobs, target_mask ``[T, K]``, or a batch ``[B, T, K]``.

    An empty slot is masked and has -inf (its datasets, chat_template.py) or -1e9 (its collator,
    collator.py); tokens in lists may differ in K. With ``shift=0`` row t goes with the hidden state t,
    as in axolotl's own loss (kernels/liger.py). Give ``shift=1`` if your rows are about token t itself,
    as its online collator writes them: they then move one to the left and the last is empty.

    Source: axolotl 0.19.0, axolotl/integrations/kd.
    """
    check(shift in (0, 1), f"shift must be 0 or 1, got {shift}")
    check_fields(row, ("target_token_ids", "target_logprobs", "target_mask"), "axolotl's row")
    columns = []
    for name, pad in (("target_token_ids", 0), ("target_logprobs", -math.inf), ("target_mask", 0)):
        columns.append(rectangle(row[name], f"axolotl's {name}", pad))
    for name in ("target_logprobs", "target_mask"):
        _check_slots(row[name], row["target_token_ids"], f"axolotl's {name}")
    ids, logprobs, mask = columns
    check(
        ids.shape == logprobs.shape == mask.shape and ids.dim() >= 2,
        "axolotl's target_token_ids, target_logprobs and "
        f"target_mask have shapes {tuple(ids.shape)}, {tuple(logprobs.shape)} and {tuple(mask.shape)}",
    )
    refuse((mask != 0) & (mask != 1), mask, "axolotl's target_mask", "0 or 1")
    full = mask.bool() & ~(logprobs <= EMPTY)
    pair = emptied(ids, logprobs, full, "axolotl's target_token_ids", "axolotl's target_logprobs")
    return earlier(*pair) if shift else pair


def _check_slots(rows: Any, beside: Any, whose: str) -> None:
    """Lists have as many slots in each token as ``beside``."""
    if (
        not isinstance(rows, (list, tuple))
        or not isinstance(beside, (list, tuple))
        or len(rows) != len(beside)
    ):
        return  # shapes say it
    for t, (row, other) in enumerate(zip(rows, beside)):
        if nested(row):
            _check_slots(row, other, f"{whose}[{t}]")
        elif not nested(other) and len(row) != len(other):
            raise ValueError(f"{whose}[{t}] has {len(row)} slots, the ids {len(other)}")
