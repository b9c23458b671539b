"""Evaluation counts every row of its set once, however many processes share them, so that its means are exact.

Left alone accelerate repeats samples, so that all processes make as many calls of as many rows, and
``dataloader_drop_last`` leaves some out.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch.utils.data import BatchSampler


@contextlib.contextmanager
def every_row(args: Any) -> Iterator[None]:
    """dataloader_drop_last is of training batches; an evaluation is of its whole set."""
    given, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = given


def repeat_whole_batches(dataloader: Any) -> None:
    """Makes accelerate repeat whole batches, where there are not as many for each process, and no single samples.

    It fills up the last batches with samples that came before, so that processes make as many calls of as many rows.
    Which rows of a batch those are, only the collator knows: a padding-free one makes one row of all samples, and
    another may make two of each. But of a repeated batch no row counts. ValueError where accelerate cannot do this.
    """
    dataset, shard = getattr(dataloader, "dataset", None), _shard_of(dataloader)
    if isinstance(dataset, IterableDatasetShard) and not dataset.drop_last:
        raise ValueError(
            f"dispatch_batches=False shares out an eval_dataset without a length among {dataset.num_processes} processes "
            "by repeating samples, which would count twice; give one with a length, or leave dispatch_batches out"
        )
    if shard is None:
        return
    if shard.split_batches:  # each batch is cut in pieces, the last one among samples
        size = shard.batch_size // shard.num_processes
        shard.batch_sampler = BatchSampler(shard.batch_sampler.sampler, size, shard.drop_last)
        shard.split_batches = False
    shard.batch_size, shard.even_batches = None, True  # of no certain size: taken as they are


def rows_that_count(dataloader: Any, rows: int, process: int) -> int:
    """Of this batch's ``rows``; those after them are there for other processes to have as many."""
    if not getattr(dataloader, "end_of_dataloader", False):
        return rows
    if (shard := _shard_of(dataloader)) is not None:
        left = 0 if shard.drop_last else len(shard.batch_sampler) % shard.num_processes
        return rows if not left or shard.process_index < left else 0
    if isinstance(dataloader, DataLoaderDispatcher):  # it shares out the rows that the collator made
        return min(rows, max(0, dataloader.remainder - process * rows))
    return rows


def _shard_of(dataloader: Any) -> BatchSamplerShard | None:
    """What gives this process its batches of a data set with a length, where accelerate shares that out."""
    found = (getattr(dataloader, name, None) for name in ("batch_sampler", "sampler"))
    return next((each for each in found if isinstance(each, BatchSamplerShard)), None)
