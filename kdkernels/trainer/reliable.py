"""What makes a run safe to kill: whole checkpoints only, and a stop before bad numbers reach weights."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from ..integrations.transformers import DistillationTrainer
from .errors import UserError, first_line, one_line
from .files import raised_by_all, read_metrics, write_whole
from .progress import Progress

#: A checkpoint is written here and then renamed, so that a folder named checkpoint-N is a whole one.
STAGING = "checkpoint-being-written"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
#: In a checkpoint: what the run had taken up to it.
SECONDS = "seconds.json"
#: In a checkpoint: the names of its files, and their bytes.
FILES = "files.json"
#: Files whose size is not compared, since some edit them.
_TEXTS = (".json", ".md", ".txt", ".jinja")
#: In a checkpoint: how far the run had come, as Trainer names it.
STATE = "trainer_state.json"


class ReliableTrainer(DistillationTrainer):
    """DistillationTrainer whose checkpoints appear whole or not at all, and which stops at a number that is not finite.

    Methods that begin with _ are Trainer's own, private ones. transformers has no hook where they are overridden;
    ``tests/test_trainer_*.py`` fails where a new version calls them otherwise.
    """

    #: What the teacher took to write the training text, in hard.
    writing_seconds = 0.0
    #: time.perf_counter() when the run began, had it never been interrupted.
    start = 0.0
    _staging = False
    _clock: tuple[float, int] | None = None  #: time and tokens at the last log

    def __init__(self, model: nn.Module, args: Any, **options: Any) -> None:
        # Trainer writes this to the model's config, which is saved. The loss asks for no cache, whatever it says.
        args.use_cache = getattr(model.config, "use_cache", args.use_cache)
        super().__init__(model, args, **options)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress())
        begin = self.callback_handler.on_train_begin

        def on_train_begin(*arguments: Any) -> Any:
            with one_line(f"report_to={self.args.report_to} cannot begin"):
                return begin(*arguments)

        self.callback_handler.on_train_begin = on_train_begin  # type: ignore[method-assign, assignment]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Leaves out the keys that are in no checkpoint because they are tied to one that is."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [key for key in load_result.missing_keys if tied.get(key, key) in load_result.missing_keys]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    @property
    def models(self) -> tuple[Any, Any]:
        """The student and, if it is here, the teacher."""
        return self.model, self.teacher

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        # A run that is resumed from its last checkpoint has no step left. Trainer would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **options)

    # -- checkpoints ---------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder / STAGING) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._not_training():
            self._save_whole_checkpoint(model, trial)

    def _save_whole_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        staging, final = self._folder / STAGING, self._folder / name
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                (staging / name / SECONDS).write_text(json.dumps(time.perf_counter() - self.start))
            self.accelerator.wait_for_everyone()
            if self.args.should_save and final.exists():  # of this very step, by the run that was killed
                shutil.rmtree(staging)
            elif self.args.should_save:
                self._publish(staging / name, final)
        except Exception as error:  # tokenizers raises nothing narrower when the disk is full
            shutil.rmtree(staging, ignore_errors=True)
            raise UserError(
                f"step {self.state.global_step}: the checkpoint could not be written to {self._folder}: "
                f"{first_line(error)}; {self._last_good()}"
            ) from error
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()

    def _publish(self, staged: Path, final: Path) -> None:
        if str(staged.parent) in (self.state.best_model_checkpoint or ""):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(staged / STATE))
        written = [path for path in sorted(staged.rglob("*")) if path.is_file()]
        sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in written}
        (staged / FILES).write_text(json.dumps(sizes, indent=1))
        for path in (*written, staged / FILES):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        staged.rename(final)
        staged.parent.rmdir()
        limit = self.args.save_total_limit
        for old in checkpoints(self._folder)[:-limit] if limit else []:
            if str(old) != self.state.best_model_checkpoint:
                shutil.rmtree(old.rename(staged.parent))  # renamed first: nor is one ever half deleted

    def _init_training_state(self, *arguments: Any, **options: Any) -> Any:
        made = super()._init_training_state(*arguments, **options)
        # The path in a checkpoint is as --output_dir was spelt, and where the folder was, when it was written.
        best = self._folder / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return made

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with one_line(f"cannot load the model of {resume_from_checkpoint}"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with one_line(f"cannot load optimizer and schedule of {checkpoint}"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with one_line(f"cannot load the random numbers' state of {checkpoint}"):
            super()._load_rng_state(checkpoint)

    def _last_good(self) -> str:
        last = get_last_checkpoint(self._folder)
        return f"the last good one is {last}" if last else "there is no checkpoint yet"

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            raise UserError(
                f"metric_for_best_model={self.args.metric_for_best_model}: evaluation gives "
                f"{', '.join(sorted(metrics))}; {self._last_good()}"
            ) from error

    # -- what options ask of libraries ----------------------------------------------------------

    def init_hf_repo(self, *arguments: Any, **options: Any) -> None:
        with one_line(f"push_to_hub={self.args.push_to_hub} cannot begin"):
            super().init_hf_repo(*arguments, **options)

    def create_optimizer(self, *arguments: Any, **options: Any) -> Any:
        with one_line(f"optim={_name(self.args.optim)}, optim_args={self.args.optim_args}"):
            return super().create_optimizer(*arguments, **options)

    def create_scheduler(self, *arguments: Any, **options: Any) -> Any:
        args = self.args
        name = _name(args.lr_scheduler_type)
        with one_line(f"lr_scheduler_type={name}, lr_scheduler_kwargs={args.lr_scheduler_kwargs}"):
            return super().create_scheduler(*arguments, **options)

    # -- numbers -------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and num_items is not None and not num_items > 0:
            raise UserError(
                f"step {self.state.global_step + 1}: every token of the batch is masked; {self._last_good()}"
            )
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            self._stop("loss", float(loss), inputs)
        self._last_inputs = inputs
        return loss

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counts tokens once where processes that share a model all have the same."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        added = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + added // self.get_tp_size()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)):
            self._stop("gradient norm", float(norm), self._last_inputs)
        return norm

    def _stop(self, what: str, value: float, inputs: dict[str, Any]) -> None:
        step = self.state.global_step + 1
        path = self._folder / f"non-finite-step-{step}-rank-{self.args.process_index}.pt"
        torch.save({name: tensor.cpu() for name, tensor in inputs.items()}, path)
        raise UserError(
            f"step {step}: {what} is {value}; the batch is saved in {path}, weights were not updated; "
            f"{self._last_good()}"
        )

    # -- logs ----------------------------------------------------------------------------------

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        with self._not_training():
            return super().evaluate(*arguments, **options)

    @contextlib.contextmanager
    def _not_training(self) -> Iterator[None]:
        """Time that tokens/s does not count."""
        start = time.perf_counter()
        yield
        if self._clock is not None:
            self._clock = self._clock[0] + time.perf_counter() - start, self._clock[1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, tokens = time.perf_counter(), self.state.num_input_tokens_seen
            if self._clock is not None:
                logs["tokens_per_second"] = (tokens - self._clock[1]) / (now - self._clock[0])
            self._clock = now, tokens
            logs["peak_memory_gib"] = peak_memory() / 2**30
        super().log(logs, start_time)


class LinesUntil(TrainerCallback):
    """A .jsonl with a ``step`` in each line: after a resume, lines past its checkpoint are written anew."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
        with raised_by_all(args.world_size), one_line(f"cannot go on with {self.path}"):
            self._begin(state)

    def _begin(self, state: Any) -> None:
        lines = read_metrics(self.path)
        if not all(isinstance(line, dict) and "step" in line for line in lines):
            raise UserError(f"{self.path} has lines that no run wrote: they have no step; move it elsewhere")
        done = [line for line in lines if line["step"] <= state.global_step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in done))


class MetricsFile(LinesUntil):
    """metrics.jsonl, one line per log."""

    def _begin(self, state: Any) -> None:
        if state.is_world_process_zero:
            super()._begin(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **ignored: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _name(choice: Any) -> str:
    return str(getattr(choice, "value", choice))


def checkpoints(folder: Any) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in Path(folder).glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def last_checkpoint(folder: Path) -> str | None:
    """The checkpoint that a run goes on from. UserError if it is not as it was written."""
    found = checkpoints(folder)
    if not found:
        return None
    before = f"goes on from {found[-2].name}" if len(found) > 1 else "begins anew"
    check_whole(found[-1], f"delete it, and --resume {before}")
    return str(found[-1])


def check_whole(checkpoint: Path, way_out: str) -> None:
    """Raises :class:`UserError` for a checkpoint that lacks something, which Trainer would go on without."""
    record = checkpoint / FILES
    if not record.is_file():
        raise UserError(f"{checkpoint} lacks {FILES}; {way_out}")
    with one_line(f"{record} is damaged"):
        sizes = {STATE: 0} | json.loads(record.read_text())
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{checkpoint} lacks {name}; {way_out}")
        found = path.stat().st_size
        if found != size and path.suffix not in _TEXTS:
            raise UserError(f"{checkpoint} is damaged: {name} has {found} bytes, not {size}; {way_out}")
    try:
        TrainerState.load_from_json(str(checkpoint / STATE))
    except (ValueError, TypeError) as error:
        raise UserError(f"{checkpoint} is damaged: {STATE}: {first_line(error)}; {way_out}") from error


def seconds_before(checkpoint: str | None) -> float:
    """What the run had taken up to a checkpoint."""
    if checkpoint is None:
        return 0.0
    path = Path(checkpoint, SECONDS)
    with one_line(f"cannot read {path}"):
        return float(json.loads(path.read_text()))


def peak_memory() -> int:
    """Bytes: of the GPU's tensors where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
