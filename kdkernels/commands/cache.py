"""``python -m kdkernels cache``: run the teacher over data once and store what it says in few bytes."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Callable, Iterator, cast

import torch

import kdkernels as kd

from ..integrations.transformers import call_through_head, check_head, model_inputs, shifted_labels
from ..targets import Tail
from ..teacher_cache import CacheWriter, Manifest, TeacherCache, tokenizer_hash
from ..trainer import data, models
from ..trainer.command_line import parse_parts
from ..trainer.errors import UserError
from ..trainer.progress import bar
from ..trainer.refused import check_dtype
from ..trainer.settings import SCRATCH, DataSettings, ModelSettings, option
from . import say_at_exit


@dataclass
class CacheSettings:
    teacher: str = field(metadata={"help": "a transformers causal LM, folder or name"})
    out: str = field(metadata={"help": "directory of the cache: new, or one to go on with"})
    top_k: int = option(0, "store the k most likely tokens [give this, --top_p or --samples]")
    top_p: float = option(0.0, "store the most likely tokens that together have this mass")
    max_k: int = option(0, "with --top_p: at most this many tokens; 0 is no limit")
    samples: int = option(0, "store what so many draws from the teacher give, an unbiased gradient")
    proposal_temperature: float = option(1.0, "of --samples; other than 1 they get importance weights")
    tail: str | None = option(
        None, "bucket, conditional, renormalize or truncate; default bucket, truncate for samples"
    )
    values: str | None = option(None, "float32, bfloat16, uint8 or count; default uint8, count for samples")
    tokenizer: str | None = option(None, "folder or name; default: the teacher's")
    dtype: str = option("float32", "of the teacher: float32 or bfloat16")
    batch_size: int = option(8, "sequences that the teacher reads at a time")
    shard_tokens: int = option(2**18, "tokens per shard; a killed process loses at most this many")
    seed: int = option(42, "of the samples")


def main(arguments: list[str]) -> None:
    try:
        settings, data_settings = parse_parts(
            {"cache": CacheSettings, "data, as train reads it": DataSettings},
            arguments,
            prog="python -m kdkernels cache",
            usage="%(prog)s --teacher MODEL --data ... --top_k 64 | --top_p P | --samples N --out DIR",
            description="Targets for `train soft --targets DIR`. torchrun shares the work; a killed run goes on.",
        )
        run(settings, data_settings)
    except (UserError, OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        say_at_exit("interrupted; the same command goes on with it")
        raise


def run(settings: CacheSettings, data_settings: DataSettings) -> None:
    """Caches the training sequences in ``out`` and the validation sequences in ``out/validation``."""
    method = check(settings)
    data.check_apart(data_settings.data, settings.out, "--out")
    named = ModelSettings(student=settings.teacher, tokenizer=settings.tokenizer)
    models.check_models(named, data_settings.max_length)
    tokenizer = models.load_tokenizer(named, (), Path(settings.out))
    training, validation = data.split(data.read(data_settings), data_settings)
    teacher, weights, complete = None, models.fingerprint(settings.teacher), True
    for records, folder in ((training, ""), (validation, "validation")):
        sequences = data.sequences(records, tokenizer, data_settings.max_length)
        if not folder:
            data.check_trainable(sequences, ", ".join(data_settings.data))
        elif not len(sequences := data.limited(sequences, data_settings.validation_sequences)):
            continue
        directory = Path(settings.out, folder)
        manifest = manifest_of(settings, method, tokenizer, sequences, weights)
        with CacheWriter(directory, manifest, shard_tokens=settings.shard_tokens, **ranks()) as writer:
            if teacher is None and writer.todo():
                teacher = load_teacher(settings, tokenizer, data_settings.max_length)
            write(writer, teacher, sequences, settings, tokenizer)
            writer.commit()
            done = sum(len(shard.rows) for shard in writer.committed())
        if done == len(sequences):
            report(directory)
        else:
            complete = False
            print(f"{directory}: this process is done; the cache is complete when the others are")
    if complete:
        print(f"train on it:\n  {train_command(settings, data_settings)}")


def check(settings: CacheSettings) -> str:
    """The method that was asked for. UserError if the settings contradict each other."""
    if settings.teacher in SCRATCH:
        raise UserError(
            f"--teacher {settings.teacher} is made from scratch and knows nothing; give a trained model"
        )
    methods = [name for name in ("top_k", "top_p", "samples") if getattr(settings, name)]
    if len(methods) != 1:
        raise UserError(f"give one of --top_k, --top_p and --samples, not {' and '.join(methods) or 'none'}")
    for name, method in (("max_k", "top_p"), ("proposal_temperature", "samples"), ("seed", "samples")):
        value = getattr(settings, name)
        if value != getattr(CacheSettings, name) and method != methods[0]:
            raise UserError(f"{name}={value} is of --{method}, not of --{methods[0]}; leave it out")
    check_dtype(settings.dtype)
    return methods[0]


def manifest_of(
    settings: CacheSettings, method: str, tokenizer: Any, sequences: data.Sequences, weights: str | None
) -> Manifest:
    sampled, plain = method == "samples", settings.proposal_temperature == 1
    vocab = models.vocabulary(tokenizer)
    k = {"top_k": settings.top_k, "top_p": settings.max_k or vocab, "samples": settings.samples}[method]
    return Manifest(
        model=settings.teacher,
        tokenizer=tokenizer_hash(tokenizer),
        vocab_size=vocab,
        data=sequences.fingerprint(),
        sequences=len(sequences),
        method=method,
        k=k if sampled else min(k, vocab),
        kind="weights" if sampled else "logprobs",
        top_p=settings.top_p or None,
        proposal_temperature=settings.proposal_temperature,
        tail=cast(Tail, settings.tail or ("truncate" if sampled else "bucket")),  # Manifest checks it
        values=settings.values or ("count" if sampled and plain else "uint8"),
        weights=weights,
        dtype=settings.dtype,
        seed=settings.seed if sampled else None,
    )


def ranks() -> dict[str, int]:
    return {"rank": int(os.environ.get("RANK", 0)), "world_size": int(os.environ.get("WORLD_SIZE", 1))}


def load_teacher(settings: CacheSettings, tokenizer: Any, max_length: int) -> Any:
    teacher = models.load_model(
        settings.teacher, tokenizer, dtype=settings.dtype, seed=settings.seed, max_length=max_length
    )
    if (device := torch.accelerator.current_accelerator()) is not None and torch.accelerator.is_available():
        teacher.to(torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0))))
    teacher.requires_grad_(False).eval()
    check_head(teacher)
    return teacher


def write(
    writer: CacheWriter, teacher: Any, sequences: data.Sequences, settings: CacheSettings, tokenizer: Any
) -> None:
    todo, collate = writer.todo(), data.Collator(tokenizer.pad_token_id)
    mine = range(writer.rank, len(sequences), writer.world_size)
    lengths = {index: len(sequences.rows[index][0]) for index in mine}
    done = sum(lengths.values()) - sum(lengths[index] for index in todo)
    total = sum(lengths.values())
    with bar(total=total, initial=done, unit=" tok", unit_scale=True, desc=writer.directory.name) as progress:
        for batch in _batches(todo, settings.batch_size):
            inputs = {
                n: t.to(teacher.device) for n, t in collate([sequences[index] for index in batch]).items()
            }
            said = targets(
                teacher, inputs, select(settings, batch, writer.manifest.vocab_size, writer.manifest.tail)
            )
            for index, target in zip(batch, said):
                writer.write(index, sequences.rows[index][0], target[: lengths[index]])
                progress.update(lengths[index])
            if writer.bytes_per_token is not None:
                progress.set_postfix_str(f"{writer.bytes_per_token:.0f} bytes/token", refresh=False)


def targets(
    teacher: Any, inputs: dict[str, Any], choose: Callable[[kd.LinearHead, int], kd.SparseTarget]
) -> Iterator[kd.SparseTarget]:
    """A target [T, K] for each sequence of a batch; tokens without a label have no slots."""
    with torch.inference_mode():
        head = call_through_head(teacher, model_inputs(inputs), lambda head: head)
        for row, labels in enumerate(shifted_labels(inputs)):
            target = choose(replace(head, hidden=head.hidden[row]), row)
            yield replace(target, ids=target.ids.masked_fill((labels < 0)[:, None], -1))


def select(
    settings: CacheSettings, batch: list[int], vocab: int, tail: Tail
) -> Callable[[kd.LinearHead, int], kd.SparseTarget]:
    """How a row of a batch of sequences becomes a target."""

    def choose(head: kd.LinearHead, row: int) -> kd.SparseTarget:
        if settings.top_k:
            return kd.top_k_target(head, min(settings.top_k, vocab), tail=tail, vocab_size=vocab)
        if settings.top_p:
            return kd.top_p_target(
                head, settings.top_p, max_k=settings.max_k or None, tail=tail, vocab_size=vocab
            )
        # The seed is the sequence's own, so its draws do not depend on the process or on earlier sequences.
        own = torch.Generator(head.hidden.device).manual_seed(settings.seed + 1 + batch[row])
        drawn = kd.sample_target(
            head, settings.samples, settings.proposal_temperature, generator=own, vocab_size=vocab
        )
        return replace(drawn, tail=tail)

    return choose


def report(directory: Path) -> None:
    """What is stored, and in how many bytes."""
    cache = TeacherCache(directory)
    stored = sum(shard.kept for shard in cache.shards)
    print(
        f"{directory}: {len(cache)} sequences, {cache.tokens} tokens, {stored / cache.tokens:.1f} ids stored per token"
    )
    lines = [
        (
            f"measured, {cache.manifest.values} ({cache.bytes / max(stored, 1):.2f} per stored id)",
            cache.bytes / cache.tokens,
        ),
        ("raw, int32 and float32", 8 * stored / cache.tokens),
    ]
    for name, per_token in lines:
        print(f"  {name:<48} {per_token:8.1f} bytes per token")


def train_command(settings: CacheSettings, data_settings: DataSettings) -> str:
    """The command that trains on the cache. Tokenizer and data must be the same, or the sequences would differ."""
    line = shlex.split("python -m kdkernels train soft --student STUDENT --tokenizer")
    line.append(settings.tokenizer or settings.teacher)
    for each in fields(data_settings):
        value, default = getattr(data_settings, each.name), getattr(DataSettings(), each.name)
        if value != default or each.name == "data":
            line += [f"--{each.name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*line, "--targets", settings.out, "--output_dir", "RUN"])


def _batches(indices: list[int], size: int) -> Iterator[list[int]]:
    for begin in range(0, len(indices), size):
        yield indices[begin : begin + size]
