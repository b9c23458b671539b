"""The teacher writes: prompts in, ``{"prompt", "completion"}`` or ``{"messages"}`` lines out, as TRL reads them.

Beside them ``ended`` says whether the completion has an end of text, or was cut at max_length.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Callable

from transformers import set_seed

from ..teacher_cache import tokenizer_hash
from .data import Record, Sequences, kind_of, rendered
from .files import locked, write_whole
from .models import fingerprint, vocabulary
from .progress import bar, say
from .settings import SCRATCH, Settings, UserError, one_line
from .writing import continued, ends_of

#: What finished completions may differ in: they are draws of the same distribution.
DRAWN_BY = ("seed", "generation_batch_size")


def write_completions(
    settings: Settings, load: Callable[[], Any], tokenizer: Any, records: list[Record], packed: Sequences
) -> tuple[Path, float]:
    """A .jsonl of the teacher's completions, and the seconds that they took. It continues the file of a killed run, never
    overwrites one, and takes none that another teacher wrote."""
    options = settings.generation
    path = Path(options.completions or settings.output_dir / "completions.jsonl")
    part, beside = path.with_name(path.name + ".part"), path.with_suffix(".made.json")
    prompts = make_prompts(settings, records, tokenizer, packed)
    encoded = encode(settings, tokenizer, [text for _, text in prompts])
    made = made_of(settings, tokenizer, prompts)
    mine = settings.run.resume and options.completions is None
    with one_line(f"cannot write completions to {path}"):
        part.parent.mkdir(parents=True, exist_ok=True)
        seconds = seconds_of(made, path, part, beside, mine=mine)
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
            texts = complete(settings, teacher, tokenizer, encoded[first : first + size])
            for (given, _), (text, ended) in zip(prompts[first : first + size], texts):
                file.write(json.dumps(_line(given, text, ended)) + "\n")
            file.flush()
            seconds = time.perf_counter() - start
            write_whole(beside, json.dumps({**made, "seconds": seconds}))
        os.replace(part, path)
    return path, seconds


def made_of(settings: Settings, tokenizer: Any, prompts: list[tuple[Any, str]]) -> dict[str, Any]:
    """All that unfinished completions depend on; finished ones are good without ``DRAWN_BY``."""
    teacher, seed = str(settings.model.teacher), settings.run.seed
    return {
        "teacher": [teacher, seed] if teacher in SCRATCH else fingerprint(teacher, writes=True),
        "dtype": settings.model.dtype,
        "seed": seed,
        "tokenizer": tokenizer_hash(tokenizer),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "max_length": settings.data.max_length,
        "sampling_temperature": settings.generation.sampling_temperature,
        "generation_batch_size": settings.generation.generation_batch_size,
    }


def seconds_of(made: dict[str, Any], path: Path, part: Path, beside: Path, *, mine: bool) -> float:
    """What the completions that are there have taken. UserError if they were made of anything else.

    ``mine``: a run goes on with its own file, which has nothing ``beside`` it if an earlier version wrote it."""
    there = path if path.exists() else part
    if not there.exists() or there == part and not part.stat().st_size:
        write_whole(beside, json.dumps({**made, "seconds": 0.0}))
    elif not beside.exists():
        if mine:
            return 0.0
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
    """The text without the halves of a character that lie at the ends of cut tokens."""
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


def encode(settings: Settings, tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The tokens of every prompt. UserError if there are none, or if they leave no room in max_length."""
    length = settings.data.max_length
    prompts = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if (longest := max(map(len, prompts))) >= length:
        raise UserError(f"a prompt of {longest} tokens leaves no room in max_length={length}")
    if not all(prompts):
        raise UserError("a prompt has no tokens: there is nothing to continue; leave it out of --data")
    return prompts


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
