"""Write sparse targets to a directory. Several processes may write at once, and a killed one goes on later."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Iterator, Sequence

import filelock
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..checks import integer
from ..targets import SparseTarget
from . import codec, shards
from .manifest import NAME, Manifest
from .shards import Shard

#: A row group is what is read at once: one sequence, or several short ones. Together these compress better than alone, and
#: with fewer groups a shard is opened faster. In larger groups a shuffled reader unpacks more than it keeps, which costs more.
ROW_GROUP_TOKENS = 512


class CacheWriter:
    """Writes targets of sequences 0 .. manifest.sequences - 1, one row each, into shards.

    Several processes may write at once, each with its own ``rank``; the sequence i belongs to rank
    i mod world_size. What was committed before stays: :meth:`todo` is what is left to do, whoever did
    the rest. Use as a context manager: leaving it commits what was written, also after an error.

    Args:
        directory: new, empty, or a cache with the same manifest.
        manifest: what is written; see :class:`Manifest`.
        rank: of this process among those that write.
        world_size: how many write.
        shard_tokens: a shard is committed when it has that many; a killed process loses at most so much.

    Raises:
        FileExistsError: the directory has something else in it, or a cache with another manifest.
        RuntimeError: another live process writes as the same rank.
    """

    _file: pq.ParquetWriter | None
    _rows: list[int]
    _tokens: int
    _stored_ids: int

    def __init__(
        self,
        directory: Path | str,
        manifest: Manifest,
        *,
        rank: int = 0,
        world_size: int = 1,
        shard_tokens: int = 2**18,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")
        self.directory, self.shard_tokens = Path(directory), shard_tokens
        self.rank, self.world_size = rank, world_size
        self.manifest = _claim(self.directory, manifest)
        self._lock = filelock.FileLock(self.directory / f"writer-{rank:04d}.lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RuntimeError(f"another process is writing to {directory} as rank {rank}") from None
        self._closed = False
        self._last: Shard | None = None
        self._pending: list[tuple[int, codec.Columns]] = []
        self._pending_tokens = 0
        self._start_shard(self._clean_up())
        self.done = {index for shard in self.committed() for index in shard.rows}

    def committed(self) -> list[Shard]:
        """Every shard that any rank has committed."""
        return shards.committed(self.directory, self.manifest)

    def todo(self) -> list[int]:
        """This rank's sequences that no committed shard has."""
        mine = range(self.rank, self.manifest.sequences, self.world_size)
        return [index for index in mine if index not in self.done]

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes per token of this writer's last shard, or of the first while it is being written; None where that has no
        tokens."""
        if self._last is not None:
            return self._last.bytes / self._last.tokens if self._last.tokens else None
        return self._temporary.stat().st_size / self._tokens if self._tokens else None

    def write(self, index: int, input_ids: Sequence[int], target: SparseTarget) -> None:
        """Add one sequence: ``input_ids`` [T] and its target [T, K] (row t is about token t + shift).

        TypeError or ValueError where that cannot be stored as it is, RuntimeError after :meth:`close`.
        """
        if self._closed:
            raise RuntimeError(
                f"this writer of {self.directory} is closed; open another, which goes on where it was"
            )
        index = self._own(index)
        ids = _token_ids(index, input_ids)
        if tuple(target.leading_shape) != (len(ids),):
            raise ValueError(
                f"sequence {index} has {len(ids)} tokens but a target {tuple(target.leading_shape)}"
            )
        self._pending.append((index, {"input_ids": ids} | self._columns(index, target)))
        self._pending_tokens += len(ids)
        self.done.add(index)
        if self._tokens + self._pending_tokens >= self.shard_tokens:
            self.commit()
        elif self._pending_tokens >= ROW_GROUP_TOKENS:
            self._write_row_group()

    def _own(self, index: int) -> int:
        """``index`` as an int, which the records can hold; a sequence that this writer has yet to write."""
        index = int(integer("index", index))
        if not 0 <= index < self.manifest.sequences:
            raise ValueError(f"sequence {index} is not one of {self.manifest.sequences}")
        if index % self.world_size != self.rank:
            raise ValueError(f"sequence {index} is not for rank {self.rank} of {self.world_size}")
        if index in self.done:
            raise ValueError(f"sequence {index} is already written")
        return index

    def _columns(self, index: int, target: SparseTarget) -> codec.Columns:
        manifest = self.manifest
        for name, given in (
            ("tail", target.tail),
            ("kind", "weights" if target.logprobs is None else "logprobs"),
        ):
            if given != getattr(manifest, name):
                raise ValueError(
                    f"sequence {index} has {name} {given!r}, the manifest {getattr(manifest, name)!r}"
                )
        counts, ids, values = codec.flatten(target)
        if counts.max(initial=0) > manifest.k:
            raise ValueError(
                f"sequence {index} has {counts.max()} slots in a token, the manifest k={manifest.k}"
            )
        options = {"kind": manifest.kind, "dtype": manifest.values}
        try:
            return codec.encode(
                counts, ids, values, vocab_size=manifest.vocab_size, draws=manifest.k, **options
            )
        except ValueError as error:
            raise ValueError(f"sequence {index}: {error}") from None

    def commit(self) -> None:
        """Make what was written so far permanent."""
        self._write_row_group()
        if self._file is None:
            return
        with self._whole_or_nothing(self._rows):
            self._file.close()
            shard = Shard(
                self._path.name,
                shards.sha256(self._temporary),
                self._temporary.stat().st_size,
                self._tokens,
                self._stored_ids,
                self._rows,
                self.manifest.digest(),
            )
            shards.publish(self._temporary, self._path)
            shards.commit(self.directory, shard)
        self._last = shard
        self._start_shard(self._number + 1)

    def close(self) -> None:
        try:
            self.commit()
        finally:
            self._closed = True
            self._lock.release()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(self._path.name + ".tmp")

    def _start_shard(self, number: int) -> None:
        self._number = number
        self._path = self.directory / f"shard-{self.rank:04d}-{number:06d}.parquet"
        self._file = None
        self._rows, self._tokens, self._stored_ids = [], 0, 0

    def _write_row_group(self) -> None:
        if not self._pending:
            return
        pending, tokens = self._pending, self._pending_tokens
        self._pending, self._pending_tokens = [], 0
        with self._whole_or_nothing([*self._rows, *(index for index, _ in pending)]):
            if self._file is None:
                self._file = shards.open_writer(self._temporary, self.manifest)
            self._file.write_table(shards.to_table(pending, self.manifest))
        self._rows += [index for index, _ in pending]
        self._tokens += tokens
        self._stored_ids += sum(len(columns["gaps"]) for _, columns in pending)

    @contextlib.contextmanager
    def _whole_or_nothing(self, rows: list[int]) -> Iterator[None]:
        """After an error the open shard is deleted, since it may be cut off; its sequences must be written again."""
        try:
            yield
        except BaseException:
            self.done -= set(rows)
            self._start_shard(self._number)
            raise

    def _clean_up(self) -> int:
        """Removes the unfinished files of a killed process of this rank; returns the number of the next shard."""
        mine = f"shard-{self.rank:04d}-"
        records = {path.stem for path in self.directory.glob(f"{mine}*.json")}
        for path in self.directory.glob(f"{mine}*"):
            if path.suffix == ".tmp" or path.stem not in records:
                path.unlink()
        return max((int(name.removeprefix(mine)) for name in records), default=-1) + 1


def _claim(directory: Path, manifest: Manifest) -> Manifest:
    """Make the directory a cache with this manifest, and return what it has. FileExistsError if that is another."""
    directory.mkdir(parents=True, exist_ok=True)
    # Before the lock, which would be left in a directory that is somebody else's. A cache has its manifest before any
    # other file: looked for last, it is there if another process has just made one.
    others = sorted(p.name for p in directory.iterdir() if p.suffix != ".lock" and p.name != NAME + ".tmp")
    if others and not (directory / NAME).exists():
        raise FileExistsError(
            f"{directory} is not empty and no teacher cache (it has {others[0]}); choose another directory"
        )
    with filelock.FileLock(directory / "manifest.lock"):
        if not (directory / NAME).exists():
            shards.write_text(directory / NAME, manifest.to_json())
        found = Manifest.read(directory)
    for name, value in dataclasses.asdict(manifest).items():
        had = getattr(found, name)
        if had != value:
            raise FileExistsError(
                f"{directory} has a cache with {name} {had!r}, not {value!r}; choose another directory"
            )
    return found


def _token_ids(index: int, input_ids: Sequence[int]) -> NDArray:
    """``input_ids`` as they are stored. Those that int32 would change are refused."""
    try:
        ids = np.asarray(input_ids)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"sequence {index} has input_ids that are no array: {error}") from None
    if ids.ndim != 1:
        raise ValueError(
            f"sequence {index} has input_ids {list(ids.shape)}, not [T]; write sequences one by one"
        )
    if not len(ids):
        return ids.astype(np.int32)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"sequence {index} has input_ids of {ids.dtype}, not of an integer type")
    limits = np.iinfo(np.int32)
    bad = np.flatnonzero((ids < limits.min) | (ids > limits.max))
    if len(bad):
        raise ValueError(f"sequence {index} has id {ids[bad[0]]} at {bad[0]}, which does not fit in 32 bits")
    return ids.astype(np.int32)
