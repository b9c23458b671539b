"""What a run says before it trains and when it is done."""

from __future__ import annotations

from typing import Any

import torch

import kdkernels as kd

from . import data, models
from .progress import say
from .settings import Settings


def of_data(
    settings: Settings, records: list[data.Record], train: data.Sequences, validation: data.Sequences
) -> None:
    evaluated = f"; {size(validation)}, to evaluate on" if len(validation) else ""
    say(f"{settings.mode}: {len(records):,} documents in {size(train)}, to train on{evaluated}")
    if settings.mode == "hard" and settings.model.teacher is None:
        learnt = "text itself" if data.kind_of(records[0]) == "text" else "completions in --data"
        say(f"no teacher: the student learns the {learnt}, by cross entropy")


def of_models(settings: Settings, student: Any, teacher: Any, checkpoint: str | None) -> None:
    """Models, backend, steps, and whether the run begins or goes on."""
    args, whole, trained = settings.run, models.parameters(student), models.parameters(student, trained=True)
    part = f", {trained:,} of them trained" if trained < whole else ""
    say(f"student {settings.model.student}: {whole:,} parameters{part}")
    if teacher is not None:
        say(f"teacher {settings.model.teacher}: {models.parameters(teacher):,} parameters")
    elif settings.model.targets is not None:
        say(f"teacher: what it said is in {settings.model.targets}")
    share = " that share the models" if settings.model.tensor_parallel > 1 else ""
    processes = f", {args.world_size} processes{share}" if args.world_size > 1 else ""
    say(f"backend {backend(settings)} on {args.device.type}{processes}")
    batch = args.train_batch_size * args.gradient_accumulation_steps * settings.replicas
    budget = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    where = f"going on from {checkpoint}" if checkpoint else f"in {settings.output_dir}"
    say(f"{budget} of {batch:,} sequences, {where}")


def of_result(settings: Settings, result: dict[str, Any]) -> None:
    """Steps, time, evaluation, and where the model is."""
    say(f"done: step {result['steps']:,}, {result['tokens']:,} tokens; it took {result['seconds']:.0f} s")
    measured = [
        f"{name.removeprefix('eval_')} {value:.4g}"
        for name, value in result.items()
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second"))
    ]
    if measured:
        say(f"evaluation: {', '.join(measured)}")
    saved = "the adapter is" if settings.model.lora_rank else "the model is"
    say(f"{'both models are' if settings.mode == 'co' else saved} in {settings.output_dir / 'model'}")


def backend(settings: Settings) -> str:
    """The backend that serves the loss of such a run."""
    logits = torch.zeros(1, 2, dtype=getattr(torch, settings.model.dtype), device=settings.run.device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=logits.device)
    target = None if settings.model.targets is None else kd.SparseTarget(ids, logits[:, :1].float() - 1)
    name = kd.explain(logits, target).splitlines()[-1].split(":")[0]
    return f"{name} ({kd.instruction_set()})" if name == "native" and logits.device.type == "cpu" else name


def size(sequences: Any) -> str:
    return f"{len(sequences):,} sequences of {sum(len(ids) for ids, _ in sequences.rows):,} tokens"
