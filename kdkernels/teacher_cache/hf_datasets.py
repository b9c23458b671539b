"""Caches as :mod:`datasets` datasets, and datasets with the same columns as caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import datasets
import numpy as np

from ..targets import SparseTarget, Tail
from .codec import flatten, pad
from .manifest import Manifest, data_fingerprint
from .reader import TeacherCache
from .writer import CacheWriter


def to_dataset(directory: Path | str, *, streaming: bool = False) -> Any:
    """The targets as a ``datasets.Dataset`` (``IterableDataset`` if streaming).

    Columns: ``input_ids`` [T], and ragged [T, K_t]: ``ids``, and ``logprobs`` or ``weights`` as the
    manifest's ``kind`` says. Checksums are verified on the way. Without streaming, datasets stores a copy of
    everything, uncompressed, in its own cache.
    """
    cache = TeacherCache(directory)
    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int64")),
            "ids": datasets.Sequence(datasets.Sequence(datasets.Value("int32"))),
            cache.manifest.kind: datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
        }
    )
    # datasets tells its copies apart by these arguments: another cache in the same place has others.
    content = " ".join(shard.sha256 for shard in cache.shards)
    make = datasets.IterableDataset if streaming else datasets.Dataset
    return make.from_generator(
        _rows, features=features, gen_kwargs={"directory": str(directory), "content": content}
    )


def _rows(directory: str, content: str) -> Iterator[dict[str, Any]]:
    cache = TeacherCache(directory)
    for record in cache.stream():
        counts, ids, values = flatten(record.target)
        cuts = np.cumsum(counts)[:-1]
        yield {
            "input_ids": record.input_ids.numpy(),
            "ids": np.split(ids.astype(np.int32), cuts),
            cache.manifest.kind: np.split(values, cuts),
        }


def from_dataset(
    dataset: Any, directory: Path | str, *, model: str, tokenizer: str, vocab_size: int, **fields: Any
) -> Manifest:
    """Write a dataset with the columns of :func:`to_dataset` as a cache, and return its manifest.

    Row t of ``ids`` is about token t + ``shift`` (default 1); rows may be ragged, or padded with id -1. A
    column ``labels``, if there is one, goes into the fingerprint of the data, as the trainer has it. The dataset
    is gone through several times. As with every writer, an interrupted call goes on where it was.

    Args:
        model, tokenizer, vocab_size, **fields: of the :class:`Manifest`; the rest is found in the data.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know them
    kind = "weights" if "weights" in columns else "logprobs"
    for name in ("input_ids", "ids", kind):
        if name not in columns:
            raise ValueError(f"the dataset has no column {name}, only {', '.join(columns)}")
    labels = "labels" if "labels" in columns else "input_ids"
    data = data_fingerprint((row["input_ids"] for row in dataset), (row[labels] for row in dataset))
    slots = [max(map(len, row["ids"]), default=0) for row in dataset]
    found = {"method": "given", "data": data, "sequences": len(slots), "k": max([1, *slots]), "kind": kind}
    manifest = Manifest(model=model, tokenizer=tokenizer, vocab_size=vocab_size, **{**found, **fields})
    with CacheWriter(directory, manifest) as writer:
        todo = set(writer.todo())
        for index, row in enumerate(dataset):
            if index in todo:
                writer.write(index, row["input_ids"], _target(index, row, kind, manifest.tail))
    return manifest


def _target(index: int, row: dict[str, Any], kind: str, tail: Tail) -> SparseTarget:
    if not row["ids"]:
        raise ValueError(f"row {index} has no tokens; leave it out")
    counts = np.array([len(slots) for slots in row["ids"]])
    if [len(slots) for slots in row[kind]] != counts.tolist():
        raise ValueError(f"row {index} has other slots in {kind} than in ids")
    ids, values = (np.concatenate([np.asarray(s) for s in row[name]]) for name in ("ids", kind))
    bad = np.flatnonzero(~np.isfinite(ids) | (np.floor(ids) != ids))
    if len(bad):
        raise ValueError(f"row {index} has {ids[bad[0]]} for an id, not an integer")
    return pad(counts, ids, values, kind=kind, tail=tail, slots=int(counts.max(initial=0)))
