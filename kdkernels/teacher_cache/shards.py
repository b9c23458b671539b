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
from numpy.typing import NDArray

from .codec import DTYPES, Columns
from .manifest import Manifest

#: The columns that are lists, and the type of their elements; the last two only where values need them.
LISTS = {"input_ids": pa.int32(), "kept": pa.int32(), "log_mass": pa.float32(), "span": pa.float32()}
PER_TOKEN = {"bfloat16": ("log_mass",), "uint8": ("log_mass", "span")}


@dataclass(frozen=True)
class Shard:
    """A committed shard: its file, its size and which sequences are its rows."""

    file: str
    sha256: str
    bytes: int
    tokens: int
    kept: int
    rows: list[int]
    manifest: str

    def __post_init__(self) -> None:
        for name in ("bytes", "tokens", "kept"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} is {getattr(self, name)!r}, not a number")
        if not isinstance(self.rows, list) or not all(isinstance(row, int) for row in self.rows):
            raise TypeError("rows is no list of numbers")
        if not all(isinstance(text, str) for text in (self.file, self.sha256, self.manifest)):
            raise TypeError("file, sha256 and manifest must be texts")

    @property
    def record(self) -> str:
        return Path(self.file).with_suffix(".json").name


def planes_of(manifest: Manifest) -> dict[str, np.dtype]:
    """The columns with a number per slot, which are stored as byte planes."""
    return {"gaps": np.dtype("<i4"), "values": np.dtype(DTYPES[manifest.values]).newbyteorder("<")}


def schema(manifest: Manifest) -> pa.Schema:
    lists = ["input_ids", "kept", *PER_TOKEN.get(manifest.values, ())]
    return pa.schema(
        {"index": pa.int64()}
        | dict.fromkeys(planes_of(manifest), pa.binary())
        | {name: pa.list_(LISTS[name]) for name in lists}
    )


def open_writer(path: Path, manifest: Manifest) -> pq.ParquetWriter:
    # Small numbers in wide types then cost what their low byte costs.
    encoding = {
        f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in schema(manifest).names if name in LISTS
    }
    return pq.ParquetWriter(
        path,
        schema(manifest),
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        column_encoding=encoding,
        write_page_checksum=True,
        data_page_version="2.0",
    )


def to_table(rows: list[tuple[int, Columns]], manifest: Manifest) -> pa.Table:
    kinds, planes = schema(manifest), planes_of(manifest)
    arrays = [pa.array([index for index, _ in rows], pa.int64())]
    for name in kinds.names[1:]:
        parts = [columns[name] for _, columns in rows]
        if name in planes:
            arrays.append(pa.array([to_planes(part.astype(planes[name])) for part in parts], pa.binary()))
            continue
        offsets = np.cumsum([0] + [len(part) for part in parts])
        values = pa.array(np.concatenate(parts), LISTS[name])
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values))
    return pa.table(arrays, schema=kinds)


def from_table(table: pa.Table, row: int, manifest: Manifest) -> Columns:
    """The columns of one row, without copies where Arrow allows."""
    planes, columns = planes_of(manifest), {}
    for name in table.column_names[1:]:
        cell = table.column(name).chunk(0)[row]
        columns[name] = (
            from_planes(cell.as_buffer(), planes[name])
            if name in planes
            else cell.values.to_numpy(zero_copy_only=False)
        )
    return columns


def to_planes(numbers: NDArray) -> bytes:
    """All lowest bytes, then all second bytes, ...: what Parquet calls BYTE_STREAM_SPLIT.

    Done here and stored as one binary value, because Parquet's readers take longer over list levels than over
    everything else.
    """
    return numbers.view(np.uint8).reshape(-1, numbers.itemsize).T.tobytes()


def from_planes(planes: pa.Buffer, dtype: np.dtype) -> NDArray:
    each = np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(each.T).view(dtype).ravel()


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
