"""What a finished student is worth: against the teacher on held-out text, and by what it writes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import kdkernels as kd

from ..integrations.transformers import call_through_head, model_inputs, shifted_labels
from . import data, models, train
from .command_line import resolve
from .reliable import ReliableTrainer
from .writing import continued

#: Tokens that a student writes at most after each beginning.
NEW_TOKENS = 48
#: Of the calibration error: bins of the probability that a model gives its first choice.
BINS = 15


def judged(given: train.Ingredients, teacher: Any, folder: str, prompts: int) -> dict[str, Any]:
    """The row of the model in ``folder``: its losses and calibration on held-out text, and what it writes."""
    metrics = evaluated(given, teacher, folder)
    model = models.load_trained(folder, given.tokenizer, given.settings).to(given.settings.run.device).eval()
    return {
        "validation_loss": metrics["eval_hard"],
        "kl_to_teacher": metrics["eval_kl"],
        "agreement": metrics["eval_agreement"],
        "entropy": metrics["eval_student_entropy"],
        "calibration_error": calibration_error(given, model),
        "writes": writes(given, teacher, model, prompts),
    }


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


def calibration_error(given: train.Ingredients, model: Any) -> float:
    """The expected calibration error of the next token's first choice: how far its probability is from how often it is right.

    Guo et al., arXiv:1706.04599, equation 3: the mean over :data:`BINS` bins of equal width, weighted by their tokens.
    """
    collate, rows = data.Collator(given.tokenizer.pad_token_id), given.validation
    size, vocab = given.settings.run.per_device_eval_batch_size, given.vocab_size
    confidence, right = [], []
    for start in range(0, len(rows), size):
        batch = collate([rows[index] for index in range(start, min(start + size, len(rows)))])
        batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
        with torch.no_grad():
            first = call_through_head(
                model, model_inputs(batch), lambda head: kd.top_k_target(head, 1, vocab_size=vocab)
            )
        labels = shifted_labels(batch)
        said = labels >= 0
        confidence.append(first.values[..., 0][said].exp())
        right.append((first.ids[..., 0] == labels)[said])
    return binned_error(torch.cat(confidence), torch.cat(right))


def binned_error(confidence: torch.Tensor, right: torch.Tensor) -> float:
    """The calibration error of probabilities [N], given whether each was right [N].

    >>> binned_error(torch.tensor([0.9, 0.9, 0.1]), torch.tensor([True, False, False]))
    0.3
    """
    bins = (confidence.double() * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS, dtype=torch.float64, device=bins.device)
    gap.index_add_(0, bins, right.double() - confidence.double())
    return round((gap.abs().sum() / len(confidence)).item(), 6)


def writes(given: train.Ingredients, teacher: Any, student: Any, count: int) -> dict[str, float]:
    """What a student writes after ``count`` held-out beginnings, greedily and sampled: the teacher's own loss on it in nats per
    token, and how often a token is the teacher's first choice."""
    settings, collate = given.settings, data.Collator(given.tokenizer.pad_token_id)
    start, device = settings.generation.prompt_tokens, settings.run.device
    prompts = [ids[:start] for ids, _ in given.validation.rows[:count] if len(ids) > start]
    teacher = teacher.to(device)
    said: dict[str, float] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)) if prompts else ():
        torch.manual_seed(settings.run.seed)
        room = min(settings.data.max_length - start, NEW_TOKENS)
        rows = continued(
            student,
            prompts,
            given.tokenizer,
            rooms=[room] * len(prompts),
            temperature=temperature,
            vocab_size=given.vocab_size,
        )
        batch = collate([{"input_ids": ids, "labels": labels} for ids, labels in rows])
        batch = {key: tensor.to(device) for key, tensor in batch.items()}
        labels = shifted_labels(batch)

        def judge(head: kd.LinearHead, labels: Any = labels) -> tuple[Any, Any]:
            loss = kd.cross_entropy(head, labels, vocab_size=given.vocab_size)
            return loss, kd.top_k_target(head, 1, vocab_size=given.vocab_size).ids[..., 0] == labels

        with torch.no_grad():
            loss, same = call_through_head(teacher, model_inputs(batch), judge)
        said[name] = loss.item()
        said[f"{name}_agreement"] = (same.sum() / (labels >= 0).sum()).item()
    return said
