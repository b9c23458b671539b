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

from . import data, judge, models, progress, report, train
from .command_line import resolve
from .errors import UserError
from .files import read_metrics, write_whole
from .folder import (
    BEGUN,
    COMPARISON,
    CONFIG,
    METRICS,
    REPORT,
    RESULT,
    TOKENIZER,
    begun_with,
    check_begun,
    check_same_settings,
    claimed_comparison,
)
from .settings import MODES, SCRATCH, WAYS, Settings, for_mode, is_secret

#: In a stage's folder: what its model is worth, kept so that a run that was stopped measures none twice.
JUDGED = "judged.json"
#: Stages that are no way of distillation -> what they do.
DOING = {
    "teacher": "the teacher learns the text",
    "plain": "a student without a teacher learns the text",
    "longer": "the same for the time that soft takes",
}


def compare(settings: Settings) -> None:
    if settings.run.world_size > 1:
        raise UserError("compare starts its stages itself; run it without torchrun")
    if settings.run.max_steps <= 0:
        raise UserError("compare needs --max_steps: the budget that every student gets")
    if not settings.data.validation_share > 0:
        raise UserError("compare needs text that no student has seen: --validation_share above 0")
    if (settings.output_dir / CONFIG).exists():
        raise UserError(
            f"--output_dir {settings.output_dir} holds a run: it is not overwritten, choose another folder"
        )
    models.check_models(settings.model, settings.data.max_length)
    with claimed_comparison(settings):
        _compare(settings)


def _compare(settings: Settings) -> None:
    start = time.perf_counter()
    stages = plan(settings)
    count = len(stages) + ("longer" in settings.compare.ways)
    reused = [run_stage(i, count, name, stage) for i, (name, stage) in enumerate(stages.items(), 1)]
    if "longer" in settings.compare.ways:
        stages["longer"] = longer(stages)
        reused.append(run_stage(count, count, "longer", stages["longer"]))
    folder = settings.output_dir
    comparison = earlier(settings) if all(reused) else None
    if comparison is None:
        check_same_text(stages)
        comparison = measured(settings, stages)
        comparison["seconds"] = None if any(reused) else time.perf_counter() - start
        write_whole(folder / COMPARISON, json.dumps(comparison, indent=1))
    curves = {name: read_metrics(stage.output_dir / METRICS) for name, stage in stages.items()}
    lines = [json.dumps({"run": name, **line}) + "\n" for name, metrics in curves.items() for line in metrics]
    write_whole(folder / METRICS, "".join(lines))
    report.draw(folder / report.PICTURE, curves, comparison)
    write_whole(folder / REPORT, report.text(comparison))
    print(
        f"\n{report.table(comparison)}\n\n{' '.join(report.sentences(comparison))}\n\n"
        f"Report, picture, metrics and models are in {folder}/"
    )


def earlier(settings: Settings) -> dict[str, Any] | None:
    """The comparison that an earlier command left, if it was asked for the same."""
    path = settings.output_dir / COMPARISON
    comparison = json.loads(path.read_text()) if path.exists() else {"settings": {}}
    asked = json.loads(json.dumps(settings.to_dict()))
    same = {**comparison["settings"], "output_dir": asked["output_dir"]} == asked
    return comparison if same else None


# -- the stages -------------------------------------------------------------------------------------


def plan(settings: Settings) -> dict[str, Settings]:
    """Stage -> its settings: a teacher, if it must be made first, and the students."""
    folder, secret = settings.output_dir, {n: v for n, v in settings.asked.items() if is_secret(n)}
    shared = {**settings.to_dict(), **secret}
    del shared["mode"]
    scratch = settings.model.teacher in SCRATCH
    shared["tokenizer"] = tokenizer(settings)
    teacher = str(folder / "teacher" / "model") if scratch else settings.model.teacher

    def stage(mode: str, name: str, **values: Any) -> Settings:
        resume = (folder / name / CONFIG).exists()
        own = {**shared, "output_dir": str(folder / name), "resume": resume, **values}
        return resolve(mode, for_mode(mode, own))

    stages, steps = {}, settings.run.teacher_steps or settings.run.max_steps
    under_way = round(settings.compare.co_teacher_at * steps) if scratch else 0
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
            max_steps=steps,
            learning_rate=settings.loss.teacher_learning_rate,
            **({"save_steps": under_way, "save_total_limit": 0} if under_way else {}),
        )
    own = settings.asked["divergence"]  # None: each way's default
    co_hard_weight = 1.0 if settings.asked["hard_weight"] is None else settings.loss.hard_weight
    beside = {"teacher": str(folder / "teacher" / f"checkpoint-{under_way}")} if under_way else {}
    students = {
        "plain": lambda: stage("hard", "plain", teacher=None, completions=None),
        "soft": lambda: stage("soft", "soft", teacher=teacher),
        "hard": lambda: stage("hard", "hard", teacher=teacher),
        "co": lambda: stage("co", "co", hard_weight=co_hard_weight, **beside),
        "on_policy": lambda: stage("on_policy", "on_policy", teacher=teacher, divergence=own),
    }
    return stages | {way: students[way]() for way in WAYS if way in settings.compare.ways and way in students}


def tokenizer(settings: Settings) -> str:
    """The tokenizer of every stage: one that was given, or trained here."""
    if not settings.model.trains_tokenizer:
        return settings.model.tokenizer or settings.model.pretrained[0]
    folder = settings.output_dir / TOKENIZER
    if not folder.exists():
        print(f"training a tokenizer on {', '.join(settings.data.data)}", flush=True)
        records, _ = data.split(data.read(settings.data), settings.data)
        models.load_tokenizer(settings.model, data.texts_of(records), folder)
    return str(folder)


def run_stage(number: int, count: int, name: str, settings: Settings) -> bool:
    """Runs a stage in a process of its own; True if it was finished before."""
    heading = f"[{number}/{count}] {name}"
    what = DOING.get(name, MODES[settings.mode])
    if (settings.output_dir / RESULT).exists():
        check_same_settings(settings)
        print(f"{heading}: reusing {settings.output_dir}")
        return True
    going_on = "; going on" if settings.run.resume else ""
    print(
        f"{heading}: {what}; {settings.run.max_steps:,} steps, in {settings.output_dir}{going_on}", flush=True
    )
    if code := exit_code(settings):
        raise UserError(f"{name} did not finish (exit code {code}); run the same command again to go on")
    result = json.loads((settings.output_dir / RESULT).read_text())
    print(
        f"{heading}: done in {result['seconds'] + result['writing_seconds']:.0f} s, "
        f"validation loss {result['eval_hard']:.3f}",
        flush=True,
    )
    return False


def exit_code(settings: Settings) -> int | None:
    """Runs a stage in a process of its own; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([train.__name__])
    process = context.Process(target=_stage, args=(settings.mode, settings.asked))
    process.start()
    try:
        process.join()
    except BaseException:  # Ctrl-C too: at its own exit this process would wait for the stage
        process.terminate()
        process.join()
        raise
    return process.exitcode


def _stage(mode: str, asked: dict[str, Any]) -> None:
    from transformers.utils import logging

    parent: Any = multiprocessing.parent_process()
    threading.Thread(
        target=lambda: (parent.join(), os._exit(1)), daemon=True
    ).start()  # so that no stage outlives a killed command
    logging.disable_progress_bar()
    progress.quiet = True  # the heading says what the stage does, and the bar how long it takes
    try:
        train.run(resolve(mode, asked))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # Ctrl-C goes to both processes, and the command says so
        sys.exit(1)


# -- what came of it --------------------------------------------------------------------------------


def longer(stages: dict[str, Settings]) -> Settings:
    """The student without a teacher once more, with as many steps as take the time that soft distillation takes."""
    plain, soft = stages["plain"], stages["soft"]
    share = report.training_seconds(speed(soft)) / report.training_seconds(speed(plain))
    folder = plain.output_dir.with_name("longer")
    own = {"output_dir": str(folder), "resume": (folder / CONFIG).exists()}
    return resolve(
        plain.mode,
        {**plain.asked, **own, "max_steps": max(round(plain.run.max_steps * share), plain.run.max_steps)},
    )


def check_same_text(stages: dict[str, Settings]) -> None:
    """Raises :class:`UserError` where --data was changed after some of the stages were finished."""
    begun = {name: stage.output_dir / BEGUN for name, stage in stages.items()}
    texts = {name: begun_with(path)["text"] for name, path in begun.items() if path.exists()}
    others = [name for name, text in texts.items() if text != texts.get("soft", text)]
    if others:
        raise UserError(
            f"{' and '.join(others)} had other text in --data than soft: it was changed between them, and the students "
            "cannot be compared; choose another --output_dir"
        )


def measured(settings: Settings, stages: dict[str, Settings]) -> dict[str, Any]:
    """Every student against the same teacher on the same held-out text."""
    reference = stages["soft"]
    given = train.ingredients(reference)
    check_begun(reference, given.fingerprint())
    asked = {
        "judged_prompts": settings.compare.judged_prompts,
        "prompt_tokens": settings.generation.prompt_tokens,
    }
    teacher = given.teacher()
    students = {way: stages[way] for way in WAYS if way in settings.compare.ways}
    folders = {way: model_folder(stage) for way, stage in students.items()}
    places = {way: stage.output_dir for way, stage in students.items()}
    rows = {}
    for name in ("teacher", *students):
        path = places.get(name, settings.output_dir / "teacher") / JUDGED
        row = json.loads(path.read_text()) if path.exists() else {}
        if row.get("asked") != asked:
            print(
                f"judging {name}: loss, KL and calibration on held-out text, and what it writes", flush=True
            )
            path.parent.mkdir(exist_ok=True)
            folder = folders.get(name, str(reference.model.teacher))
            row = {**judge.judged(given, teacher, folder, settings.compare.judged_prompts), "asked": asked}
            write_whole(path, json.dumps(row, indent=1))
        rows[name] = row
    teacher_row = {**rows.pop("teacher"), "parameters": models.parameters(teacher)}
    others: dict[str, Any] = {}
    if "co" in stages:
        co = json.loads((stages["co"].output_dir / RESULT).read_text())
        others["co_teacher"] = {"validation_loss": co["eval_teacher_hard"]}
        others["co_hard_weight"] = stages["co"].loss.hard_weight
    return {
        "environment": environment(settings),
        "settings": settings.to_dict(),
        "validation_tokens": sum(len(ids) - 1 for ids, _ in given.validation.rows),
        "teacher": teacher_row,
        **others,
        "student_parameters": models.parameters(given.student()),
        "students": {name: {**speed(stage), **rows[name]} for name, stage in students.items()},
    }


def speed(settings: Settings) -> dict[str, Any]:
    """What a stage cost. The tokens per second are without evaluations and checkpoints, ``seconds`` is with them."""
    result = json.loads((settings.output_dir / RESULT).read_text())
    lines = read_metrics(settings.output_dir / METRICS)
    rates = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    return {
        **{name: result[name] for name in ("tokens", "seconds", "writing_seconds", "peak_memory_bytes")},
        "tokens_per_second": rates[len(rates) // 2] if rates else result["tokens"] / result["seconds"],
    }


def model_folder(settings: Settings) -> str:
    return str(settings.output_dir / "model" / ("student" if settings.mode == "co" else ""))


def environment(settings: Settings) -> dict[str, Any]:
    device = settings.run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[2], 1) if hasattr(os, "getloadavg") else None,
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
