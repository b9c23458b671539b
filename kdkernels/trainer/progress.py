"""How far a run is: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback

#: Without a terminal: seconds between two lines of a bar, and their format.
INTERVAL = 10
LINE = "{desc}: {n_fmt} of {total_fmt}{unit} ({percentage:.0f}%) in {elapsed}, {remaining} left{postfix}"
#: Logged name -> its short name behind the bar.
SHOWN = {
    "loss": "loss",
    "soft": "soft",
    "hard": "hard",
    "agreement": "agree",
    "target_agreement": "agree",
    "teacher_hard": "teacher",
    "soft_weight": "w",
    "eval_hard": "val",
    "tokens_per_second": "tok/s",
}


#: True in a stage of compare, which says its line itself.
quiet = False


def say(text: str) -> None:
    """Prints a line, flushed. Of several processes only the first prints."""
    if not quiet and os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


class Lines(io.TextIOBase):
    """tqdm's bars as separate lines on stderr, for output that is no terminal."""

    def write(self, text: str) -> int:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)
        return len(text)


def bar(**options: Any) -> tqdm:
    """tqdm's bar. Without a terminal it is a line every 10 s, and none for work that takes less."""
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, **options)
    return tqdm(file=Lines(), bar_format=LINE, delay=INTERVAL, mininterval=INTERVAL, miniters=1, **options)


class Progress(ProgressCallback):
    """Trainer's progress bars, with the last logged numbers at their end instead of printed dictionaries."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
        self.last: dict[str, str] = {}
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = bar(
                total=state.max_steps, initial=state.global_step, desc="training", unit=" steps"
            )

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **options: Any
    ) -> None:
        if state.is_world_process_zero and self.prediction_bar is None:
            alone = self.training_bar is None
            self.prediction_bar = bar(
                total=len(eval_dataloader), desc="evaluating", unit=" batches", leave=alone
            )
        super().on_prediction_step(args, state, control, eval_dataloader, **options)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **ignored: Any) -> None:
        if self.training_bar is not None:
            self.last.update({short: f"{logs[name]:.4g}" for name, short in SHOWN.items() if name in logs})
            self.training_bar.set_postfix(self.last, refresh=False)
