"""Text from files to sequences of tokens with labels."""

from __future__ import annotations

import json
import os
import random
import sysconfig
from pathlib import Path
from typing import Any, Iterator

import torch
from torch.utils.data import Dataset

from . import chat
from .errors import UserError, one_line
from .progress import say
from .settings import DataSettings

IGNORE = -100
ENCODING = "utf-8-sig"  #: UTF-8, without the mark that some editors put before a text
ROWS = (".jsonl", ".parquet")  #: suffixes of files whose rows are the documents
#: ``{"text"}``; or ``{"prompt", "completion"}`` or ``{"messages"}``, with "where" they were read, whether they "ended", and
#: what a chat template is given beside messages.
Record = dict[str, Any]


def read(settings: DataSettings) -> list[Record]:
    """Documents: texts, or prompts with completions or messages, as TRL reads them."""
    records = [record for name in settings.data for record in _read_one(name, settings.text_field)]
    if not any(record.get("text", True) for record in records):
        raise UserError(f"no text in {', '.join(settings.data)}")
    kinds = {kind_of(record) for record in records}
    if len(kinds) > 1:
        raise UserError(f"--data mixes {' and '.join(sorted(kinds))}; give one kind")
    return records


def check_apart(names: list[str], folder: str | Path, option: str) -> None:
    """UserError where ``folder`` lies in a folder of texts, which would be other texts once something is written."""
    inside = Path(os.path.realpath(folder))  # Path.resolve raises on a link to itself
    for source in (
        Path(os.path.realpath(name)) for name in names if name != "stdlib" and Path(name).is_dir()
    ):
        if inside.is_relative_to(source) and not _is_hidden(inside.relative_to(source)):
            raise UserError(
                f"{option} {folder} lies in --data {source}, and what is written there would be learnt; choose a folder "
                "outside of it, or one whose name begins with a dot"
            )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def kind_of(record: Record) -> str:
    return "text" if "text" in record else "messages" if "messages" in record else "completions"


def _read_one(name: str, text_field: str) -> Iterator[Record]:
    path = Path(sysconfig.get_paths()["stdlib"]) if name == "stdlib" else Path(name)
    if not path.exists():
        raise UserError(f"no data {path}: give a .txt, .jsonl or .parquet file, a folder, or stdlib")
    with one_line(f"cannot read {path}"):
        if path.is_dir():
            yield from _sources(path, stdlib=name == "stdlib")
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist()):
                yield _record(row, text_field, f"{path} row {i}")
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding=ENCODING).split("\n")  # splitlines splits at U+2028 too
            for i, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path} line {i}"
                    yield _record(_json(line, where), text_field, where)
        elif path.suffix == ".txt":
            yield {"text": path.read_text(encoding=ENCODING)}
        else:
            raise UserError(f"{path}: only .txt, .jsonl, .parquet and folders are read")


def _json(line: str, where: str) -> Any:
    with one_line(f"cannot read {where}"):
        row = json.loads(line)
        # An escape may stand for half a character, which is no text.
        json.dumps(row, ensure_ascii=False).encode()
        return row


def _sources(folder: Path, *, stdlib: bool) -> Iterator[Record]:
    """The text files of a folder in a fixed order; of the standard library the modules without their tests."""
    skip = {"test", "tests", "idle_test", "site-packages", "__pycache__"} if stdlib else {"__pycache__"}
    not_text, of_rows = 0, []
    for path in sorted(folder.rglob("*.py" if stdlib else "*")):
        inside = path.relative_to(folder)
        if path.is_file() and not skip & set(inside.parts) and not _is_hidden(inside):
            if path.suffix in ROWS:
                of_rows.append(path)
                continue
            try:
                yield {"text": path.read_text(encoding=ENCODING)}
            except UnicodeDecodeError:
                not_text += 1
    if not_text:
        say(f"{folder}: {not_text} files are not UTF-8 text and are left out")
    if of_rows:
        say(
            f"{folder}: {len(of_rows)} files hold rows and not text, and are left out: to learn them, give the files "
            f"themselves, --data {of_rows[0]}"
        )


def _record(row: Any, text_field: str, where: str) -> Record:
    if isinstance(row, dict):
        about = {"where": where, "ended": row.get("ended") is not False}
        others = DataSettings.text_field, "prompt", "completion", "messages"
        if text_field not in others and isinstance(row.get(text_field), str):
            return {"text": row[text_field]}  # it was asked for by name
        if chat.is_chat(row.get("messages")):
            return {"messages": row["messages"], **about, **chat.beside(row, where)}
        prompt, completion = row.get("prompt"), row.get("completion")
        if all(isinstance(part, str) for part in (prompt, completion)):
            return {"prompt": prompt, "completion": completion, **about}
        if chat.is_chat(prompt) and chat.is_chat(completion):
            return {"prompt": prompt, "completion": completion, **about, **chat.beside(row, where)}
        if isinstance(row.get(text_field), str):
            return {"text": row[text_field]}
    raise UserError(
        f"{where} has neither a text {text_field!r} nor messages nor a prompt and a completion, which are "
        "texts or lists of messages, {role, content}"
    )


def split(records: list[Record], settings: DataSettings) -> tuple[list[Record], list[Record]]:
    """(training, validation) documents. They are the same for every mode and seed, so that no teacher has seen what
    its student is validated on. Of a single text the end is held out."""
    if len(records) == 1 and kind_of(records[0]) == "text":
        text = records[0]["text"]
        end = round(len(text) * (1 - settings.validation_share))
        return [{"text": text[:end]}], [{"text": text[end:]}] if settings.validation_share else []
    order = list(records)
    random.Random(0).shuffle(order)
    held_out = round(len(order) * settings.validation_share)
    if settings.validation_share and len(order) > 1:
        held_out = max(held_out, 1)
    return order[held_out:], order[:held_out]


class Sequences(Dataset):
    """``{"input_ids", "labels"}`` lists; labels are aligned with input_ids, -100 where nothing is learnt."""

    def __init__(self, rows: list[tuple[list[int], list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids, labels = self.rows[index]
        return {"input_ids": ids, "labels": labels}

    def fingerprint(self) -> str:
        """A hash of ids and labels: another order or mask gives another one."""
        from ..teacher_cache import data_fingerprint

        return data_fingerprint((ids for ids, _ in self.rows), (labels for _, labels in self.rows))


def sequences(records: list[Record], tokenizer: Any, max_length: int) -> Sequences:
    """Documents as sequences of tokens. Text is packed; every completion is a sequence of its own."""
    if records and kind_of(records[0]) == "text":
        return Sequences(_packed(records, tokenizer, max_length))
    texts = [_prompt_and_completion(record, tokenizer) for record in records]
    ids = encoded([text for pair in texts for text in pair], tokenizer)
    start = opening(tokenizer)
    prompts = [opened(p, start) if _is_plain(record) else p for record, p in zip(records, ids[::2])]
    pairs = zip(records, prompts, ids[1::2])
    found = [_completion(*each, tokenizer.eos_token_id, max_length) for each in pairs]
    rows = [row for row in found if row is not None]
    if len(rows) < len(found):
        say(
            f"{len(found) - len(rows)} of {len(found)} completions are cut, with no text left: they are left out"
        )
    if cut := sum(was_cut for *_, was_cut in rows):
        say(f"{cut} of {len(rows)} completions are longer than --max_length {max_length} and end there")
    return Sequences([(ids, labels) for ids, labels, _ in rows])


def _packed(records: list[Record], tokenizer: Any, max_length: int) -> list[tuple[list[int], list[int]]]:
    texts = [record["text"] for record in records]
    start, end = opening(tokenizer), tokenizer.eos_token_id
    stream: list[int] = []
    for ids in encoded(texts, tokenizer):
        stream += _ended(opened(ids, start), end)
    blocks = [stream[i : i + max_length] for i in range(0, len(stream), max_length)]
    if blocks and len(blocks[-1]) < 2:
        blocks.pop()  # one token at the end predicts nothing
    return [(block, block) for block in blocks]


def opening(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text, such as Llama's <bos>; most put none there."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(at, 0)]


def opened(ids: list[int], start: list[int]) -> list[int]:
    """The ids of a text after those of its :func:`opening`, which it may have been written with."""
    return ids if ids[: len(start)] == start else [*start, *ids]


def _ended(ids: list[int], end: int) -> list[int]:
    return ids if ids[-1:] == [end] else [*ids, end]


def encoded(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The ids of each text, from one call: tokenizers spreads it over all cores. Nothing is put before or after it."""
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]


def _completion(
    record: Record, prompt: list[int], completion: list[int], end: int, max_length: int
) -> tuple[list[int], list[int], bool] | None:
    """(ids, labels, whether it was cut here). Only the completion's tokens and its end of text have labels; one that did
    not end has no end of text, and None says that nothing is left of it."""
    where = record["where"]
    if record["ended"] and _is_plain(record):
        completion = _ended(completion, end)
    if not completion and not record["ended"]:
        return None
    ids = prompt + completion
    if len(ids) < 2:
        raise UserError(f"{where} has {len(ids)} token(s): a sequence needs 2 or more")
    if len(prompt) >= max_length:
        raise UserError(
            f"{where}: its prompt of {len(prompt)} tokens leaves no room for a completion in "
            f"--max_length {max_length}"
        )
    labels = [IGNORE] * len(prompt) + completion
    if all(label == IGNORE for label in labels[1:]):
        raise UserError(f"{where} has an empty completion: every token is masked")
    return ids[:max_length], labels[:max_length], len(ids) > max_length


def _is_plain(record: Record) -> bool:
    """Two texts; else messages, whose template writes the end of text."""
    return kind_of(record) == "completions" and isinstance(record["prompt"], str)


def _prompt_and_completion(record: Record, tokenizer: Any) -> tuple[str, str]:
    if _is_plain(record):
        return record["prompt"], record["completion"]
    chats = kind_of(record) == "messages"
    messages = record["messages"] if chats else [*record["prompt"], *record["completion"]]
    return chat.prompt_and_completion(messages, record, tokenizer)


class Collator:
    """Pads on the right; padding carries no label."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), length), self.pad_token_id)
        labels = torch.full((len(rows), length), IGNORE)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[i, :size], labels[i, :size] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            mask[i, :size] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def texts_of(records: list[Record]) -> Iterator[str]:
    """All texts of the records, to train a tokenizer on."""
    for record in records:
        kind = kind_of(record)
        if kind == "text":
            yield record["text"]
        elif kind == "messages":
            yield from (str(message["content"] or "") for message in record["messages"])
        else:
            yield from (str(record["prompt"]), str(record["completion"]))


def check_trainable(dataset: Sequences, source: str) -> Sequences:
    if not len(dataset):
        raise UserError(f"no sequence of 2 or more tokens in {source}")
    return dataset


def limited(dataset: Sequences, count: int) -> Sequences:
    """At most ``count`` sequences, spread evenly: the first ones could all be of one document."""
    if len(dataset) <= count:
        return dataset
    return Sequences([dataset.rows[i * len(dataset) // count] for i in range(count)])
