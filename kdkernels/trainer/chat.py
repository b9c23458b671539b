"""Messages as the tokenizer's chat template has them."""

from __future__ import annotations

import json
from typing import Any

from .errors import UserError, one_line

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  #: where a chat template puts what a message says
#: Columns that a chat template is given beside the messages, as TRL gives them.
BESIDE: dict[str, type] = {"tools": list, "chat_template_kwargs": dict}


def is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in messages
    )


def beside(row: dict[str, Any], where: str) -> dict[str, Any]:
    """What of :data:`BESIDE` a row has. Its tools may be JSON in a string, as TRL takes them from .parquet."""
    given = {name: row.get(name) for name in BESIDE}
    if isinstance(given["tools"], str):
        with one_line(f"{where}: tools are neither a list nor JSON"):
            given["tools"] = json.loads(given["tools"])
    for name, value in given.items():
        if value is not None and not isinstance(value, BESIDE[name]):
            kind = "list" if BESIDE[name] is list else "mapping"
            raise UserError(f"{where}: {name} must be a {kind}, got {type(value).__name__}")
    return {name: value for name, value in given.items() if value}


def rendered(messages: list[dict[str, Any]], record: dict[str, Any], tokenizer: Any, **options: Any) -> str:
    """The ``record``'s messages, or some of them, as text."""
    where = record["where"]
    if tokenizer.chat_template is None:
        raise UserError(
            "the data holds messages, but the tokenizer has no chat template; give prompt and completion"
        )
    if not messages:
        raise UserError(f"{where} has no message before the assistant's: there is nothing to answer")
    own = {"tools": record.get("tools"), **record.get("chat_template_kwargs", {})}
    with one_line(f"{where}: the chat template takes no such messages"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options, **own)


def prompt_and_completion(
    messages: list[dict[str, Any]], record: dict[str, Any], tokenizer: Any
) -> tuple[str, str]:
    """The last message is the completion; what comes before it, the prompt. Both as the chat template has them."""
    where = record["where"]
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message must be the assistant's")
    prompt = rendered(messages[:-1], record, tokenizer, add_generation_prompt=True)
    whole = rendered(messages, record, tokenizer)
    if not whole.startswith(prompt):
        raise UserError(f"{where}: this chat template renders a prompt differently once it is answered")
    if record["ended"]:
        return prompt, whole[len(prompt) :]
    other = rendered([*messages[:-1], {**messages[-1], "content": MARK}], record, tokenizer)
    said = str(messages[-1]["content"])
    return prompt, _not_closed(whole[len(prompt) :], other[len(prompt) :], said, where)


def _not_closed(completion: str, other: str, said: str, where: str) -> str:
    """The completion without what the template closes a message with, whatever that says; "" if it says nothing.

    ``other``: the completion that says MARK instead of what was ``said``."""
    opening, mark, closing = other.rpartition(MARK)
    if not mark or not completion.endswith(closing):
        raise UserError(
            f"{where} was cut, and this chat template closes a message by what it says: leave it out"
        )
    text = completion[: len(completion) - len(closing)]
    nothing = text.strip() == opening.strip() or not said.strip()
    return "" if nothing else text
