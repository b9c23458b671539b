"""Soft, hard, co- and on-policy distillation on ``transformers.Trainer``. This is the part to copy.

:func:`run` reads data and models, hands them to one of :func:`soft`, :func:`hard`, :func:`co` and :func:`on_policy`,
which differ in a few lines, trains, evaluates and saves.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

import kdkernels as kd

from . import data, models, summary
from .codistill import CodistillationTrainer, Pair, SoftWeight
from .errors import UserError, one_line
from .files import write_whole
from .folder import METRICS, RESULT, TOKENIZER, check_begun, claimed, leave_free
from .generate import write_completions
from .on_policy import OnPolicyTrainer, Policy
from .progress import say
from .reliable import MetricsFile, ReliableTrainer, last_checkpoint, peak_memory, seconds_before
from .settings import Settings, divergence_of


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

    def fingerprint(self) -> str:
        """What tells the text from another."""
        return f"{self.train.fingerprint()} {self.validation.fingerprint()}"

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
        if fresh and (trainer is None or not trainer.state.global_step):
            leave_free(settings)
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
        check_begun(settings, given.fingerprint())
        summary.of_data(settings, given.records, given.train, given.validation)
        trainer = BUILD[settings.mode](given)
    except (ValueError, ImportError, RuntimeError) as error:
        # Trainer or DistillationTrainer refuses an option, or an extra is missing, which reports say by a RuntimeError.
        if isinstance(error, RuntimeError) and "to be installed" not in str(error):
            raise
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
