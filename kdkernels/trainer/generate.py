"""The teacher writes: prompts in, ``{"prompt", "completion"}`` or ``{"messages"}`` lines out, as TRL reads them.

Beside them ``ended`` says whether the completion has an end of text, or was cut at max_length.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import set_seed

from .data import Record, Sequences, kind_of, rendered
from .models import vocabulary
from .progress import bar, say
from .settings import Settings, UserError, one_line
from .writing import continued, ends_of


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
            for (given, _), (text, ended) in zip(batch, texts):
                file.write(json.dumps(_line(given, text, ended)) + "\n")
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
    texts = [_whole_characters(tokenizer.decode(ids[:length])) for ids, _ in packed.rows[:count]]
    if not any(texts):
        raise UserError(
            f"prompt_tokens={length}: no training sequence begins with a whole character; give more"
        )
    return [(text, text) for text in texts if text]


def _whole_characters(text: str) -> str:
    """Without the halves of a character that lie at the ends of cut tokens."""
    return text.strip("\N{REPLACEMENT CHARACTER}")


def _prompt(record: Record, tokenizer: Any) -> tuple[Any, str]:
    given = record["messages"] if kind_of(record) == "messages" else record["prompt"]
    if isinstance(given, str):
        return given, given
    if given and given[-1]["role"] == "assistant":
        given = given[:-1]
    return given, rendered(given, tokenizer, record["where"], add_generation_prompt=True)


def _line(given: Any, completion: str, ended: bool) -> dict[str, Any]:
    if isinstance(given, str):
        return {"prompt": given, "completion": completion, "ended": ended}
    return {"messages": [*given, {"role": "assistant", "content": completion}], "ended": ended}


def complete(settings: Settings, teacher: Any, tokenizer: Any, texts: list[str]) -> list[tuple[str, bool]]:
    """What ``teacher`` writes after each text, and whether it came to an end of text within max_length."""
    length = settings.data.max_length
    prompts = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if (longest := max(map(len, prompts))) >= length:
        raise UserError(f"a prompt of {longest} tokens leaves no room in max_length={length}")
    rows = continued(
        teacher,
        prompts,
        tokenizer,
        rooms=[length - len(prompt) for prompt in prompts],
        temperature=settings.generation.sampling_temperature,
        vocab_size=vocabulary(tokenizer),
    )
    ends = ends_of(teacher, tokenizer)
    said = []
    for prompt, (ids, _) in zip(prompts, rows):
        text, ended = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True), ids[-1] in ends
        said.append((text if ended else _whole_characters(text), ended))
    return said


def _keep_lines(path: Path, count: int) -> None:
    lines = path.read_text().splitlines(keepends=True)[:count] if path.exists() else []
    path.write_text("".join(lines))
