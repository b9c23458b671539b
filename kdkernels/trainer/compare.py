"""``train compare``: soft, hard, co and a student without a teacher, alike in everything but the loss.

Each stage is an ordinary run in a folder and a process of its own (so that peak memory is its own). A stage
that is finished is reused, one that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import kdkernels as kd

from . import data, models, train
from .reliable import ReliableTrainer, read_metrics, write_whole
from .settings import SCRATCH, Problem, Settings, resolve

#: Name in the table, and in the folder.
STUDENTS = {"plain": "no teacher", "soft": "soft", "hard": "hard", "co": "co"}
COMPARISON, REPORT, PICTURE = "comparison.json", "report.md", "curves.png"


def compare(settings: Settings) -> None:
    if settings.run.world_size > 1:
        raise Problem("compare starts its stages itself; run it without torchrun")
    if settings.run.max_steps <= 0:
        raise Problem("compare needs --max_steps: the budget that every student gets")
    if settings.model.teacher is None:
        raise Problem("compare needs a --teacher")
    start = time.perf_counter()
    stages = plan(settings)
    reused = [run_stage(i, len(stages), name, stage) for i, (name, stage) in enumerate(stages.items(), 1)]
    folder = settings.output_dir
    if all(reused) and (folder / COMPARISON).exists():
        comparison = json.loads((folder / COMPARISON).read_text())
    else:
        comparison = measured(settings, stages)
        comparison["seconds"] = time.perf_counter() - start
        write_whole(folder / COMPARISON, json.dumps(comparison, indent=1))
    merge_metrics(folder, stages)
    draw(folder, stages, comparison)
    write_whole(folder / REPORT, report(comparison))
    print(f"\n{table(comparison)}\n\n{verdict(comparison)}\n\nReport, picture, metrics and models are in {folder}/")


# -- the stages -------------------------------------------------------------------------------------


def plan(settings: Settings) -> dict[str, Settings]:
    """Stage -> its settings: a teacher, if it must be made first, and the students."""
    folder, shared = settings.output_dir, settings.to_dict()
    for name in ("mode", "teacher_steps", "resume"):
        shared.pop(name, None)
    scratch = settings.model.teacher in SCRATCH
    shared["tokenizer"] = tokenizer(settings)
    teacher = str(folder / "teacher" / "model") if scratch else settings.model.teacher

    def stage(mode: str, name: str, **values: Any) -> Settings:
        resume = (folder / name / train.CONFIG).exists()
        return resolve(mode, {**shared, "output_dir": str(folder / name), "resume": resume, **values})

    stages = {}
    if scratch:
        stages["teacher"] = stage(
            "hard", "teacher", student=settings.model.teacher, teacher=None, lora_rank=0, seed=settings.run.seed + 1,
            max_steps=settings.run.teacher_steps or settings.run.max_steps,
            learning_rate=settings.loss.teacher_learning_rate,
        )  # fmt: skip
    stages["plain"] = stage("hard", "plain", teacher=None)
    stages["soft"] = stage("soft", "soft", teacher=teacher)
    stages["hard"] = stage("hard", "hard", teacher=teacher)
    stages["co"] = stage("co", "co", hard_weight=1.0)
    return stages


def tokenizer(settings: Settings) -> str:
    """The tokenizer of every stage: one that was given, or trained here."""
    if settings.model.tokenizer or settings.model.pretrained:
        return settings.model.tokenizer or settings.model.pretrained[0]
    folder = settings.output_dir / "tokenizer"
    if not folder.exists():
        print(f"training a tokenizer on {', '.join(settings.data.data)}", flush=True)
        records, _ = data.split(data.read(settings.data), settings.data, settings.run.seed)
        models.load_tokenizer(settings.model, data.texts_of(records), folder)
    return str(folder)


def run_stage(number: int, count: int, name: str, settings: Settings) -> bool:
    """Runs a stage in a process of its own; True if it was there already."""
    heading = f"[{number}/{count}] {name}"
    if (settings.output_dir / train.RESULT).exists():
        train.check_same_settings(settings)
        print(f"{heading}: reusing {settings.output_dir}")
        return True
    print(f"{heading}: {'going on in' if settings.run.resume else 'writing'} {settings.output_dir}", flush=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([train.__name__])
    process = context.Process(target=_stage, args=(settings.mode, settings.asked))
    process.start()
    process.join()
    if process.exitcode:
        raise Problem(f"{name} did not finish (exit code {process.exitcode}); run the same command again to go on")
    return False


def _stage(mode: str, asked: dict[str, Any]) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        train.run(resolve(mode, asked))
    except Problem as problem:
        sys.exit(f"error: {problem}")


# -- what came of it --------------------------------------------------------------------------------


def measured(settings: Settings, stages: dict[str, Settings]) -> dict[str, Any]:
    """Every student against the same teacher on the same held-out text."""
    reference = stages["soft"]
    given = train.ingredients(reference)
    teacher = given.teacher()
    rows = {}
    for name in STUDENTS:
        result = json.loads((stages[name].output_dir / train.RESULT).read_text())
        metrics = evaluated(given, teacher, model_folder(stages[name]))
        speed = [line["tokens_per_second"] for line in read_metrics(stages[name].output_dir / train.METRICS)
                 if "tokens_per_second" in line]  # fmt: skip
        rows[name] = {
            "validation_loss": metrics["eval_hard"], "kl_to_teacher": metrics["eval_kl"],
            "agreement": metrics["eval_agreement"], "tokens": result["tokens"], "seconds": result["seconds"],
            "tokens_per_second": sorted(speed)[len(speed) // 2] if speed else None,
            "peak_memory_bytes": result["peak_memory_bytes"],
        }  # fmt: skip
    own = evaluated(given, teacher, reference.model.teacher)
    co = json.loads((stages["co"].output_dir / train.RESULT).read_text())
    return {
        "environment": environment(settings),
        "settings": settings.to_dict(),
        "validation_tokens": sum(len(ids) - 1 for ids, _ in given.validation.rows),
        "teacher": {"validation_loss": own["eval_hard"], "parameters": parameters(teacher)},
        "co_teacher": {"validation_loss": co["eval_teacher_hard"]},
        "student_parameters": parameters(given.student()),
        "students": rows,
    }


def model_folder(settings: Settings) -> str:
    return str(settings.output_dir / "model" / ("student" if settings.mode == "co" else ""))


def evaluated(given: train.Ingredients, teacher: Any, folder: str) -> dict[str, float]:
    arguments = resolve("soft", {**given.settings.asked, "report_to": ["none"], "disable_tqdm": True}).run
    trainer = ReliableTrainer(
        models.load_trained(folder, given.tokenizer, given.settings), arguments, teacher=teacher,
        eval_dataset=given.validation, data_collator=data.Collator(given.tokenizer.pad_token_id), **given.cut(),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer.evaluate()


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def environment(settings: Settings) -> dict[str, Any]:
    device = settings.run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__, "kdkernels": kd.__version__, "python": platform.python_version(),
            "instruction_set": kd.instruction_set(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


# -- table, picture, report -----------------------------------------------------------------------


def table(comparison: dict[str, Any]) -> str:
    lines = ["| student | validation loss | KL to teacher | top-1 agreement | tokens | tokens/s | peak memory |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in comparison["students"].items():
        speed = "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}"
        lines.append(
            f"| {STUDENTS[name]} | {row['validation_loss']:.3f} | {row['kl_to_teacher']:.3f} | {row['agreement']:.1%} "
            f"| {row['tokens']:,} | {speed} | {row['peak_memory_bytes'] / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def verdict(comparison: dict[str, Any]) -> str:
    """The outcome as it is."""
    students = comparison["students"]
    plain, soft = students["plain"]["validation_loss"], students["soft"]["validation_loss"]
    outcome = "beats" if soft < plain else "does not beat"
    return (f"Soft distillation {outcome} the student without a teacher: validation loss {soft:.3f} against {plain:.3f} "
            f"(the teacher: {comparison['teacher']['validation_loss']:.3f}).")  # fmt: skip


def report(comparison: dict[str, Any]) -> str:
    where, settings = comparison["environment"], comparison["settings"]
    return f"""# Soft, hard and co-distillation at one token budget

{table(comparison)}

{verdict(comparison)} In co-distillation the teacher that was trained along came to
{comparison["co_teacher"]["validation_loss"]:.3f}. Loss and KL are nats per token on {comparison["validation_tokens"]:,} held-out
tokens; KL(teacher || student) at temperature 1 and agreement are against the same teacher for all.

![validation loss]({PICTURE})

Student: {settings["student"]}, {comparison["student_parameters"] / 1e6:.2f} M parameters; teacher: {settings["teacher"]},
{comparison["teacher"]["parameters"] / 1e6:.2f} M. Data: {", ".join(settings["data"])}; sequences of {settings["max_length"]} tokens. Soft:
{settings["divergence"]} at temperature {settings["temperature"]:g}, {settings["soft_weight"]:g} x soft + {settings["hard_weight"]:g} x hard. Hard: {settings["prompts"]:,}
completions by the teacher, repeated to the budget. Co: soft weight {settings["soft_schedule"]}.

{where["machine"]}, {where["threads"]} threads, torch {where["torch"]}, transformers {where["transformers"]}, Python {where["python"]}, {where["date"]};
{comparison["seconds"]:.0f} s in all.
"""


def merge_metrics(folder: Path, stages: dict[str, Settings]) -> None:
    lines = [json.dumps({"run": name, **line})
             for name, stage in stages.items() for line in read_metrics(stage.output_dir / train.METRICS)]  # fmt: skip
    write_whole(folder / train.METRICS, "\n".join(lines) + "\n")


def draw(folder: Path, stages: dict[str, Settings], comparison: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in STUDENTS.items():
        lines = [line for line in read_metrics(stages[name].output_dir / train.METRICS) if "eval_hard" in line]
        axes.plot([line["num_input_tokens_seen"] for line in lines], [line["eval_hard"] for line in lines],
                  marker="o", markersize=3, label=label)  # fmt: skip
    axes.axhline(comparison["teacher"]["validation_loss"], color="gray", linestyle="--", label="the teacher")
    axes.set(xlabel="tokens that the student was trained on", ylabel="validation loss (nats per token)")
    axes.legend()
    figure.savefig(folder / PICTURE, dpi=120)
    plt.close(figure)

