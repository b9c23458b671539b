"""Top-k log-probabilities as other programs write them -> (ids, logprobs) for a SparseTarget.

Unless said otherwise, row t of the result is about token t + 1, as row t of a causal LM's logits is.
A record that does not have its producer's shape is a ValueError that says which record and what is wrong.
Nothing but torch is imported: numpy arrays, lists and the producers' own objects are taken as they come.
"""

from __future__ import annotations

import math
import reprlib
from array import array
from collections.abc import Mapping
from itertools import compress
from typing import Any, Sequence

import torch
from torch import Tensor

from ..checks import integer, positive_integer

Pair = tuple[Tensor, Tensor]
Slots = list[tuple[int, float]]
Columns = tuple[array, array]  #: the same as an array of ids and one of log-probabilities

#: What the producers write into empty slots; -inf is another way, and older Megatron shards have -1e4.
AXOLOTL_EMPTY, MEGATRON_EMPTY, TINKER_EMPTY = -1e9, -1e3, -99999.0


def vllm(prompt_logprobs: Sequence[Any], *, top_k: int | None = None) -> Pair:
    """``RequestOutput.prompt_logprobs`` of one prompt, or the same from vLLM's HTTP server as JSON.

    One entry per prompt token, a dict from token id to Logprob (logprob, rank, decoded_token); None or
    empty for the first token. Entry t is about token t, hence is row t - 1 here and the last row is empty.
    The prompt's own token is there even when its rank is beyond the k asked for; ``top_k`` drops it.

    Source: vLLM 0.11 and later, vllm/logprobs.py (Logprob, FlatLogprobs, PromptLogprobs).
    """
    top_k = None if top_k is None else positive_integer("top_k", top_k)
    _check(prompt_logprobs is not None, "vLLM's prompt_logprobs is None: ask for it in SamplingParams")
    rows: list[Slots | Columns] = []
    for t, entry in enumerate(prompt_logprobs):
        where = f"vLLM's prompt_logprobs[{t}]"
        if not entry:
            _check(t == 0, f"{where} is {entry!r}; only the first may be empty")
            continue
        if t == 0:
            raise ValueError(f"{where} has log-probabilities, but nothing comes before the first token")
        if not isinstance(entry, Mapping):  # not by _check: a row's repr takes longer than the row
            raise ValueError(f"{where} is {_what(entry)}, not a dict of Logprob")
        if (row := _vllm_row(entry, top_k)) is not None:
            rows.append(row)
            continue
        slots = []
        for token, item in entry.items():
            field = item.get if isinstance(item, Mapping) else lambda name, of=item: getattr(of, name, None)
            logprob, rank = field("logprob"), field("rank")
            _check(logprob is not None, f"{where}[{token!r}] is {_what(item)}, not a Logprob")
            if top_k is not None:
                _check(isinstance(rank, int), f"{where}[{token!r}] has no rank, which top_k={top_k} needs")
                if rank > top_k:  # type: ignore[operator]
                    continue
            slots.append((_id(token, where), _logprob(logprob, where)))
        rows.append(slots)
    _check(len(prompt_logprobs) > 0, "vLLM's prompt_logprobs is empty")
    return _padded(rows + [[]] * (len(prompt_logprobs) - len(rows)))


def _vllm_row(entry: Mapping[Any, Any], top_k: int | None) -> Columns | None:
    """A token's (ids, logprobs) at once; None where anything is not as vLLM writes it, which is then named."""
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
    return _columns(ids, logprobs)


def distillkit(row: Mapping[str, Any], config: Mapping[str, Any]) -> Pair:
    """A row of DistillKit's captured logits, and the compression_config.yaml that lies beside them as a dict.

    ``compressed_logprobs`` and ``bytepacked_indices`` are lists of bytes per token, one token less than
    ``input_ids``: row t is about token t + 1, and an empty row is added for the last token. The curve that
    DistillKit fits may give a token a mass above 1; tail "renormalize" or "conditional" then takes it.

    Source: arcee-ai/DistillKit, distillkit/sample_logits_vllm.py (rows), compression/config.py,
    compression/monotonic_logprobs.py and compression/bitpack.py (bytes).
    """
    for name in ("d", "k", "exact_k"):
        _check(name in config, f"DistillKit's config has no {name}, only {', '.join(config)}")
    d, k, exact_k = (integer(f"DistillKit's {name}", config[name]) for name in ("d", "k", "exact_k"))
    _check(d > 1 and 0 <= exact_k <= k and k > 0, f"DistillKit's config has {d=}, {k=} and {exact_k=}")
    _check(
        "packed_indices" not in row,
        "DistillKit's row is in its legacy format (packed_indices); capture it again "
        "with a logprob_compressor",
    )
    packed_ids = _bytes(row, "bytepacked_indices", "DistillKit's row")
    packed = _bytes(row, "compressed_logprobs", "DistillKit's row")
    _check(
        len(packed) == len(packed_ids),
        f"DistillKit's row has {len(packed)} tokens of compressed_logprobs but "
        f"{len(packed_ids)} of bytepacked_indices",
    )
    parts, id_bytes = distillkit_bytes(config)
    for name, found, wanted in (
        ("compressed_logprobs", packed, sum(parts)),
        ("bytepacked_indices", packed_ids, id_bytes),
    ):
        _check(
            found.shape[1] == wanted,
            f"DistillKit's {name} has {found.shape[1]} bytes a token; this config gives {wanted}",
        )
    ids = _unpack(packed_ids, _id_bits(config), k)
    bad = (ids >= d).any(-1).nonzero().flatten().tolist()
    _check(not bad, f"DistillKit's bytepacked_indices{bad[:1]} has an id beyond {d=}")
    logprobs = _distillkit_logprobs(packed, config)
    _refuse(~(logprobs < math.inf), logprobs, "DistillKit's log-probabilities", "a log-probability")
    tokens = len(row["input_ids"]) if "input_ids" in row else len(ids)
    _check(
        tokens - len(ids) in (0, 1),
        f"DistillKit's row has {tokens} input_ids but {len(ids)} tokens of logits",
    )
    empty = ids.new_full((tokens - len(ids), k), -1)
    return torch.cat([ids, empty]), torch.cat([logprobs, logprobs.new_zeros(empty.shape)])


def axolotl(row: Mapping[str, Any], *, shift: int = 0) -> Pair:
    """axolotl's columns target_token_ids, target_logprobs, target_mask ``[T, K]``, or a batch ``[B, T, K]``.

    An empty slot is masked and has -inf (its datasets, chat_template.py) or -1e9 (its collator,
    collator.py); rows of a dataset may differ in K. With ``shift=0`` row t goes with the hidden state t,
    as in axolotl's own loss (kernels/liger.py). Give ``shift=1`` if your rows are about token t itself,
    as its online collator writes them: they then move one to the left and the last is empty.

    Source: axolotl 0.19.0, axolotl/integrations/kd.
    """
    _check(shift in (0, 1), f"shift must be 0 or 1, got {shift}")
    columns = []
    for name, pad in (("target_token_ids", 0), ("target_logprobs", -math.inf), ("target_mask", 0)):
        _check(name in row, f"axolotl's row has no {name}, only {', '.join(row)}")
        columns.append(_rectangle(row[name], f"axolotl's {name}", pad))
    for name in ("target_logprobs", "target_mask"):
        _check_slots(row[name], row["target_token_ids"], f"axolotl's {name}")
    ids, logprobs, mask = columns
    _check(
        ids.shape == logprobs.shape == mask.shape and ids.dim() >= 2,
        "axolotl's target_token_ids, target_logprobs and "
        f"target_mask have shapes {tuple(ids.shape)}, {tuple(logprobs.shape)} and {tuple(mask.shape)}",
    )
    _refuse((mask != 0) & (mask != 1), mask, "axolotl's target_mask", "0 or 1")
    full = mask.bool() & ~(logprobs <= AXOLOTL_EMPTY)
    pair = _emptied(ids, logprobs, full, "axolotl's target_token_ids", "axolotl's target_logprobs")
    return _earlier(*pair) if shift else pair


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
    for name in ("logprobs", "logprob_token_ids"):
        _check(name in result, f"TRL's result has no {name}, only {', '.join(result)}")
    all_ids, all_logprobs = result["logprob_token_ids"], result["logprobs"]
    _check_nested(all_ids, "TRL's logprob_token_ids")
    _check_nested(all_logprobs, "TRL's logprobs")
    if prompt_lengths is None:
        starts = [0] * len(all_ids)
    else:
        starts = [integer("a prompt's length", tokens) - 1 for tokens in prompt_lengths]
    _check(
        len(all_ids) == len(all_logprobs) == len(starts),
        f"TRL's result has {len(all_ids)} sequences of ids, "
        f"{len(all_logprobs)} of logprobs and {len(starts)} of prompt_lengths",
    )
    sequences: list[list[Slots | Columns]] = []
    for i, (ids, logprobs, begin) in enumerate(zip(all_ids, all_logprobs, starts)):
        where = f"TRL's sequence {i}"
        _check(begin >= 0, f"{where} has no prompt: nothing says its first token")
        _check(
            [len(x) for x in ids] == [len(x) for x in logprobs],
            f"{where} has other slots in logprobs than in ids",
        )
        rows = [
            _columns(*row) or [(_id(token, where), _logprob(value, where)) for token, value in zip(*row)]
            for row in zip(ids, logprobs)
        ]
        empty: list[Slots | Columns] = [[]]
        sequences.append(empty * begin + rows + ([] if prompt_lengths is None else [[]]))
    longest = max((len(rows) for rows in sequences), default=0)
    length = longest if length is None else integer("length", length)
    _check(length >= longest, f"TRL's result has {longest} tokens, more than length={length}")
    ids, values = _padded([row for rows in sequences for row in rows + [[]] * (length - len(rows))])
    return ids.unflatten(0, (len(sequences), length)), values.unflatten(0, (len(sequences), length))


def tinker(topk_prompt_logprobs: Any) -> Pair:
    """``SampleResponse.topk_prompt_logprobs`` of tinker: per prompt token None or up to k (id, logprob), or
    the arrays ``topk_prompt_logprobs_np`` whose empty slots are (0, -99999).

    Entry t is about token t, hence is row t - 1 here and the last row is empty. Tokens that were not
    scored (None) are empty rows: mask them in the labels.

    Source: tinker 0.38.0, tinker/types/sample_response.py and topk_logprobs.py.
    """
    if hasattr(topk_prompt_logprobs, "token_ids"):
        ids = _array(topk_prompt_logprobs.token_ids, "tinker's token_ids")
        logprobs = _array(topk_prompt_logprobs.logprobs, "tinker's logprobs")
        _check(
            ids.shape == logprobs.shape and ids.dim() == 2 and len(ids) > 0,
            f"tinker's token_ids {tuple(ids.shape)} and logprobs "
            f"{tuple(logprobs.shape)} are not both [tokens, k]",
        )
        full = ~(logprobs <= TINKER_EMPTY)
        _check(
            not full[0].any(),
            "tinker's arrays are not empty in row 0, but nothing comes before the first token",
        )
        return _earlier(*_emptied(ids, logprobs, full, "tinker's token_ids", "tinker's logprobs"))
    _check(topk_prompt_logprobs, "tinker's topk_prompt_logprobs is empty: ask for it in the request")
    rows: list[Slots | Columns] = []
    for t, entry in enumerate(topk_prompt_logprobs):
        where = f"tinker's topk_prompt_logprobs[{t}]"
        _check(t > 0 or not entry, f"{where} has log-probabilities, but nothing comes before the first token")
        try:
            if entry and (row := _columns(*zip(*entry))) is not None:
                rows.append(row)
                continue
        except (TypeError, ValueError):
            pass  # what follows says what is wrong
        try:
            slots = [(token, logprob) for token, logprob in entry or []]
        except (TypeError, ValueError):
            raise ValueError(f"{where} is {_what(entry)}, not a list of (id, logprob)") from None
        rows.append([(_id(token, where), _logprob(logprob, where)) for token, logprob in slots])
    return _padded(rows[1:] + [[]])


def megatron(payload: Mapping[str, Any]) -> Pair:
    """An iteration's payload in Megatron-LM's cached logits: ``values``, ``indices_low`` (uint16) and ``bit_17``
    (bool), sequence-first ``[S, B, K]`` (format 2) or a list of them, one per micro-batch (format 1).

    The result is ``[B, S, K]``, micro-batches one after the other. Ids are ``bit_17 << 16 | indices_low``.
    An entry that top-p dropped has the value -1e3 (older: -1e4) and is empty. Megatron's ghost token is the
    tail "bucket"; its loss without one is "truncate".

    Source: NVIDIA/Megatron-LM, megatron/training/distillation/utils.py, logits_saver.py, cached_logits_loss.py.
    """
    for name in ("values", "indices_low", "bit_17"):
        _check(name in payload, f"Megatron's payload has no {name}, only {', '.join(payload)}")
    parts = [payload[name] for name in ("values", "indices_low", "bit_17")]
    if not isinstance(parts[0], (list, tuple)):
        parts = [[part] for part in parts]
    _check(
        len({len(part) for part in parts}) == 1,
        f"Megatron's payload has {[len(part) for part in parts]} micro-batches of "
        "values, indices_low and bit_17",
    )
    _check(parts[0], "Megatron's payload has no micro-batch")
    batches: list[Pair] = []
    for i, each in enumerate(zip(*parts)):
        where = f"Megatron's micro-batch {i}"
        values, low, high = (_array(part, where) for part in each)
        _check(
            values.shape == low.shape == high.shape and values.dim() == 3,
            f"{where} has shapes {tuple(values.shape)}, "
            f"{tuple(low.shape)} and {tuple(high.shape)}, not one [S, B, K]",
        )
        _check(
            low.dtype == torch.uint16 and high.dtype == torch.bool,
            f"{where} has ids in {low.dtype} and {high.dtype}, not in uint16 and bool",
        )
        ids, full = (high.long() << 16) | low.long(), ~(values <= MEGATRON_EMPTY)
        batches.append(_emptied(ids, values, full, f"{where}: indices", f"{where}: values"))
        _check(
            len(ids) == len(batches[0][0]),
            f"{where} has {len(ids)} tokens a sequence, the first {len(batches[0][0])}",
        )
    slots = max(ids.shape[-1] for ids, _ in batches)
    wide = [(_wider(ids, slots, -1), _wider(logprobs, slots, -math.inf)) for ids, logprobs in batches]
    return (
        torch.cat([ids.transpose(0, 1) for ids, _ in wide]),
        torch.cat([logprobs.transpose(0, 1) for _, logprobs in wide]),
    )


# --- DistillKit's bytes ------------------------------------------------------------------------


def distillkit_bytes(config: Mapping[str, Any]) -> tuple[list[int], int]:
    """What DistillKit's compression takes per token: bytes of each part of the log-probs, bytes of the ids.

    The parts are the exact values, the curve's coefficients, and scale and codes of each residual bin.

    >>> parts, ids = distillkit_bytes({"d": 128256, "k": 50, "exact_k": 1, "exact_dtype": "bfloat16",
    ...                                "polynomial_terms": [0, 1, "sqrt"]})
    >>> parts, ids, sum(parts) + ids
    ([2, 12], 107, 121)
    """
    parts = [
        _width(config.get("exact_dtype", "float32")) * config["exact_k"],
        _width(config.get("term_dtype", "float32")) * len(config.get("polynomial_terms") or []),
    ]
    for each in config.get("residual_bins") or []:
        parts += [_width(each["scale_dtype"]), (each["element_bits"] * each["num_elements"] + 7) // 8]
    return parts, (config["k"] * _id_bits(config) + 7) // 8


def _distillkit_logprobs(packed: Tensor, config: Mapping[str, Any]) -> Tensor:
    """[T, k] fp32: exact values, then a curve plus quantised residuals; perhaps all as differences."""
    count, terms = config["k"] - config["exact_k"], config.get("polynomial_terms") or []
    exact, coefficients, *rest = packed.split(distillkit_bytes(config)[0], dim=1)
    values = _as(exact, config.get("exact_dtype", "float32"))
    curve = torch.zeros(len(packed), count)
    if terms:
        x = torch.arange(count, dtype=torch.float32)
        if config.get("normalize_t"):
            x = torch.linspace(0, 1, count)
        basis = torch.stack([x**term if isinstance(term, int) else getattr(torch, term)(x) for term in terms])
        curve = _as(coefficients, config.get("term_dtype", "float32")) @ basis
    begin = 0
    for each, scale, codes in zip(config.get("residual_bins") or [], rest[::2], rest[1::2]):
        bits, end = each["element_bits"], begin + each["num_elements"]
        code = _unpack(codes, bits, end - begin).float()
        level = 2 * code - 1 if bits == 1 else code - 2 ** (bits - 1)
        curve[:, begin:end] += level * _as(scale, each["scale_dtype"])
        begin = end
    logprobs = torch.cat([values, curve], -1)
    return logprobs.cumsum(-1) if config.get("delta_encoding", True) else logprobs


def _id_bits(config: Mapping[str, Any]) -> int:
    return math.ceil(math.log2(config["d"]))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    _check(isinstance(dtype, torch.dtype), f"DistillKit's config has {name!r} for a dtype")
    return dtype  # type: ignore[return-value]


def _width(dtype: str) -> int:
    return _dtype(dtype).itemsize


def _as(part: Tensor, dtype: str) -> Tensor:
    return part.contiguous().view(_dtype(dtype)).float() if part.shape[1] else part.float()


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """[T, count] integers of ``bits`` bits each, most significant bit first."""
    flat = (packed[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    each = flat.flatten(1)[:, : count * bits].unflatten(1, (count, bits)).long()
    return (each << torch.arange(bits - 1, -1, -1)).sum(-1)


def _bytes(row: Mapping[str, Any], name: str, whose: str) -> Tensor:
    """[T, bytes] uint8."""
    _check(name in row, f"{whose} has no {name}, only {', '.join(row)}")
    value = row[name]
    if isinstance(value, Tensor):
        if value.dtype not in (torch.uint8, torch.int8):
            value = _signed(value)
            _refuse(
                (value < 0) | (value > 255) | (value != value.floor()), value, f"{whose}'s {name}", "a byte"
            )
        return value.to(torch.uint8)
    try:
        packed = [bytes(token if isinstance(token, bytes) else list(token)) for token in value]
    except (TypeError, ValueError):
        raise ValueError(f"{whose} has something else than bytes in {name}") from None
    widths = {len(token) for token in packed}
    _check(len(widths) == 1, f"{whose} has tokens of {sorted(widths)} bytes in {name}")
    return torch.frombuffer(bytearray().join(packed), dtype=torch.uint8).view(len(packed), -1)


# --- shared ------------------------------------------------------------------------------------


def _check(fine: Any, message: str) -> None:
    if not fine:
        raise ValueError(message)


def _check_nested(lists: Any, whose: str) -> None:
    """Lists of lists of lists, or of arrays."""
    try:
        fine = all(len(row) >= 0 for rows in lists for row in rows)
    except TypeError:
        fine = False
    _check(fine, f"{whose} is {_what(lists)}, not [B, completion, K]")


def _what(value: Any) -> str:
    """A few of its entries: all of a record's take longer to print than to read."""
    return reprlib.repr(value)


def _id(token: Any, where: str) -> int:
    try:
        value = int(token)
    except (TypeError, ValueError, OverflowError):
        value = -1
    _check(0 <= value < 2**63 and not isinstance(token, float), f"{where} has {token!r} for a token id")
    return value


def _logprob(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    _check(number < 1e-2, f"{where} has {value!r} for a log-probability")  # nan too
    return number


def _columns(ids: Any, logprobs: Any) -> Columns | None:
    """A token's slots as arrays, checked at once as :func:`_id` and :func:`_logprob` check them one by one; None where one
    of them would refuse, or convert."""
    try:
        columns = array("q", ids), array("d", logprobs)
    except (TypeError, OverflowError, ValueError):
        return None
    return columns if _fine(*columns) else None


def _fine(ids: array, logprobs: array) -> bool:
    if len(ids) != len(logprobs):
        return False
    return not ids or (min(ids) >= 0 and max(logprobs) < 1e-2 and sum(logprobs) < math.inf)  # the sum: no NaN


def _padded(rows: Sequence[Slots | Columns]) -> Pair:
    """[T, K] of rows of (id, logprob). K is the longest row; shorter ones end in empty slots."""
    columns = [row if isinstance(row, tuple) else tuple(zip(*row)) or ((), ()) for row in rows]
    slots = max([1, *(len(ids) for ids, _ in columns)])
    if not rows:
        return torch.empty(0, slots, dtype=torch.int64), torch.empty(0, slots)
    all_ids, all_values = array("q"), array("d")
    for ids, values in columns:
        missing = slots - len(ids)
        all_ids.extend(ids)
        all_ids.extend([-1] * missing)
        all_values.extend(values)
        all_values.extend([-math.inf] * missing)
    found = torch.frombuffer(all_ids, dtype=torch.int64).clone()
    logprobs = torch.frombuffer(all_values, dtype=torch.float64).float()
    return found.view(-1, slots), logprobs.view(-1, slots)


def _rectangle(rows: Sequence[Any], whose: str, pad: float) -> Tensor:
    """[T, K] of T lists, K the longest; short ones are padded. What has one shape is taken as it is."""
    if isinstance(rows, Tensor) or hasattr(rows, "__array__"):
        return _array(rows, whose)
    _check(isinstance(rows, (list, tuple)), f"{whose} is {_what(rows)}, not a list of lists")
    _check(len(rows), f"{whose} is empty")
    for t, row in enumerate(rows):
        if not isinstance(row, (list, tuple)):  # not by _check: a row's repr takes longer than the row
            raise ValueError(f"{whose}[{t}] is {_what(row)}, not a list")
    slots = max(1, *(len(row) for row in rows))
    for code, dtype in (("q", torch.int64), ("d", torch.float64)):
        try:
            flat = array(code)
            for row in rows:
                flat.extend(array(code, row))
                flat.extend([pad] * (slots - len(row)))  # type: ignore[list-item]
            return torch.frombuffer(flat, dtype=dtype).clone().view(-1, slots)
        except (TypeError, OverflowError, ValueError):
            pass  # other numbers, or none
    try:
        return torch.tensor(rows, dtype=torch.float64)  # a batch of sequences of one length
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{whose} has something else than numbers") from None


def _check_slots(rows: Any, beside: Any, whose: str) -> None:
    """Lists of lists have as many slots in each row as ``beside``."""
    if (
        not isinstance(rows, (list, tuple))
        or not isinstance(beside, (list, tuple))
        or len(rows) != len(beside)
    ):
        return  # shapes say it
    for t, (row, other) in enumerate(zip(rows, beside)):
        if len(row) != len(other):
            raise ValueError(f"{whose}[{t}] has {len(row)} slots, the ids {len(other)}")


def _wider(values: Tensor, slots: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, slots - values.shape[-1]), value=fill)


def _earlier(ids: Tensor, logprobs: Tensor) -> Pair:
    """Rows [..., T, K] about token t become rows about token t + 1; the last is empty."""
    ids, logprobs = ids.roll(-1, -2), logprobs.roll(-1, -2)
    ids[..., -1, :], logprobs[..., -1, :] = -1, -math.inf
    return ids, logprobs


def _emptied(ids: Tensor, logprobs: Tensor, full: Tensor, ids_name: str, logprobs_name: str) -> Pair:
    """The same, with empty slots where it is not ``full``. What is no log-probability is refused everywhere, what is no id
    where it is ``full``."""
    ids = _signed(ids)
    _refuse(full & ((ids < 0) | (ids != ids.floor())), ids, ids_name, "a token id")
    _refuse(~(logprobs < 1e-2), logprobs, logprobs_name, "a log-probability")
    return ids.long().masked_fill(~full, -1), logprobs.float().masked_fill(~full, -math.inf)


def _array(given: Any, whose: str) -> Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{whose} has {_what(given)}, not an array of numbers") from None


def _signed(numbers: Tensor) -> Tensor:
    """Integers as int64: of unsigned ones torch compares no more than bytes."""
    return numbers if numbers.is_floating_point() else numbers.long()


def _refuse(bad: Tensor, values: Tensor, whose: str, wanted: str) -> None:
    """ValueError that names the first of ``values`` that is ``bad``."""
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{whose}{at} is {values[tuple(at)].item()}, not {wanted}")
