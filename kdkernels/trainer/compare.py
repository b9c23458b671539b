"""``train compare``: students of all ways and one without a teacher, alike in everything but the loss.

Each stage is an ordinary run in a folder and a process of its own (so that peak memory is its own). A stage
that is finished is reused, one that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import kdkernels as kd

from ..integrations.transformers import call_through_head, model_inputs, shifted_labels
from . import data, models, report, train
from .command_line import resolve
from .reliable import ReliableTrainer, read_metrics, write_whole
from .settings import SCRATCH, WAYS, Settings, UserError, for_mode
from .writing import continued

#: Beginnings of held-out sequences that every student continues.
JUDGED_PROMPTS = 64
COMPARISON = "comparison.json"


def compare(settings: Settings) -> None:
    if settings.run.world_size > 1:
        raise UserError("compare starts its stages itself; run it without torchrun")
    if settings.run.max_steps <= 0:
        raise UserError("compare needs --max_steps: the budget that every student gets")
    if not settings.data.validation_share > 0:
        raise UserError("compare needs text that no student has seen: --validation_share above 0")
    models.check_models(settings.model, settings.data.max_length)
    start = time.perf_counter()
    stages = plan(settings)
    reused = [run_stage(i, len(stages), name, stage) for i, (name, stage) in enumerate(stages.items(), 1)]
    folder = settings.output_dir
    if all(reused) and (folder / COMPARISON).exists():
        comparison = json.loads((folder / COMPARISON).read_text())
    else:
        comparison = measured(settings, stages)
        comparison["seconds"] = None if any(reused) else time.perf_counter() - start
        write_whole(folder / COMPARISON, json.dumps(comparison, indent=1))
    curves = {name: read_metrics(stage.output_dir / train.METRICS) for name, stage in stages.items()}
    lines = [json.dumps({"run": name, **line}) + "\n" for name, metrics in curves.items() for line in metrics]
    write_whole(folder / train.METRICS, "".join(lines))
    report.draw(folder / report.PICTURE, curves, comparison)
    write_whole(folder / "report.md", report.text(comparison))
    print(
        f"\n{report.table(comparison)}\n\n{report.verdict(comparison)}\n\n"
        f"Report, picture, metrics and models are in {folder}/"
    )


# -- the stages -------------------------------------------------------------------------------------


def plan(settings: Settings) -> dict[str, Settings]:
    """Stage -> its settings: a teacher, if it must be made first, and the students."""
    folder, shared = settings.output_dir, settings.to_dict()
    del shared["mode"]
    scratch = settings.model.teacher in SCRATCH
    shared["tokenizer"] = tokenizer(settings)
    teacher = str(folder / "teacher" / "model") if scratch else settings.model.teacher

    def stage(mode: str, name: str, **values: Any) -> Settings:
        resume = (folder / name / train.CONFIG).exists()
        own = {**shared, "output_dir": str(folder / name), "resume": resume, **values}
        return resolve(mode, for_mode(mode, own))

    stages = {}
    if scratch:
        stages["teacher"] = stage(
            "hard",
            "teacher",
            student=settings.model.teacher,
            teacher=None,
            completions=None,
            lora_rank=0,
            lora_modules=["all-linear"],
            seed=settings.run.seed + 1,
            max_steps=settings.run.teacher_steps or settings.run.max_steps,
            learning_rate=settings.loss.teacher_learning_rate,
        )
    own = settings.asked["divergence"]  # None: each way's default
    students = {
        "plain": lambda: stage("hard", "plain", teacher=None, completions=None),
        "soft": lambda: stage("soft", "soft", teacher=teacher),
        "hard": lambda: stage("hard", "hard", teacher=teacher),
        "co": lambda: stage("co", "co", hard_weight=1.0),
        "on_policy": lambda: stage("on_policy", "on_policy", teacher=teacher, divergence=own),
    }
    return stages | {way: students[way]() for way in WAYS if way in settings.compare.ways}


def tokenizer(settings: Settings) -> str:
    """The tokenizer of every stage: one that was given, or trained here."""
    if settings.model.tokenizer or settings.model.pretrained:
        return settings.model.tokenizer or settings.model.pretrained[0]
    folder = settings.output_dir / "tokenizer"
    if not folder.exists():
        print(f"training a tokenizer on {', '.join(settings.data.data)}", flush=True)
        records, _ = data.split(data.read(settings.data), settings.data)
        models.load_tokenizer(settings.model, data.texts_of(records), folder)
    return str(folder)


def run_stage(number: int, count: int, name: str, settings: Settings) -> bool:
    """Runs a stage in a process of its own; True if it was finished before."""
    heading = f"[{number}/{count}] {name}"
    if (settings.output_dir / train.RESULT).exists():
        train.check_same_settings(settings)
        print(f"{heading}: reusing {settings.output_dir}")
        return True
    print(
        f"{heading}: {'going on in' if settings.run.resume else 'writing'} {settings.output_dir}", flush=True
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([train.__name__])
    process = context.Process(target=_stage, args=(settings.mode, settings.asked))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(
            f"{name} did not finish (exit code {process.exitcode}); run the same command again to go on"
        )
    return False


def _stage(mode: str, asked: dict[str, Any]) -> None:
    from transformers.utils import logging

    parent: Any = multiprocessing.parent_process()
    threading.Thread(
        target=lambda: (parent.join(), os._exit(1)), daemon=True
    ).start()  # so that no stage outlives a killed command
    logging.disable_progress_bar()
    try:
        train.run(resolve(mode, asked))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


# -- what came of it --------------------------------------------------------------------------------


def measured(settings: Settings, stages: dict[str, Settings]) -> dict[str, Any]:
    """Every student against the same teacher on the same held-out text."""
    reference = stages["soft"]
    given = train.ingredients(reference)
    teacher = given.teacher()
    rows = {}
    for name in settings.compare.ways:
        result = json.loads((stages[name].output_dir / train.RESULT).read_text())
        metrics = evaluated(given, teacher, model_folder(stages[name]))
        speed = [
            line["tokens_per_second"]
            for line in read_metrics(stages[name].output_dir / train.METRICS)
            if "tokens_per_second" in line
        ]
        rows[name] = {
            "validation_loss": metrics["eval_hard"],
            "kl_to_teacher": metrics["eval_kl"],
            "agreement": metrics["eval_agreement"],
            "tokens": result["tokens"],
            "seconds": result["seconds"],
            "tokens_per_second": sorted(speed)[len(speed) // 2] if speed else None,
            "peak_memory_bytes": result["peak_memory_bytes"],
            "writes": judged(given, teacher, model_folder(stages[name])),
        }
    own = evaluated(given, teacher, str(reference.model.teacher))
    others = {}
    if "co" in stages:
        co = json.loads((stages["co"].output_dir / train.RESULT).read_text())
        others["co_teacher"] = {"validation_loss": co["eval_teacher_hard"]}
    return {
        "environment": environment(settings),
        "settings": settings.to_dict(),
        "validation_tokens": sum(len(ids) - 1 for ids, _ in given.validation.rows),
        "teacher": {"validation_loss": own["eval_hard"], "parameters": models.parameters(teacher)},
        **others,
        "student_parameters": models.parameters(given.student()),
        "students": rows,
    }


def model_folder(settings: Settings) -> str:
    return str(settings.output_dir / "model" / ("student" if settings.mode == "co" else ""))


def evaluated(given: train.Ingredients, teacher: Any, folder: str) -> dict[str, float]:
    arguments = resolve("soft", {**given.settings.asked, "report_to": ["none"], "disable_tqdm": True}).run
    trainer = ReliableTrainer(
        models.load_trained(folder, given.tokenizer, given.settings),
        arguments,
        teacher=teacher,
        eval_dataset=given.validation,
        data_collator=data.Collator(given.tokenizer.pad_token_id),
        **given.cut(),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer.evaluate()


def judged(given: train.Ingredients, teacher: Any, folder: str) -> dict[str, float]:
    """What a student writes after held-out beginnings, greedily and sampled: the teacher's own loss on it in nats per
    token, and how often the greedy token is the teacher's first choice."""
    settings, collate = given.settings, data.Collator(given.tokenizer.pad_token_id)
    start, device = settings.generation.prompt_tokens, settings.run.device
    prompts = [ids[:start] for ids, _ in given.validation.rows[:JUDGED_PROMPTS] if len(ids) > start]
    student, teacher = models.load_trained(folder, given.tokenizer, settings).to(device), teacher.to(device)
    said: dict[str, float] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)) if prompts else ():
        torch.manual_seed(settings.run.seed)
        room = settings.data.max_length - start
        rows = continued(student, prompts, given.tokenizer, new_tokens=room, temperature=temperature)
        batch = collate([{"input_ids": ids, "labels": labels} for ids, labels in rows])
        batch = {key: tensor.to(device) for key, tensor in batch.items()}
        labels = shifted_labels(batch)

        def judge(head: kd.LinearHead, labels: Any = labels) -> tuple[Any, Any]:
            loss = kd.cross_entropy(head, labels, vocab_size=len(given.tokenizer))
            return loss, kd.top_k_target(head, 1, vocab_size=len(given.tokenizer)).ids[..., 0] == labels

        with torch.no_grad():
            loss, same = call_through_head(teacher, model_inputs(batch), judge)
        said[name] = loss.item()
        said[f"{name}_agreement"] = (same.sum() / (labels >= 0).sum()).item()
    return said


def environment(settings: Settings) -> dict[str, Any]:
    device = settings.run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kdkernels": kd.__version__,
        "python": platform.python_version(),
        "instruction_set": kd.instruction_set(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
