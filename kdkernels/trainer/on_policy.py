"""On-policy distillation: the student writes, the teacher judges every token of it, the student follows.

A share of the micro-batches (GKD's lambda, arXiv 2306.13649) is what the student writes, as it is at that step, after
the beginnings of the batch's rows; the others are the rows themselves.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kdkernels as kd

from .data import IGNORE
from .errors import UserError
from .reliable import LinesUntil, ReliableTrainer
from .writing import Row, continued

WRITTEN = "written.jsonl"


@dataclass(frozen=True)
class Policy:
    """What the student writes, and how the teacher judges it.

    ``judge``: "full", the divergence over the whole vocabulary; "top_k:K", over the K most probable ids of each model
    and the rest as one outcome; "sampled", :func:`kdkernels.sampled_kl` of the written tokens alone.
    """

    student_share: float
    judge: str
    prompt_tokens: int
    new_tokens: int  # 0: up to max_length
    max_length: int
    temperature: float

    def __post_init__(self) -> None:
        kind, _, number = self.judge.partition(":")
        whole = self.judge in ("full", "sampled")
        if not whole and not (kind == "top_k" and number.isdigit() and int(number) > 0):
            raise UserError(f"judge={self.judge}: there are full, sampled and top_k:K, such as top_k:20")
        if self.judge == "sampled" and (self.student_share != 1 or self.temperature != 1):
            given = {"student_share": self.student_share, "sampling_temperature": self.temperature}
            odd = " and ".join(
                f"{name} must be 1, not {value:g}" for name, value in given.items() if value != 1
            )
            raise UserError(f"judge=sampled estimates from tokens that the student itself drew: {odd}")
        if self.prompt_tokens >= self.max_length:
            raise UserError(
                f"prompt_tokens={self.prompt_tokens} leaves no room in max_length={self.max_length}"
            )

    @property
    def top_k(self) -> int:
        return int(self.judge.partition(":")[2] or 0)


class OnPolicyTrainer(ReliableTrainer):
    """Trains the student on its own text. What it wrote is kept in written.jsonl, a line for each row."""

    def __init__(self, model: nn.Module, args: Any, *, policy: Policy, **options: Any) -> None:
        super().__init__(model, args, **options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(
                "on_policy: a student in shards cannot write; run it without --fsdp and --deepspeed"
            )
        if policy.judge == "sampled":
            self._refuse_beside_sampled()
        if policy.top_k > (self.cut["vocab_size"] or policy.top_k):
            raise UserError(
                f"judge={policy.judge}: there are {self.cut['vocab_size']} tokens; give fewer, or full"
            )
        self.policy = policy
        self._sizes = {name: self.cut[name] for name in ("vocab_size", "chunk_bytes")}
        rank = args.process_index
        self._written = Path(args.output_dir, WRITTEN if rank == 0 else f"{rank}-{WRITTEN}")
        self.add_callback(LinesUntil(self._written))

    def _refuse_beside_sampled(self) -> None:
        """What :func:`kdkernels.sampled_kl`, the reverse KL of the two models as they are, would pass over."""
        asked = {
            "gradient_tolerance": (self.cut["gradient_tolerance"], 0.0),
            "divergence": (self.divergence, kd.ReverseKL()),
            "hard_weight": (self.hard_weight, 0.0),
            "temperature": (self.soft_options["temperature"], 1.0),
            "label_smoothing": (self.hard_options["label_smoothing"], 0.0),
            "z_loss": (self.hard_options["z_loss"], 0.0),
        }
        for name, (given, only) in asked.items():
            if given != only:
                raise UserError(
                    f"{name}={given}: judge=sampled estimates the reverse KL of the tokens that were drawn, and has "
                    "no other term or option; leave it out"
                )

    # -- the student writes ---------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._batch(batch, number, device) for number, batch in enumerate(batches)]
        return batches, self._get_num_items_in_batch(batches, device)

    def _batch(self, batch: dict[str, Tensor], number: int, device: torch.device) -> dict[str, Tensor]:
        """The batch itself, or what the student writes after the beginnings of its rows. The step seeds both draws, so
        that a resumed run draws and writes the same."""
        place = f"{self.args.seed} {self.state.global_step} {number}"
        if random.Random(place).random() >= self.policy.student_share:  # alike on all processes
            return batch
        with torch.random.fork_rng():
            torch.manual_seed(random.Random(f"{place} {self.args.process_index}").getrandbits(63))
            rows = self._rows(batch)
        with self._written.open("a") as file:
            for ids, labels in rows:
                file.write(json.dumps({"step": self.state.global_step + 1, **self._text(ids, labels)}) + "\n")
        made = self.data_collator([{"input_ids": ids, "labels": labels} for ids, labels in rows])
        return {name: tensor.to(device) for name, tensor in made.items()}

    def _rows(self, batch: dict[str, Tensor]) -> list[Row]:
        prompts = []
        for ids, labels, live in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
            size = int(live.sum())
            masked = int((labels[:size] != IGNORE).int().argmax())  # of a completion: its prompt
            prompts.append(ids[: masked or min(self.policy.prompt_tokens, size - 1)].tolist())
        rooms = [self.policy.max_length - len(prompt) for prompt in prompts]
        return continued(
            self.accelerator.unwrap_model(self.model),
            prompts,
            self.processing_class,
            rooms=[min(self.policy.new_tokens or room, room) for room in rooms],
            temperature=self.policy.temperature,
            vocab_size=self.cut["vocab_size"],
        )

    def _text(self, ids: list[int], labels: list[int]) -> dict[str, str]:
        decode: Any = self.processing_class.decode  # type: ignore[union-attr]
        start = next(at for at, label in enumerate(labels) if label != IGNORE)
        return {"prompt": decode(ids[:start]), "completion": decode(ids[start:], skip_special_tokens=True)}

    # -- the teacher judges ---------------------------------------------------------------------

    def batch_loss(self, student: kd.LinearHead, target: Any, labels: Tensor, num_items: Any) -> Tensor:
        if self.policy.judge == "sampled":
            return self._sampled_loss(student, target, labels, num_items)
        if self.policy.top_k:
            with torch.no_grad():
                tops = [
                    kd.top_k_target(head, self.policy.top_k, **self._sizes).ids for head in (student, target)
                ]
                target = kd.target_at(target, torch.cat(tops, -1), **self._sizes)
        return super().batch_loss(student, target, labels, num_items)

    def _sampled_loss(self, student: kd.LinearHead, target: Any, labels: Tensor, num_items: Any) -> Tensor:
        theirs = kd.token_log_probs(target, labels, **self._sizes).log_probs
        mine = kd.token_log_probs(student, labels, **self._sizes).log_probs
        total = kd.sampled_kl(mine, theirs).sum()  # 0 at masked tokens, where both are 0
        self._sums.add({"soft": total}, (labels >= 0).sum())
        return total * self.soft_weight / num_items
