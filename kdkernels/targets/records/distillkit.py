"""DistillKit's captured logits: ids in few bits, and a curve of log-probabilities with quantised residuals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...checks import integer
from .arrays import Pair, refuse, signed
from .shape import check, check_fields


def distillkit(row: Mapping[str, Any], config: Mapping[str, Any]) -> Pair:
    """A row of DistillKit's captured logits, and the compression_config.yaml that lies beside them as a dict.

    ``compressed_logprobs`` and ``bytepacked_indices`` are lists of bytes per token, one token less than
    ``input_ids``: row t is about token t + 1, and an empty row is added for the last token. The curve that
    DistillKit fits may give a token a mass above 1; tail "renormalize" or "conditional" then takes it.

    Source: arcee-ai/DistillKit, distillkit/sample_logits_vllm.py (rows), compression/config.py,
    compression/monotonic_logprobs.py and compression/bitpack.py (bytes).
    """
    check_fields(config, ("d", "k", "exact_k"), "DistillKit's config")
    check_fields(row, (), "DistillKit's row")
    d, k, exact_k = (integer(f"DistillKit's {name}", config[name]) for name in ("d", "k", "exact_k"))
    check(d > 1 and 0 <= exact_k <= k and k > 0, f"DistillKit's config has {d=}, {k=} and {exact_k=}")
    check(
        "packed_indices" not in row,
        "DistillKit's row is in its legacy format (packed_indices); capture it again "
        "with a logprob_compressor",
    )
    packed_ids = _bytes(row, "bytepacked_indices", "DistillKit's row")
    packed = _bytes(row, "compressed_logprobs", "DistillKit's row")
    check(
        len(packed) == len(packed_ids),
        f"DistillKit's row has {len(packed)} tokens of compressed_logprobs but "
        f"{len(packed_ids)} of bytepacked_indices",
    )
    parts, id_bytes = distillkit_bytes(config)
    for name, found, wanted in (
        ("compressed_logprobs", packed, sum(parts)),
        ("bytepacked_indices", packed_ids, id_bytes),
    ):
        check(
            found.shape[1] == wanted,
            f"DistillKit's {name} has {found.shape[1]} bytes a token; this config gives {wanted}",
        )
    ids = _unpack(packed_ids, _id_bits(config), k)
    bad = (ids >= d).any(-1).nonzero().flatten().tolist()
    check(not bad, f"DistillKit's bytepacked_indices{bad[:1]} has an id beyond {d=}")
    logprobs = _logprobs(packed, config)
    refuse(~(logprobs < math.inf), logprobs, "DistillKit's log-probabilities", "a log-probability")
    tokens = len(row["input_ids"]) if "input_ids" in row else len(ids)
    check(
        tokens - len(ids) in (0, 1),
        f"DistillKit's row has {tokens} input_ids but {len(ids)} tokens of logits",
    )
    empty = ids.new_full((tokens - len(ids), k), -1)
    return torch.cat([ids, empty]), torch.cat([logprobs, logprobs.new_zeros(empty.shape)])


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
    for i, each in enumerate(config.get("residual_bins") or []):
        check_fields(
            each, ("scale_dtype", "element_bits", "num_elements"), f"DistillKit's residual_bins[{i}]"
        )
        parts += [_width(each["scale_dtype"]), (each["element_bits"] * each["num_elements"] + 7) // 8]
    return parts, (config["k"] * _id_bits(config) + 7) // 8


def _logprobs(packed: Tensor, config: Mapping[str, Any]) -> Tensor:
    """[T, k] fp32: exact values, then a curve plus quantised residuals; perhaps all as differences."""
    count, terms = config["k"] - config["exact_k"], config.get("polynomial_terms") or []
    exact, coefficients, *rest = packed.split(distillkit_bytes(config)[0], dim=1)
    values = _as(exact, config.get("exact_dtype", "float32"))
    curve = torch.zeros(len(packed), count)
    if terms:
        x = torch.arange(count, dtype=torch.float32)
        if config.get("normalize_t"):
            x = torch.linspace(0, 1, count)
        basis = torch.stack([_of_term(term, x) for term in terms])
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


def _of_term(term: int | str, x: Tensor) -> Tensor:
    if isinstance(term, int):
        return x**term
    check(hasattr(torch, str(term)), f"DistillKit's config has {term!r} among its polynomial_terms")
    return getattr(torch, term)(x)


def _id_bits(config: Mapping[str, Any]) -> int:
    return math.ceil(math.log2(config["d"]))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    check(isinstance(dtype, torch.dtype), f"DistillKit's config has {name!r} for a dtype")
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
    check_fields(row, (name,), whose)
    value = row[name]
    if isinstance(value, Tensor):
        if value.dtype not in (torch.uint8, torch.int8):
            value = signed(value)
            refuse(
                (value < 0) | (value > 255) | (value != value.floor()), value, f"{whose}'s {name}", "a byte"
            )
        return value.to(torch.uint8)
    try:
        packed = [bytes(token if isinstance(token, bytes) else list(token)) for token in value]
    except (TypeError, ValueError):
        raise ValueError(f"{whose} has something else than bytes in {name}") from None
    widths = {len(token) for token in packed}
    check(len(widths) == 1, f"{whose} has tokens of {sorted(widths)} bytes in {name}")
    return torch.frombuffer(bytearray().join(packed), dtype=torch.uint8).view(len(packed), -1)
