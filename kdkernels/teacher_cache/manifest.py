"""What a cache holds, and what it may be trained with: ``manifest.json``, one per directory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Iterable, Sequence

import numpy as np

from ..targets import TAILS, Tail
from .codec import DTYPES

FORMAT_VERSION = 1
NAME = "manifest.json"
METHODS = ("top_k", "top_p", "samples", "given")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the targets are and what they were made from.

    Attributes:
        model: the teacher's name or path.
        tokenizer: :func:`tokenizer_hash` of the tokenizer that both models share.
        vocab_size: ids are below it.
        data: :func:`data_fingerprint` of the token sequences, in their order.
        sequences: how many there are.
        method: "top_k", "top_p", "samples", or "given" (made by another program).
        k: the most slots that a token may have; for "samples" the number of draws.
        top_p: the least mass that "top_p" stores, else None.
        proposal_temperature: of "samples"; weights are count / k when it is 1.
        kind: "logprobs" or "weights", as :class:`~kdkernels.SparseTarget` has them.
        tail: what a loss does about the rest, as :class:`~kdkernels.SparseTarget` has it.
        temperature: at which the teacher's log-probabilities were taken.
        shift: row t of a target is about token t + shift of its sequence.
        values: how values are stored: "float32" (as they are), "bfloat16", "uint8", "count".
        weights: what tells the teacher from others of its name, such as a hash of its files; None: nobody said.
        dtype: in which the teacher ran; None: nobody said.
        seed: of "samples"; else None.
        format_version: of the files.
    """

    model: str
    tokenizer: str
    vocab_size: int
    data: str
    sequences: int
    method: str
    k: int
    kind: str = "logprobs"
    top_p: float | None = None
    proposal_temperature: float = 1.0
    tail: Tail = "bucket"
    temperature: float = 1.0
    shift: int = 1
    values: str = "uint8"
    weights: str | None = None
    dtype: str | None = None
    seed: int | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        choices = {"method": METHODS, "kind": ("logprobs", "weights"), "tail": TAILS, "values": tuple(DTYPES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"a manifest's {name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        if self.values == "count" and self.kind != "weights":
            raise ValueError("values='count' stores the weights of samples, not logprobs")
        if self.values == "count" and self.k >= 2**16:
            raise ValueError(f"values='count' takes at most 65535 draws, got {self.k}; use uint8 or float32")
        if not 1 <= self.k:
            raise ValueError(f"a manifest needs k >= 1, got {self.k}")
        if not 1 <= self.vocab_size < 2**31:
            raise ValueError(f"a manifest needs 1 <= vocab_size < 2^31, got {self.vocab_size}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def digest(self) -> str:
        """sha256 of the text; every shard's record repeats it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises FileNotFoundError where there is no cache, ValueError where its manifest is broken."""
        path = directory / NAME
        if not path.is_file():
            raise FileNotFoundError(f"{directory} is no teacher cache: it has no {NAME}")
        try:
            values = json.loads(path.read_text())
            version = values.get("format_version")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version}; this kdkernels reads {FORMAT_VERSION}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def require(self, directory: Path | str, **wanted: Any) -> None:
        """ValueError where a field has another value than the one required; it names both."""
        known = {f.name for f in fields(self)}
        for name, value in wanted.items():
            if name not in known:
                raise TypeError(f"a manifest has no {name}")
            if getattr(self, name) != value:
                raise ValueError(
                    f"{directory} was made with {name} {getattr(self, name)!r}, but this run has {value!r}; "
                    "use what it was made with, or make another cache"
                )


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of a transformers tokenizer's vocabulary: every token with its id."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def data_fingerprint(
    sequences: Iterable[Sequence[int]], labels: Iterable[Sequence[int]] | None = None
) -> str:
    """sha256 of token sequences with their labels (by default the tokens themselves), in their order.

    Another order, length, id or mask gives another one.

    >>> data_fingerprint([[1, 2], [3]]) == data_fingerprint([[1, 2, 3]])
    False
    >>> data_fingerprint([[1, 2]]) == data_fingerprint([[1, 2]], [[-100, 2]])
    False
    """
    digest = hashlib.sha256()
    rows = ((ids, ids) for ids in sequences) if labels is None else zip(sequences, labels, strict=True)
    for row in rows:
        for part in row:
            ids = np.asarray(part, dtype="<i8")
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.tobytes())
    return digest.hexdigest()
