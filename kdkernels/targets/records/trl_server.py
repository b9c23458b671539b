"""What TRL's teacher server answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Sequence

from ...checks import integer
from .arrays import Pair
from .shape import check, check_fields, entries_of, what
from .slots import Columns, Slots, columns_of, logprob_of, padded, token_id


def trl_server(
    result: Mapping[str, Any], *, prompt_lengths: Sequence[int] | None = None, length: int | None = None
) -> Pair:
    """What TRL's ``VLLMClient.get_sequence_logprobs`` returns: lists [B, completion, K] of ``logprobs``
    and ``logprob_token_ids``, empty slots with -inf and id 0.

    Row t is about completion token t. With ``prompt_lengths`` (of the request) rows are put where the
    logits of the whole sequence are, so that row t is about token t + 1: ``[B, length, K]``, the longest
    sequence if ``length`` is None.

    Source: trl 1.16.0, trl/generation/vllm_client.py; used in experimental/server_distillation.
    """
    check_fields(result, ("logprobs", "logprob_token_ids"), "TRL's result")
    all_ids, all_logprobs = result["logprob_token_ids"], result["logprobs"]
    _check_nested(all_ids, "TRL's logprob_token_ids")
    _check_nested(all_logprobs, "TRL's logprobs")
    if prompt_lengths is None:
        starts = [0] * len(all_ids)
    else:
        lengths = entries_of(prompt_lengths, "prompt_lengths", "one number per sequence")
        starts = [integer("a prompt's length", tokens) - 1 for tokens in lengths]
    check(
        len(all_ids) == len(all_logprobs) == len(starts),
        f"TRL's result has {len(all_ids)} sequences of ids, "
        f"{len(all_logprobs)} of logprobs and {len(starts)} of prompt_lengths",
    )
    sequences: list[list[Slots | Columns]] = []
    for i, (ids, logprobs, begin) in enumerate(zip(all_ids, all_logprobs, starts)):
        where = f"TRL's sequence {i}"
        check(begin >= 0, f"{where} has no prompt: nothing says its first token")
        check(
            [len(x) for x in ids] == [len(x) for x in logprobs],
            f"{where} has other slots in logprobs than in ids",
        )
        rows = [
            columns_of(*row)
            or [(token_id(token, where), logprob_of(value, where)) for token, value in zip(*row)]
            for row in zip(ids, logprobs)
        ]
        empty: list[Slots | Columns] = [[]]
        sequences.append(empty * begin + rows + ([] if prompt_lengths is None else [[]]))
    longest = max((len(rows) for rows in sequences), default=0)
    length = longest if length is None else integer("length", length)
    check(length >= longest, f"TRL's result has {longest} tokens, more than length={length}")
    ids, values = padded([row for rows in sequences for row in rows + [[]] * (length - len(rows))])
    return ids.unflatten(0, (len(sequences), length)), values.unflatten(0, (len(sequences), length))


def _check_nested(lists: Any, whose: str) -> None:
    """Lists of lists of lists, or of arrays."""
    try:
        fine = all(len(row) >= 0 for rows in lists for row in rows)
    except TypeError:
        fine = False
    if not fine:
        raise ValueError(f"{whose} is {what(lists)}, not [B, completion, K]")
