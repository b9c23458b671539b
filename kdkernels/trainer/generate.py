"""The teacher writes: prompts in, ``{"prompt", "completion"}`` or ``{"messages"}`` lines out, as TRL reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from .data import Record, Sequences, kind_of
from .progress import bar, say
from .settings import Settings, UserError, one_line
from .writing import sampling


def write_completions(
    settings: Settings, teacher: Any, tokenizer: Any, records: list[Record], packed: Sequences
) -> Path:
    """Writes a .jsonl of ``teacher``'s completions. It continues the file of a killed run and never overwrites."""
    options = settings.generation
    path = Path(options.completions or settings.output_dir / "completions.jsonl")
    prompts = make_prompts(settings, records, tokenizer, packed)
    part = path.with_name(path.name + ".part")
    if path.exists():
        say(f"reusing the completions in {path}")
        return path
    size = options.generation_batch_size
    with one_line(f"cannot write completions to {path}"):
        part.parent.mkdir(parents=True, exist_ok=True)
        done = sum(line.endswith("\n") for line in part.open()) if part.exists() else 0
        done -= done % size  # only whole batches count as done: a batch's seed is its number
        _keep_lines(part, done)
    teacher = teacher.to(settings.run.device).eval()
    with part.open("a") as file:
        for start in bar(
            iterable=range(done, len(prompts), size),
            desc="teacher writes",
            initial=done // size,
            total=-(-len(prompts) // size),
            unit=" batches",
            disable=settings.run.disable_tqdm,
        ):
            set_seed(settings.run.seed + start)
            batch = prompts[start : start + size]
            texts = complete(settings, teacher, tokenizer, [text for _, text in batch])
            for (given, _), text in zip(batch, texts):
                file.write(json.dumps(_line(given, text)) + "\n")
            file.flush()
    os.replace(part, path)
    return path


def make_prompts(
    settings: Settings, records: list[Record], tokenizer: Any, packed: Sequences
) -> list[tuple[Any, str]]:
    """(what to write beside the completion, the text to continue): the data's prompts, or the beginnings of its texts."""
    count = settings.generation.prompts
    if kind_of(records[0]) != "text":
        return [_prompt(record, tokenizer) for record in records[:count]]
    length = settings.generation.prompt_tokens
    if length >= settings.data.max_length:
        raise UserError(f"prompt_tokens={length} leaves no room in max_length={settings.data.max_length}")
    texts = [tokenizer.decode(ids[:length]) for ids, _ in packed.rows[:count]]
    return [(text, text) for text in texts]


def _prompt(record: Record, tokenizer: Any) -> tuple[Any, str]:
    given = record["messages"] if kind_of(record) == "messages" else record["prompt"]
    if isinstance(given, str):
        return given, given
    if tokenizer.chat_template is None:
        raise UserError("the prompts are messages, but the tokenizer has no chat template")
    given = given[:-1] if given[-1]["role"] == "assistant" else given
    return given, tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)


def _line(given: Any, completion: str) -> dict[str, Any]:
    if isinstance(given, str):
        return {"prompt": given, "completion": completion}
    return {"messages": [*given, {"role": "assistant", "content": completion}]}


def complete(settings: Settings, teacher: Any, tokenizer: Any, texts: list[str]) -> list[str]:
    temperature = settings.generation.sampling_temperature
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    room = settings.data.max_length - batch["input_ids"].shape[1] - 1  # and the end of text
    if room < 1:
        raise UserError(
            f"a prompt of {batch['input_ids'].shape[1]} tokens leaves no room in "
            f"max_length={settings.data.max_length}"
        )
    with torch.inference_mode():
        ids = teacher.generate(
            **{name: tensor.to(teacher.device) for name, tensor in batch.items() if name != "token_type_ids"},
            max_new_tokens=room,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sampling(temperature),
        )
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _keep_lines(path: Path, count: int) -> None:
    lines = path.read_text().splitlines(keepends=True)[:count] if path.exists() else []
    path.write_text("".join(lines))
