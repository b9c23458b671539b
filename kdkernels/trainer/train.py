"""Soft, hard, co- and on-policy distillation on ``transformers.Trainer``. This is the part to copy.

:func:`run` reads data and models, hands them to one of :func:`soft`, :func:`hard`, :func:`co` and :func:`on_policy`,
which differ in a few lines, trains, evaluates and saves.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Iterator

import torch
import yaml
from transformers.integrations import is_deepspeed_zero3_enabled

import kdkernels as kd

from . import data, models, summary
from .codistill import CodistillationTrainer, Pair, SoftWeight
from .errors import UserError, one_line
from .files import locked, raised_by_all, read_metrics, write_whole
from .generate import write_completions
from .on_policy import OnPolicyTrainer, Policy
from .progress import say
from .reliable import MetricsFile, ReliableTrainer, checkpoints, last_checkpoint, peak_memory, seconds_before
from .settings import Settings, divergence_of, for_mode, without_secrets

RESULT, CONFIG, METRICS = "result.json", "config.yaml", "metrics.jsonl"
#: The folder of a tokenizer that is trained on --data.
TOKENIZER = "tokenizer"
#: The text and the number of processes that a run began with.
BEGUN = "begun.json"
#: What `compare` leaves in its folder.
COMPARISON = "comparison.json"


@dataclass
class Ingredients:
    """What every mode begins with."""

    settings: Settings
    tokenizer: Any
    records: list[data.Record]  #: the training documents
    train: data.Sequences
    validation: data.Sequences

    @cached_property
    def vocab_size(self) -> int:
        return models.vocabulary(self.tokenizer)

    def model(self, name: str, seed: int) -> Any:
        settings = self.settings
        return models.load_model(
            name,
            self.tokenizer,
            dtype=settings.model.dtype,
            seed=seed,
            max_length=settings.data.max_length,
            tensor_parallel=settings.model.tensor_parallel,
        )

    def student(self) -> Any:
        settings, seed = self.settings, self.settings.run.seed
        return models.add_lora(self.model(settings.model.student, seed), settings.model, seed)

    def teacher(self) -> Any:
        return self.model(str(self.settings.model.teacher), self.settings.run.seed + 1)

    def loss_options(self) -> dict[str, Any]:
        loss = self.settings.loss
        return {
            "divergence": divergence_of(str(loss.divergence)),
            "temperature": loss.temperature,
            "temperature_squared": loss.temperature_squared,
            "soft_weight": loss.soft_weight,
            "hard_weight": loss.hard_weight,
            **self.cut(),
        }

    def cut(self) -> dict[str, Any]:
        """What every loss leaves out: padding, since models' vocabularies are often larger than the tokenizer's, and
        what the tolerance allows."""
        tolerance = self.settings.loss.gradient_tolerance
        return {"vocab_size": self.vocab_size, "gradient_tolerance": tolerance}

    def trainer_options(self) -> dict[str, Any]:
        return {
            "train_dataset": self.train,
            "eval_dataset": self.validation,
            "processing_class": self.tokenizer,
            "data_collator": data.Collator(self.tokenizer.pad_token_id),
            "callbacks": [MetricsFile(self.settings.output_dir / METRICS)],
        }


def soft(given: Ingredients) -> ReliableTrainer:
    """The student learns the teacher's distribution over every token."""
    if given.settings.model.targets is not None:
        return from_cache(given, given.settings.model.targets)
    return ReliableTrainer(
        given.student(),
        given.settings.run,
        teacher=given.teacher(),
        keep_sharded=given.settings.model.keep_sharded,
        **given.loss_options(),
        **given.trainer_options(),
    )


def from_cache(given: Ingredients, targets: str) -> ReliableTrainer:
    """The student learns from a teacher cache; the teacher is not loaded."""
    from .cached import with_targets

    loss, options = given.loss_options(), with_targets(targets, given.trainer_options())
    one = options["train_dataset"][0]["target"][:1]
    with one_line(f"--targets {targets}"):  # a tail may have no such divergence
        kd.explain(torch.zeros(1, given.vocab_size), one, divergence=loss["divergence"])
    return ReliableTrainer(
        given.student(),
        given.settings.run,
        teacher=None,
        keep_sharded=given.settings.model.keep_sharded,
        **loss,
        **options,
    )


def hard(given: Ingredients) -> ReliableTrainer:
    """The teacher writes (or wrote) and the student imitates: cross entropy on the completions."""
    writing_seconds = 0.0
    if given.settings.model.teacher is not None:
        if is_deepspeed_zero3_enabled():
            raise UserError(
                "hard under ZeRO-3: a teacher in shards cannot write; let it write in a run without --deepspeed, "
                "then give that run's completions.jsonl as --data and no --teacher"
            )
        with given.settings.run.main_process_first(desc="completions"):
            path, writing_seconds = write_completions(
                given.settings, given.teacher, given.tokenizer, given.records, given.train
            )
        written = data.read(data.DataSettings(data=[str(path)]))
        sequences = data.sequences(written, given.tokenizer, given.settings.data.max_length)
        given.train = data.check_trainable(sequences, str(path))
        say(f"the teacher's completions: {summary.size(given.train)}")
    trainer = ReliableTrainer(
        given.student(),
        given.settings.run,
        teacher=None,
        soft_weight=0.0,
        hard_weight=1.0,
        **given.cut(),
        **given.trainer_options(),
    )
    trainer.writing_seconds = writing_seconds
    return trainer


def co(given: Ingredients) -> ReliableTrainer:
    """Both models train: the teacher on the text, the student on the text and on the teacher."""
    loss = given.settings.loss
    return CodistillationTrainer(
        Pair(given.student(), given.teacher()),
        given.settings.run,
        soft_schedule=SoftWeight(
            loss.soft_schedule, loss.soft_weight, loss.soft_weight_start, loss.soft_warmup
        ),
        teacher_learning_rate=loss.teacher_learning_rate,
        **given.loss_options(),
        **given.trainer_options(),
    )


def on_policy(given: Ingredients) -> ReliableTrainer:
    """The student writes and the teacher judges it; a share of the batches may be the text itself."""
    settings = given.settings
    return OnPolicyTrainer(
        given.student(),
        settings.run,
        teacher=given.teacher(),
        policy=Policy(
            settings.policy.student_share,
            settings.policy.judge,
            settings.generation.prompt_tokens,
            settings.policy.new_tokens,
            settings.data.max_length,
            settings.generation.sampling_temperature,
        ),
        **given.loss_options(),
        **given.trainer_options(),
    )


BUILD = {"soft": soft, "hard": hard, "co": co, "on_policy": on_policy}


def run(settings: Settings) -> dict[str, Any]:
    """One run from settings to a saved model; returns what it came to, and writes it to result.json."""
    if settings.run.deepspeed and settings.run.use_cpu:
        begin_deepspeed_on_cpu()
    with claimed(settings) as fresh:
        return _run(settings, fresh)


def _run(settings: Settings, fresh: bool) -> dict[str, Any]:
    folder = settings.output_dir
    settings.run.remove_unused_columns = False
    settings.run.include_num_input_tokens_seen = "non_padding"
    settings.run.logging_nan_inf_filter = False  # a loss that is not finite stops the run instead
    trainer = None
    try:
        checkpoint = last_checkpoint(folder)
        trainer = build(settings)
        trainer.start = time.perf_counter() - seconds_before(checkpoint)
        summary.of_models(settings, *trainer.models, checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
    except Exception:
        steps = 0 if trainer is None else trainer.state.global_step
        if fresh and not steps and not checkpoints(folder):
            # A run that could not begin leaves its folder free for another. config.yaml says whose the others are.
            for name in (METRICS, BEGUN, CONFIG):
                (folder / name).unlink(missing_ok=True)
            discard_tokenizer(settings)
        raise
    result = {
        "mode": settings.mode,
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - trainer.start,
        "tokens": trainer.state.num_input_tokens_seen,
        "writing_seconds": trainer.writing_seconds,
        "peak_memory_bytes": peak_memory(),
    }
    # Before the evaluation, which leaves the model in half precision under bf16_full_eval.
    with one_line(f"cannot write {folder / 'model'}"):
        trainer.save_model(str(folder / "model"))
    if trainer.eval_dataset:
        result.update(last_evaluation(trainer) or trainer.evaluate())
    if trainer.is_world_process_zero():
        write_whole(folder / RESULT, json.dumps(result, indent=1))
    summary.of_result(settings, result)
    trainer.accelerator.wait_for_everyone()  # a process that leaves early would break the others' collectives
    return result


def last_evaluation(trainer: ReliableTrainer) -> dict[str, Any] | None:
    """What the last step came to, if it was evaluated and left the weights as they are now."""
    if trainer.args.load_best_model_at_end:
        return None
    for line in reversed(trainer.state.log_history):
        if line["step"] == trainer.state.global_step and "eval_loss" in line:
            return {name: value for name, value in line.items() if name != "step"}
    return None


def begin_deepspeed_on_cpu() -> None:
    """accelerate does this only where there is a GPU. Without it DeepSpeed takes each process for the only one."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)


def build(settings: Settings) -> ReliableTrainer:
    """The mode's trainer. UserError if it refuses an option."""
    args = settings.run
    try:
        given = ingredients(settings)
        check_begun(given)
        summary.of_data(settings, given.records, given.train, given.validation)
        trainer = BUILD[settings.mode](given)
    except (ValueError, ImportError) as error:
        # Trainer or DistillationTrainer refuses an option, or an extra is missing.
        raise UserError(" ".join(str(error).split())) from error
    if args.fsdp and not trainer.is_fsdp_enabled:
        raise UserError(
            "fsdp was asked for, but accelerate shards over accelerators only; leave --fsdp out on the CPU"
        )
    rows, batch = len(trainer.train_dataset), args.train_batch_size * settings.replicas  # type: ignore[arg-type]
    if args.dataloader_drop_last and rows < batch:
        raise UserError(
            f"dataloader_drop_last drops the only batch: {rows} sequences, and a batch takes {batch}"
        )
    judged = args.load_best_model_at_end or args.save_strategy == "best"
    if judged and not trainer.eval_dataset:
        raise UserError("the best checkpoint needs text to be judged by: --validation_share above 0")
    return trainer


@contextlib.contextmanager
def claimed(settings: Settings) -> Iterator[bool]:
    """The run's folder for this run alone; whether the run is new. What the first process finds wrong, all of them raise."""
    folder, fresh = settings.output_dir, False
    with contextlib.ExitStack() as held:
        with raised_by_all(settings.run.world_size):
            if not settings.run.process_index:
                with one_line(f"cannot use --output_dir {folder}"):
                    folder.mkdir(parents=True, exist_ok=True)
                    held.enter_context(
                        locked(folder, f"another process is training in {folder}; wait for it")
                    )
                    fresh = claim_folder(settings)
        yield fresh


def claim_folder(settings: Settings) -> bool:
    """Writes the run's config.yaml; True if there was none."""
    path = settings.output_dir / CONFIG
    if path.exists():
        check_same_settings(settings)
        if not begun(settings.output_dir):
            discard_tokenizer(settings)
        return False
    names = [path.name for path in checkpoints(settings.output_dir)] + [RESULT, "model", COMPARISON]
    names += [TOKENIZER] if settings.model.trains_tokenizer else []
    others = [name for name in names if (settings.output_dir / name).exists()]
    others += [METRICS] if read_metrics(settings.output_dir / METRICS) else []
    if others:
        raise UserError(
            f"--output_dir {settings.output_dir} holds {others[0]}, but no {CONFIG} of a run: it is not overwritten, "
            "choose another folder"
        )
    if settings.run.resume:
        say(f"nothing to resume in {settings.output_dir}: a new run begins")
    (settings.output_dir / BEGUN).unlink(missing_ok=True)  # of a run that could not begin
    write_whole(path, yaml.safe_dump(settings.to_dict(), sort_keys=False))
    return True


def begun(folder: Path) -> bool:
    """Whether the run in a folder has come as far as its text."""
    return any((folder / name).exists() for name in (BEGUN, RESULT)) or bool(checkpoints(folder))


def discard_tokenizer(settings: Settings) -> None:
    """Removes a tokenizer that no run has begun with: the next one may be of another size, or of other text."""
    if settings.model.trains_tokenizer:
        shutil.rmtree(settings.output_dir / TOKENIZER, ignore_errors=True)


def check_same_settings(settings: Settings) -> None:
    """A run is never overwritten, and only goes on under its own settings."""
    folder = settings.output_dir
    if not settings.run.resume:
        raise UserError(
            f"{folder} already holds a run: --resume goes on with it; or choose another --output_dir"
        )
    with one_line(f"cannot read {folder / CONFIG}"):
        before = for_mode(settings.mode, without_secrets(yaml.safe_load((folder / CONFIG).read_text())))
    now = settings.to_dict()
    changed = sorted(
        n for n in before.keys() | now.keys() if before.get(n) != now.get(n) and n != "output_dir"
    )
    if changed:
        raise UserError(
            f"{folder} was made with other settings ("
            + ", ".join(f"{n} {before.get(n)}, now {now.get(n)}" for n in changed)
            + "); choose another --output_dir"
        )


def check_begun(given: Ingredients) -> None:
    """A run goes on with the text and the processes that it began with: its batches would not be the same ones."""
    folder, run = given.settings.output_dir, given.settings.run
    text = f"{given.train.fingerprint()} {given.validation.fingerprint()}"
    now = {"text": text, "processes": run.world_size}
    path = folder / BEGUN
    if not path.exists():
        if not run.process_index:
            write_whole(path, json.dumps(now))
        return
    before = begun_with(path)
    if before["text"] != now["text"]:
        raise UserError(
            f"{folder} was begun on other text than --data {' '.join(given.settings.data.data)} holds now; "
            "choose another --output_dir"
        )
    if before["processes"] != now["processes"]:
        raise UserError(
            f"{folder} was begun by {before['processes']} of torchrun's processes, and now there are "
            f"{now['processes']}: torchrun --nproc_per_node {before['processes']}"
        )


def begun_with(path: Path) -> dict[str, Any]:
    """What a begun.json says of a run. UserError if it is not as a run writes it."""
    with one_line(f"cannot read {path}"):
        before = json.loads(path.read_text())
    if not isinstance(before, dict) or not {"text", "processes"} <= before.keys():
        raise UserError(
            f"{path} is damaged: it does not say what the run began with; delete it if --data is what it was"
        )
    return before


def ingredients(settings: Settings) -> Ingredients:
    models.check_models(settings.model, settings.data.max_length)
    records = data.read(settings.data)
    train_records, validation_records = data.split(records, settings.data)
    with settings.run.main_process_first(desc="tokenizer"):
        tokenizer = models.load_tokenizer(
            settings.model, data.texts_of(train_records), settings.output_dir / TOKENIZER
        )
    length, source = settings.data.max_length, ", ".join(settings.data.data)
    train = data.check_trainable(data.sequences(train_records, tokenizer, length), source)
    validation = data.limited(
        data.sequences(validation_records, tokenizer, length), settings.data.validation_sequences
    )
    return Ingredients(settings, tokenizer, train_records, train, validation)
