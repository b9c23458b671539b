"""A model writes: prompts in, the same rows with what it wrote after them out."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

import torch
from transformers import GenerationConfig

from .data import IGNORE
from .models import positions_of

Row = tuple[list[int], list[int]]  #: token ids, and labels: IGNORE where nothing is to be said


def continued(
    model: Any,
    prompts: list[list[int]],
    tokenizer: Any,
    *,
    rooms: list[int],
    temperature: float,
    vocab_size: int,
) -> list[Row]:
    """Every prompt with what ``model`` writes after it, up to and with its end of text; only that has labels.

    A prompt has at most its own of the ``rooms`` tokens, whatever the others have. Temperature 0 is greedy. Else tokens are
    drawn from the model's own distribution over the first ``vocab_size`` ids.
    """
    writer = model.get_base_model() if hasattr(model, "get_base_model") else model  # LoRA is in its layers
    ends = ends_of(writer, tokenizer)
    rows, left = [list(prompt) for prompt in prompts], list(rooms)
    was_training = model.training
    model.eval()
    with torch.no_grad(), _no_defaults(writer):
        while live := [i for i, room in enumerate(left) if room]:
            config = GenerationConfig(
                max_new_tokens=_at_once(writer, [len(rows[i]) for i in live], [left[i] for i in live]),
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                suppress_tokens=list(range(vocab_size, writer.config.get_text_config().vocab_size)) or None,
                **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}),
            )
            for i, new in zip(live, _step(writer, [rows[i] for i in live], config)):
                new = new[: left[i]]
                rows[i] += new
                left[i] = 0 if new[-1] in ends else left[i] - len(new)
    model.train(was_training)
    return [(row, [IGNORE] * len(given) + row[len(given) :]) for given, row in zip(prompts, rows)]


def _at_once(model: Any, lengths: list[int], rooms: list[int]) -> int:
    """How many tokens rows are continued by in one call: the most that one has room for, if the model has positions for
    all to go so far; else the least, and the next call goes on without those that are full."""
    positions = positions_of(model.config.get_text_config())
    fits = positions is None or max(lengths) + max(rooms) <= positions
    return max(rooms) if fits else min(rooms)


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens after which nothing more is written: the tokenizer's end of text, and what else the model's generation
    config ends at (a chat's turn), if it is a special token."""
    own = model.generation_config.eos_token_id
    more = [own] if isinstance(own, int) else own or []
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [tokenizer.eos_token_id, *(set(more) & special - {tokenizer.eos_token_id})]


@contextlib.contextmanager
def _no_defaults(model: Any) -> Iterator[None]:
    """generate() takes what its own config leaves open (top_p, repetition_penalty, ...) from the model's."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _step(model: Any, rows: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """What is written after each row, up to and with an end. Rows of different lengths are padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor(
        [[config.pad_token_id] * (width - len(row)) + row for row in rows], device=model.device
    )
    live = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    made = model.generate(input_ids=ids, attention_mask=live, generation_config=config)
    return [_until_end(new, config.eos_token_id) for new in made[:, width:].tolist()]


def _until_end(new: list[int], ends: Any) -> list[int]:
    at = next((i for i, token in enumerate(new) if token in ends), len(new))
    return new[: at + 1]
