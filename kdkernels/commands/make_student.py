"""``python -m kdkernels make-student``: a student from a model, by leaving out the layers that do least."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..trainer import data, models, prune
from ..trainer.command_line import parse_parts
from ..trainer.errors import UserError
from ..trainer.files import save_whole
from ..trainer.settings import SCRATCH, DataSettings, ModelSettings, option


@dataclass
class StudentSettings:
    model: str = field(metadata={"help": "a transformers causal LM: folder, name, .gguf file, or smollm2"})
    out: str = field(metadata={"help": "folder to write the student to; one that is there is left as it is"})
    drop: int = option(0, "how many layers are left out; with 0 the whole model is written, as a folder")
    sequences: int = option(8, "training sequences on which the layers' influence is measured")


def main(arguments: list[str]) -> None:
    logging.disable_progress_bar()
    try:
        settings, data_settings = parse_parts(
            {"student": StudentSettings, "data, as train reads it": DataSettings},
            arguments,
            prog="python -m kdkernels make-student",
            usage="%(prog)s --model MODEL --drop N --out DIR [--data ...]",
            description="Drops the layers that turn the hidden states of --data least (arXiv:2403.03853).",
        )
        run(settings, data_settings)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def run(settings: StudentSettings, data_settings: DataSettings) -> None:
    out = Path(settings.out)
    if out.exists():
        print(f"{out} is there already")
        return
    if settings.model in SCRATCH:
        raise UserError(
            f"--model {settings.model} is made from scratch and knows nothing; give a trained model"
        )
    named = ModelSettings(student=settings.model)
    models.check_models(named, data_settings.max_length)
    tokenizer = models.load_tokenizer(named, (), out)
    model = models.load_model(
        settings.model, tokenizer, dtype="float32", seed=0, max_length=data_settings.max_length
    ).eval()
    if settings.drop:
        drop(model, tokenizer, settings, data_settings)
    print(f"{out}: {models.parameters(model):,} parameters")
    save_whole(out, tokenizer, model)


def drop(model: Any, tokenizer: Any, settings: StudentSettings, data_settings: DataSettings) -> None:
    layers = len(prune.layers_of(model))
    if not 0 < settings.drop < layers:
        raise UserError(f"--drop {settings.drop}: the model has {layers} layers, and one must stay")
    records, _ = data.split(data.read(data_settings), data_settings)
    text = data.sequences(records, tokenizer, data_settings.max_length)
    rows = data.limited(data.check_trainable(text, ", ".join(data_settings.data)), settings.sequences).rows
    influence = prune.influence(model, [ids for ids, _ in rows])
    dropped = prune.least(influence, settings.drop)
    print(
        f"of {layers} layers without {', '.join(map(str, dropped))}, which do least on {len(rows)} sequences"
    )
    prune.without_layers(model, dropped)
