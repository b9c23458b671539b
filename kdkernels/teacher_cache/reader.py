"""Read a teacher cache: any sequence by its index, or all of them ahead of the trainer."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..checks import positive_integer
from ..targets import SparseTarget
from . import codec, shards
from .manifest import Manifest

#: Open shards (their footers, about 1 MB each) and decompressed row groups that stay open.
OPEN_SHARDS, OPEN_ROW_GROUPS = 64, 4


@dataclass(frozen=True, eq=False)
class Record:
    """One sequence: ``input_ids`` int64 [T], ``target`` [T, K] with K the most slots of its tokens."""

    index: int
    input_ids: Tensor
    target: SparseTarget


class TeacherCache(torch.utils.data.Dataset):
    """The targets in a directory: ``cache[i]`` is sequence i's :class:`Record`.

    A shard's sha256 is checked when the process first touches it, its pages' checksums at every read,
    so damage is an error, never a wrong target. Memory does not grow with the cache.

    Args:
        directory: what :class:`~kdkernels.teacher_cache.CacheWriter` wrote.
        require: manifest fields that must have these values, e.g. ``{"vocab_size": 8192}``.

    Raises:
        FileNotFoundError: no cache there.
        ValueError: it is incomplete or damaged, or was made with something else; names what and where.
    """

    def __init__(self, directory: Path | str, *, require: dict[str, Any] | None = None) -> None:
        self.directory = Path(directory)
        self.manifest = Manifest.read(self.directory)
        self.manifest.require(self.directory, **(require or {}))
        self.shards = shards.committed(self.directory, self.manifest)
        self._where = self._index()
        self._verified: set[str] = set()
        self._lock = threading.Lock()
        self._files: OrderedDict[int, tuple[pq.ParquetFile, np.ndarray]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.sequences

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} is not one of {len(self)} in {self.directory}")
        number, row = (int(n) for n in self._where[index])
        with self._lock:
            table, row = self._row_group(number, row)
        if table.column("index")[row].as_py() != index:
            raise self._damaged(number, f"row {row} is not sequence {index}")
        columns = shards.from_table(table, row, manifest := self.manifest)
        counts, ids, values = codec.decode(
            columns, kind=manifest.kind, dtype=manifest.values, draws=manifest.k
        )
        target = codec.pad(
            counts, ids, values, kind=manifest.kind, tail=manifest.tail, slots=int(counts.max(initial=0))
        )
        return Record(index, torch.from_numpy(columns["input_ids"].astype(np.int64)), target)

    def stream(self, order: Iterable[int] | None = None, *, prefetch: int = 16) -> Iterator[Record]:
        """Records in ``order`` (0, 1, 2, ... if None), read up to ``prefetch`` ahead by a thread."""
        prefetch = positive_integer("prefetch", prefetch)
        return self._read_ahead(range(len(self)) if order is None else order, prefetch)

    def _read_ahead(self, order: Iterable[int], prefetch: int) -> Iterator[Record]:
        ahead: queue.Queue[Any] = queue.Queue(maxsize=prefetch)
        stop = threading.Event()

        def put(item: Any) -> bool:
            while not stop.is_set():
                try:
                    ahead.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def read() -> None:
            try:
                for index in order:
                    if not put(self[index]):
                        return
                put(None)
            except BaseException as error:  # raised again where the records are consumed
                put(error)

        thread = threading.Thread(target=read, name="teacher-cache", daemon=True)
        thread.start()
        try:
            while (item := ahead.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files: a worker process opens its own."""
        state = self.__dict__ | {"_files": OrderedDict(), "_groups": OrderedDict()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of the shards on disk, without the manifest and the records."""
        return sum(shard.bytes for shard in self.shards)

    def _index(self) -> np.ndarray:
        """[sequences, 2]: shard number and row of each sequence."""
        where = np.full((self.manifest.sequences, 2), -1, np.int64)
        for number, shard in enumerate(self.shards):
            for row, index in enumerate(shard.rows):
                if not 0 <= index < len(where):
                    raise self._damaged(number, f"sequence {index} is not one of {len(where)}")
                if where[index, 0] >= 0:
                    first = self.shards[where[index, 0]].file
                    raise self._damaged(number, f"sequence {index} is also in {first}")
                where[index] = number, row
        missing = np.flatnonzero(where[:, 0] < 0)
        if len(missing):
            raise ValueError(
                f"{self.directory} has {len(where) - len(missing)} of {len(where)} sequences; sequence {missing[0]} is "
                "the first that it lacks; run the command that writes it again to complete it"
            )
        return where

    def _row_group(self, number: int, row: int) -> tuple[pa.Table, int]:
        file, starts = self._file(number)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        key = (number, group)
        if key not in self._groups:
            try:
                self._groups[key] = file.read_row_group(group, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(number, str(error)) from None
            _trim(self._groups, OPEN_ROW_GROUPS)
        self._groups.move_to_end(key)
        return self._groups[key], row - int(starts[group])

    def _file(self, number: int) -> tuple[pq.ParquetFile, np.ndarray]:
        if number not in self._files:
            path = self._verify(number)
            try:
                file = pq.ParquetFile(path, page_checksum_verification=True, memory_map=False)
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(number, str(error)) from None
            rows = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            self._files[number] = file, np.cumsum([0] + rows[:-1])
            _trim(self._files, OPEN_SHARDS)
        self._files.move_to_end(number)
        return self._files[number]

    def _verify(self, number: int) -> Path:
        shard = self.shards[number]
        path = self.directory / shard.file
        if shard.file not in self._verified:
            if not path.is_file():
                raise ValueError(f"{path} is missing; delete {shard.record} and resume writing")
            if (found := shards.sha256(path)) != shard.sha256:
                raise self._damaged(
                    number, f"its sha256 is {found[:12]}, its record says {shard.sha256[:12]}"
                )
            self._verified.add(shard.file)
        return path

    def _damaged(self, number: int, why: str) -> ValueError:
        shard = self.shards[number]
        return ValueError(
            f"{self.directory / shard.file} is damaged: {why}; delete it and {shard.record}, then resume writing"
        )


def _trim(cached: OrderedDict, most: int) -> None:
    while len(cached) > most:
        cached.popitem(last=False)
