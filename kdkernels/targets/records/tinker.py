"""tinker's topk_prompt_logprobs."""

from __future__ import annotations

from typing import Any

from .arrays import Pair, array_of, earlier, emptied
from .shape import check, entries_of, what
from .slots import Columns, Slots, columns_of, logprob_of, padded, token_id

#: In an empty slot of its arrays.
EMPTY = -99999.0


def tinker(topk_prompt_logprobs: Any) -> Pair:
    """``SampleResponse.topk_prompt_logprobs`` of tinker: per prompt token None or up to k (id, logprob), or
    the arrays ``topk_prompt_logprobs_np`` whose empty slots are (0, -99999).

    Entry t is about token t, hence is row t - 1 here and the last row is empty. Tokens that were not
    scored (None) are empty rows: mask them in the labels.

    Source: tinker 0.38.0, tinker/types/sample_response.py and topk_logprobs.py.
    """
    if hasattr(topk_prompt_logprobs, "token_ids"):
        return _of_arrays(topk_prompt_logprobs)
    rows: list[Slots | Columns] = []
    whose = "tinker's topk_prompt_logprobs"
    check(topk_prompt_logprobs is not None, f"{whose} is None: ask for it in the request")
    entries = entries_of(topk_prompt_logprobs, whose, "a list with an entry per token")
    check(len(entries) > 0, f"{whose} is empty: ask for it in the request")
    for t, entry in enumerate(entries):
        where = f"{whose}[{t}]"
        if entry is None or isinstance(entry, (list, tuple)) and not entry:
            rows.append([])
            continue
        check(t > 0, f"{where} has log-probabilities, but nothing comes before the first token")
        try:
            row = columns_of(*zip(*entry))
        except TypeError:
            row = None
        rows.append(_slots(entry, where) if row is None else row)
    return padded(rows[1:] + [[]])


def _slots(entry: Any, where: str) -> Slots:
    """A token's slots, one by one."""
    try:
        pairs = [(token, logprob) for token, logprob in entry]
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {what(entry)}, not a list of (id, logprob)") from None
    return [(token_id(token, where), logprob_of(logprob, where)) for token, logprob in pairs]


def _of_arrays(arrays: Any) -> Pair:
    ids = array_of(arrays.token_ids, "tinker's token_ids")
    logprobs = array_of(arrays.logprobs, "tinker's logprobs")
    check(
        ids.shape == logprobs.shape and ids.dim() == 2 and len(ids) > 0,
        f"tinker's token_ids {tuple(ids.shape)} and logprobs {tuple(logprobs.shape)} are not both [tokens, k]",
    )
    full = ~(logprobs <= EMPTY)
    check(
        not full[0].any(), "tinker's arrays are not empty in row 0, but nothing comes before the first token"
    )
    return earlier(*emptied(ids, logprobs, full, "tinker's token_ids", "tinker's logprobs"))
