"""The teacher writes: prompts in, ``{"prompt", "completion"}`` or ``{"messages"}`` lines out, as TRL reads them.

Beside them ``ended`` says whether the completion has an end of text, or was cut at max_length.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from transformers import set_seed

from ..teacher_cache import tokenizer_hash
from .chat import BESIDE, rendered
from .data import Record, Sequences, encoded, kind_of, opened, opening
from .errors import UserError, one_line
from .files import locked, write_whole
from .models import fingerprint, vocabulary
from .progress import bar, say
from .settings import SCRATCH, Settings
from .writing import continued, ends_of

#: What finished completions may differ in: they are draws of the same distribution.
DRAWN_BY = ("seed", "generation_batch_size")


@dataclass(frozen=True)
class Prompt:
    """What the teacher continues."""

    given: Any  #: a text, or messages
    text: str  #: the same as the teacher reads it
    beside: dict[str, Any] = field(default_factory=dict)  #: what the chat template is given beside messages

    @property
    def plain(self) -> bool:
        return isinstance(self.given, str)

    def line(self, completion: str, ended: bool) -> dict[str, Any]:
        """The prompt with its completion, as it is read again."""
        if self.plain:
            return {"prompt": self.given, "completion": completion, "ended": ended}
        said = {"role": "assistant", "content": completion}
        return {"messages": [*self.given, said], **self.beside, "ended": ended}


def write_completions(
    settings: Settings, load: Callable[[], Any], tokenizer: Any, records: list[Record], packed: Sequences
) -> tuple[Path, float]:
    """A .jsonl of the teacher's completions, and the seconds that they took. It continues the file of a killed run, never
    overwrites one, and takes none that another teacher wrote."""
    options = settings.generation
    path = Path(options.completions or settings.output_dir / "completions.jsonl")
    part, beside = path.with_name(path.name + ".part"), path.with_suffix(".made.json")
    prompts = make_prompts(settings, records, tokenizer, packed)
    ids = encode(settings, tokenizer, prompts)
    made = made_of(settings, tokenizer, prompts)
    with one_line(f"cannot write completions to {path}"):
        part.parent.mkdir(parents=True, exist_ok=True)
        seconds = seconds_of(made, path, part, beside)
        if path.exists():
            say(f"reusing the completions in {path}")
            return path, seconds
        part.touch()
    size = options.generation_batch_size
    with locked(part, f"another process is writing {path}; wait for it"), part.open("r+") as file:
        lines = [line for line in file if line.endswith("\n")]
        done = len(lines) - len(lines) % size  # whole batches: a batch's seed is its number
        file.seek(0)
        file.writelines(lines[:done])
        file.truncate()
        teacher, start = load().to(settings.run.device).eval(), time.perf_counter() - seconds
        for first in bar(
            iterable=range(done, len(prompts), size),
            desc="teacher writes",
            initial=done // size,
            total=-(-len(prompts) // size),
            unit=" batches",
            disable=settings.run.disable_tqdm,
        ):
            set_seed(settings.run.seed + first)
            texts = complete(settings, teacher, tokenizer, ids[first : first + size])
            for prompt, said in zip(prompts[first : first + size], texts):
                file.write(json.dumps(prompt.line(*said)) + "\n")
            file.flush()
            seconds = time.perf_counter() - start
            write_whole(beside, json.dumps({**made, "seconds": seconds}))
        os.replace(part, path)
    return path, seconds


def made_of(settings: Settings, tokenizer: Any, prompts: list[Prompt]) -> dict[str, Any]:
    """All that unfinished completions depend on; finished ones are good without ``DRAWN_BY``."""
    teacher, seed = str(settings.model.teacher), settings.run.seed
    read = [*((prompt.given, prompt.text) for prompt in prompts), *opening(tokenizer)]
    return {
        "teacher": [teacher, seed] if teacher in SCRATCH else fingerprint(teacher, writes=True),
        "dtype": settings.model.dtype,
        "seed": seed,
        "tokenizer": tokenizer_hash(tokenizer),
        "prompts": hashlib.sha256(json.dumps(read).encode()).hexdigest(),
        "max_length": settings.data.max_length,
        "sampling_temperature": settings.generation.sampling_temperature,
        "generation_batch_size": settings.generation.generation_batch_size,
    }


def seconds_of(made: dict[str, Any], path: Path, part: Path, beside: Path) -> float:
    """What the completions that are there have taken. UserError if they were made of anything else."""
    there = path if path.exists() else part
    if not there.exists() or there == part and not part.stat().st_size:
        write_whole(beside, json.dumps({**made, "seconds": 0.0}))
    elif not beside.exists():
        instead = "learn it as --data without --teacher" if there == path else "delete it"
        raise UserError(
            f"{there} is there, but not {beside.name}, which says what wrote it: {instead}, or choose other "
            "--completions"
        )
    recorded = json.loads(beside.read_text())
    compared = made.keys() - (DRAWN_BY if there == path else ())
    changed = [name for name, value in made.items() if name in compared and recorded.get(name) != value]
    if changed:
        others = " and ".join("other prompts" if name == "prompts" else f"another {name}" for name in changed)
        raise UserError(f"{there} was written with {others}; delete it, or choose other --completions")
    return recorded["seconds"]


def make_prompts(
    settings: Settings, records: list[Record], tokenizer: Any, packed: Sequences
) -> list[Prompt]:
    """The data's prompts, or the beginnings of its texts."""
    count = settings.generation.prompts
    if kind_of(records[0]) != "text":
        return [_prompt(record, tokenizer) for record in records[:count]]
    length = settings.generation.prompt_tokens
    if length >= settings.data.max_length:
        raise UserError(f"prompt_tokens={length} leaves no room in max_length={settings.data.max_length}")
    start = opening(tokenizer)
    heads = [ids[:length] for ids, _ in packed.rows[:count]]
    # Without the opening, which encode puts before every text.
    heads = [ids[len(start) :] if ids[: len(start)] == start else ids for ids in heads]
    texts = [_whole_characters(tokenizer.decode(ids)) for ids in heads]
    if not any(texts):
        raise UserError(
            f"prompt_tokens={length}: no training sequence begins with a whole character; give more"
        )
    return [Prompt(text, text) for text in texts if text]


def _whole_characters(text: str) -> str:
    """The text without the halves of a character that lie at the ends of cut tokens."""
    return text.strip("\N{REPLACEMENT CHARACTER}")


def _prompt(record: Record, tokenizer: Any) -> Prompt:
    given = record["messages"] if kind_of(record) == "messages" else record["prompt"]
    if isinstance(given, str):
        return Prompt(given, given)
    if given and given[-1]["role"] == "assistant":
        given = given[:-1]
    text = rendered(given, record, tokenizer, add_generation_prompt=True)
    return Prompt(given, text, {name: record[name] for name in BESIDE if name in record})


def encode(settings: Settings, tokenizer: Any, prompts: list[Prompt]) -> list[list[int]]:
    """The tokens of every prompt, as data.sequences has them when the completion is learnt. UserError if there are none, or
    if they leave no room in max_length."""
    length, start = settings.data.max_length, opening(tokenizer)
    texts = encoded([prompt.text for prompt in prompts], tokenizer)
    rows = [opened(ids, start) if prompt.plain else ids for prompt, ids in zip(prompts, texts)]
    if (longest := max(map(len, rows))) >= length:
        raise UserError(f"a prompt of {longest} tokens leaves no room in max_length={length}")
    if not all(rows):
        raise UserError("a prompt has no tokens: there is nothing to continue; leave it out of --data")
    return rows


def complete(
    settings: Settings, teacher: Any, tokenizer: Any, prompts: list[list[int]]
) -> list[tuple[str, bool]]:
    """What ``teacher`` writes after each prompt, and whether it came to an end of text within max_length."""
    rows = continued(
        teacher,
        prompts,
        tokenizer,
        rooms=[settings.data.max_length - len(prompt) for prompt in prompts],
        temperature=settings.generation.sampling_temperature,
        vocab_size=vocabulary(tokenizer),
    )
    ends = ends_of(teacher, tokenizer)
    said = []
    for prompt, (ids, _) in zip(prompts, rows):
        text, ended = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True), ids[-1] in ends
        said.append((text if ended else _whole_characters(text), ended))
    return said
