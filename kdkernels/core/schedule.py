"""How tokens and vocabulary are cut so that the logit tiles fit a memory budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

import torch

#: What all logit tiles of a call may take together, in bytes, by default; on a GPU more (default_chunk_bytes).
DEFAULT_CHUNK_BYTES = 512 * 2**20
#: A GPU multiplies so fast that reading and writing an fp32 dW once per chunk shows: there a chunk of two models'
#: fp32 logits and the gradients of both has this many rows, where that is no more than a share of the memory.
_GPU_ROWS, _GPU_BYTES_PER_LOGIT, _GPU_SHARE = 2048, 12, 16
#: Below this many rows a GEMM loses its rate, and cutting the vocabulary is the better cut.
MIN_ROWS = 32
#: The narrowest vocabulary chunk that is worth a GEMM of its own.
MIN_COLUMNS = 64


def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


# As torch.compiler.assume_constant_result does, which imports the compiler and with it Triton.
_memory_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def default_chunk_bytes(device: torch.device, vocab: int) -> int:
    if device.type != "cuda":
        return DEFAULT_CHUNK_BYTES
    wanted = _GPU_ROWS * _GPU_BYTES_PER_LOGIT * vocab
    return max(DEFAULT_CHUNK_BYTES, min(wanted, _memory_of(device) // _GPU_SHARE))


@dataclass(frozen=True)
class Plan:
    """Tiles of ``rows`` tokens by ``columns`` vocabulary entries; columns == vocab: no recompute.

    No tile has tokens of two segments; there are ``segment`` tokens in each.
    """

    tokens: int
    vocab: int
    rows: int
    columns: int
    segment: int

    @property
    def one_tile_per_row(self) -> bool:
        return self.columns >= self.vocab

    def row_chunks(self) -> Iterator[slice]:
        for segment in _chunks(0, self.tokens, self.segment):
            yield from _chunks(segment.start, segment.stop, self.rows)

    def column_chunks(self) -> Iterator[slice]:
        return _chunks(0, self.vocab, self.columns)


def _chunks(begin: int, end: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, end)) for start in range(begin, end, size))


def _balanced(total: int, most: int) -> int:
    """The chunk of at most ``most`` that cuts ``total`` into equal parts: no narrow last chunk."""
    parts = -(-total // max(most, 1))
    return -(-total // max(parts, 1)) if total else 1


def plan(
    *,
    tokens: int,
    vocab: int,
    bytes_per_logit: int,
    chunk_bytes: int,
    bytes_per_row: int = 0,
    segment: int | None = None,
) -> Plan:
    """The tiles for ``[tokens, vocab]`` logits that cost ``bytes_per_logit`` each, and a token
    ``bytes_per_row`` beside. ``segment`` tokens, or all, can lie in one tile.

    Token chunks where at least MIN_ROWS rows (or all of them) fit, vocabulary chunks otherwise.
    ``bytes_per_logit=0`` means that tiles are views and cost nothing: one tile.

    >>> plan(tokens=512, vocab=32768, bytes_per_logit=8, chunk_bytes=2**26)
    Plan(tokens=512, vocab=32768, rows=256, columns=32768, segment=512)
    >>> plan(tokens=512, vocab=32768, bytes_per_logit=8, chunk_bytes=2**20)
    Plan(tokens=512, vocab=32768, rows=512, columns=256, segment=512)
    """
    together = max(tokens if segment is None else min(segment, tokens), 1)
    rows, columns = _tile(together, vocab, bytes_per_logit, bytes_per_row, chunk_bytes)
    return Plan(tokens, vocab, _balanced(together, rows), _balanced(vocab, columns), together)


def _tile(
    tokens: int, vocab: int, bytes_per_logit: int, bytes_per_row: int, chunk_bytes: int
) -> tuple[int, int]:
    """The most rows and columns."""
    whole_row = bytes_per_logit * vocab + bytes_per_row
    if whole_row == 0:
        return tokens, vocab
    rows = chunk_bytes // whole_row
    if rows >= min(tokens, MIN_ROWS) or bytes_per_logit == 0:
        return rows, vocab
    # What rows cost beside their logits gets at most half of the budget.
    most = min(tokens, max(chunk_bytes // 2 // bytes_per_row, 1)) if bytes_per_row else tokens
    logits = max((chunk_bytes - most * bytes_per_row) // bytes_per_logit, 1)
    columns = max(logits // most, min(MIN_COLUMNS, vocab, logits))
    return min(max(logits // columns, 1), most), columns
