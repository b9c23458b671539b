"""vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from typing import Any, Sequence

from ...checks import positive_integer
from .arrays import Pair
from .shape import check, entries_of, what
from .slots import Columns, Slots, columns_of, logprob_of, padded, token_id


def vllm(prompt_logprobs: Sequence[Any], *, top_k: int | None = None) -> Pair:
    """``RequestOutput.prompt_logprobs`` of one prompt, or the same from vLLM's HTTP server as JSON.

    One entry per prompt token, a dict from token id to Logprob (logprob, rank, decoded_token); None or
    empty for the first token. Entry t is about token t, hence is row t - 1 here and the last row is empty.
    The prompt's own token is there even when its rank is beyond the k asked for; ``top_k`` drops it.

    Source: vLLM 0.11 and later, vllm/logprobs.py (Logprob, FlatLogprobs, PromptLogprobs).
    """
    top_k = None if top_k is None else positive_integer("top_k", top_k)
    check(prompt_logprobs is not None, "vLLM's prompt_logprobs is None: ask for it in SamplingParams")
    rows: list[Slots | Columns] = []
    entries = entries_of(prompt_logprobs, "vLLM's prompt_logprobs", "a list with an entry per token")
    check(len(entries) > 0, "vLLM's prompt_logprobs is empty")
    for t, entry in enumerate(entries):
        where = f"vLLM's prompt_logprobs[{t}]"
        if entry is None or isinstance(entry, Mapping) and not entry:
            check(t == 0, f"{where} is {entry}; only the first may be empty")
            continue
        check(t > 0, f"{where} has log-probabilities, but nothing comes before the first token")
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} is {what(entry)}, not a dict of Logprob")
        row = _columns(entry, top_k)
        rows.append(_slots(entry, top_k, where) if row is None else row)
    return padded(rows + [[]] * (len(entries) - len(rows)))


def _slots(entry: Mapping[Any, Any], top_k: int | None, where: str) -> Slots:
    """A token's slots, one by one."""
    slots = []
    for token, item in entry.items():
        field = item.get if isinstance(item, Mapping) else lambda name, of=item: getattr(of, name, None)
        logprob, rank = field("logprob"), field("rank")
        check(logprob is not None, f"{where}[{token!r}] is {what(item)}, not a Logprob")
        if top_k is not None:
            check(isinstance(rank, int), f"{where}[{token!r}] has no rank, which top_k={top_k} needs")
            if rank > top_k:  # type: ignore[operator]
                continue
        slots.append((token_id(token, where), logprob_of(logprob, where)))
    return slots


def _columns(entry: Mapping[Any, Any], top_k: int | None) -> Columns | None:
    """The same at once; None where anything is not as vLLM writes it, which :func:`_slots` then names."""
    items = entry.values()
    try:
        try:
            logprobs = [item.logprob for item in items]
            ranks = None if top_k is None else [item.rank for item in items]
        except AttributeError:  # from JSON
            logprobs = [item["logprob"] for item in items]
            ranks = None if top_k is None else [item["rank"] for item in items]
    except (AttributeError, TypeError, KeyError):
        return None
    ids: Any = list(entry)
    if ids and isinstance(ids[0], str):
        try:
            ids = [int(token) if isinstance(token, str) else token for token in ids]
        except ValueError:
            return None
    if ranks is not None:
        if not set(map(type, ranks)) <= {int}:
            return None
        kept = [rank <= top_k for rank in ranks]
        ids, logprobs = list(compress(ids, kept)), list(compress(logprobs, kept))
    return columns_of(ids, logprobs)
