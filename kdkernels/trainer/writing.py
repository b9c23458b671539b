"""A model writes: prompts in, the same rows with what it wrote after them out."""

from __future__ import annotations

from typing import Any

import torch

from .data import IGNORE

Row = tuple[list[int], list[int]]  #: token ids, and labels: IGNORE where nothing is to be said


def sampling(temperature: float) -> dict[str, Any]:
    """generate()'s options; temperature 0 is greedy."""
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0}


def continued(
    model: Any, prompts: list[list[int]], tokenizer: Any, *, new_tokens: int, temperature: float
) -> list[Row]:
    """Every prompt with what ``model`` writes after it, up to and with its end of text; only that has labels.

    Prompts of different lengths are padded on the left here, and rows come back without padding.
    """
    width, pad, end = max(map(len, prompts)), tokenizer.pad_token_id, tokenizer.eos_token_id
    padding = list(range(len(tokenizer), model.config.vocab_size))  # rows of the lm_head that are no token
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    live = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=live.to(model.device),
            max_new_tokens=new_tokens,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=end,
            suppress_tokens=padding or None,
            **sampling(temperature),
        )
    model.train(was_training)
    return [_row(prompt, new, end) for prompt, new in zip(prompts, made[:, width:].tolist())]


def _row(prompt: list[int], new: list[int], end: int) -> Row:
    new = new[: new.index(end) + 1] if end in new else new
    return [*prompt, *new], [IGNORE] * len(prompt) + new
