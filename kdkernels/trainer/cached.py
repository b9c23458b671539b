"""``train soft --targets DIR``: the teacher's targets come with the batch, and no teacher is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..targets import SparseTarget
from ..teacher_cache import TeacherCache, tokenizer_hash
from . import data, models
from .errors import UserError


class CachedSequences(Dataset):
    """:class:`data.Sequences`, each with its ``target`` from the teacher cache of these sequences."""

    def __init__(self, sequences: data.Sequences, directory: Path, tokenizer: Any) -> None:
        self.rows = sequences.rows
        self.sequences = sequences
        try:
            self.cache = TeacherCache(
                directory,
                require={
                    "tokenizer": tokenizer_hash(tokenizer),
                    "vocab_size": models.vocabulary(tokenizer),
                    "sequences": len(sequences),
                    "data": sequences.fingerprint(),
                    "temperature": 1.0,
                    "shift": 1,
                },
            )
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {**self.sequences[index], "target": self.cache[index].target}
        except ValueError as error:
            raise UserError(str(error)) from error


class TargetCollator(data.Collator):
    """Adds ``target_ids`` and ``target_logprobs`` or ``target_weights`` [B, L, K]."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        target = SparseTarget.collate([row["target"] for row in rows])
        kind = "target_weights" if target.logprobs is None else "target_logprobs"
        return {**batch, "target_ids": target.ids, kind: target.values}


def with_targets(directory: str, options: dict[str, Any]) -> dict[str, Any]:
    """The trainer's options with both data sets from a cache, as ``python -m kdkernels cache`` lays it out."""
    tokenizer = options["processing_class"]
    training = CachedSequences(options["train_dataset"], Path(directory), tokenizer)
    validation: Any = options["eval_dataset"]
    if len(validation):
        if not Path(directory, "validation").exists():
            raise UserError(
                f"{directory} has no targets for the validation text; --validation_share 0 trains without it"
            )
        validation = CachedSequences(validation, Path(directory, "validation"), tokenizer)
    return {
        **options,
        "train_dataset": training,
        "eval_dataset": validation,
        "tail": training.cache.manifest.tail,
        "data_collator": TargetCollator(tokenizer.pad_token_id),
    }
