"""Files of a cache: Parquet shards that appear whole or not at all, and the records that commit them.

    manifest.json                   what the cache is (manifest.py)
    shard-0003-000017.parquet       shard 17 of writer 3: one row per sequence
    shard-0003-000017.json          its record, which commits it: sha256, bytes, rows
    writer-0003.lock                held by the live process that writes as rank 3

A shard is written under a temporary name, fsynced, renamed, and the directory fsynced; then its record
in the same way. A shard without a record does not exist for a reader.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .codec import DTYPES, Columns
from .manifest import Manifest

#: Columns of a row and the type of their elements; all but ``index`` are lists.
TYPES = {
    "input_ids": pa.int32(),
    "kept": pa.int32(),
    "gaps": pa.int32(),
    "log_mass": pa.float32(),
    "span": pa.float32(),
}
#: Columns that only some ways to store values need.
PER_TOKEN = {"bfloat16": ["log_mass"], "uint8": ["log_mass", "span"]}


@dataclass(frozen=True)
class Shard:
    """A committed shard: its file, what it weighs and which sequences are its rows."""

    file: str
    sha256: str
    bytes: int
    tokens: int
    kept: int
    rows: list[int]
    manifest: str

    @property
    def record(self) -> str:
        return Path(self.file).with_suffix(".json").name


def schema(manifest: Manifest) -> pa.Schema:
    lists = {name: TYPES[name] for name in ("input_ids", "kept", "gaps")}
    lists["values"] = pa.from_numpy_dtype(DTYPES[manifest.values])
    lists |= {name: TYPES[name] for name in PER_TOKEN.get(manifest.values, [])}
    return pa.schema({"index": pa.int64()} | {name: pa.list_(kind) for name, kind in lists.items()})


def open_writer(path: Path, manifest: Manifest) -> pq.ParquetWriter:
    # Byte planes for everything: small numbers in wide types then cost what their low byte costs.
    lists = [f"{name}.list.element" for name in schema(manifest).names if name != "index"]
    return pq.ParquetWriter(
        path, schema(manifest), compression="zstd", use_dictionary=False, write_statistics=False,
        column_encoding=dict.fromkeys(lists, "BYTE_STREAM_SPLIT"), write_page_checksum=True,
        data_page_version="2.0",
    )  # fmt: skip


def to_table(rows: list[tuple[int, Columns]], manifest: Manifest) -> pa.Table:
    kinds = schema(manifest)
    arrays = [pa.array([index for index, _ in rows], pa.int64())]
    for name in kinds.names[1:]:
        parts = [columns[name] for _, columns in rows]
        offsets = np.cumsum([0] + [len(part) for part in parts])
        values = pa.array(np.concatenate(parts), kinds.field(name).type.value_type)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values))
    return pa.table(arrays, schema=kinds)


def from_table(table: pa.Table, row: int) -> Columns:
    """The columns of one row, without copies where Arrow allows."""
    return {
        name: table.column(name).chunk(0)[row].values.to_numpy(zero_copy_only=False)
        for name in table.column_names
        if name != "index"
    }


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name: whole on disk before it can be seen."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    publish(temporary, path)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def commit(directory: Path, shard: Shard) -> None:
    write_text(directory / shard.record, json.dumps(asdict(shard)) + "\n")


def committed(directory: Path, manifest: Manifest) -> list[Shard]:
    """Every committed shard, by name. Raises ValueError where a record is damaged or of another cache."""
    shards = []
    for path in sorted(directory.glob("shard-*.json")):
        try:
            shard = Shard(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete it and its shard, then resume writing"
            ) from None
        if shard.manifest != manifest.digest():
            raise ValueError(
                f"{path} belongs to manifest {shard.manifest[:12]}, but {directory} has {manifest.digest()[:12]}"
            )
        shards.append(shard)
    return shards
