"""``python -m kdkernels train``: the text that it reads, and the sequences that it makes of it."""

import json

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_runs import error_of, options, run, with_opening  # noqa: E402

from kdkernels.trainer import data, models, train  # noqa: E402
from kdkernels.trainer.command_line import resolve  # noqa: E402
from kdkernels.trainer.errors import UserError  # noqa: E402
from kdkernels.trainer.settings import DataSettings  # noqa: E402


def read(folder, *rows, **options):
    """The records of a .jsonl with these rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.read(DataSettings(data=[str(path)], **options))


def test_every_format_is_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "b.jsonl").write_text('{"text": "beta"}\n\n{"text": "gamma"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["delta"]}), tmp_path / "c.parquet")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "e.c").write_text("epsilon")
    (tmp_path / "d" / "f.bin").write_bytes(b"\xff\xfe\x00")
    names = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.parquet", "d")]
    texts = [record["text"] for record in data.read(DataSettings(data=names))]
    assert texts == ["alpha", "beta", "gamma", "delta", "epsilon"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("alpha", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "beta"}\n', encoding="utf-8-sig")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.c").write_text("gamma", encoding="utf-8-sig")
    names = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c")]
    assert [record["text"] for record in data.read(DataSettings(data=names))] == ["alpha", "beta", "gamma"]


@pytest.mark.parametrize("field, kind", [("body", "text"), ("text", "messages"), ("other", "messages")])
def test_a_text_that_was_asked_for_by_name_is_taken_first(field, kind, tmp_path):
    messages = [{"role": "assistant", "content": "m"}]
    row = {"body": "b", "text": "t", "prompt": "p", "completion": "c", "messages": messages}
    (record,) = read(tmp_path, row, text_field=field)
    assert data.kind_of(record) == kind and record.get("text", "b") == "b"
    del row["messages"]
    (record,) = read(tmp_path, row, text_field=field)
    assert data.kind_of(record) == kind.replace("messages", "completions")


def test_packing_loses_nothing(tokenizer):
    texts = [{"text": "def f(x):\n    return x"}, {"text": "import math"}]
    rows = data.sequences(texts, tokenizer, 4).rows
    stream = [token for ids, _ in rows for token in ids]
    assert tokenizer.decode(stream) == "".join(r["text"] + tokenizer.eos_token for r in texts)


def test_a_text_begins_as_the_tokenizer_begins_it(saved, tokenizer, tmp_path):
    """And ends once. What a text says itself is not said twice."""
    own = with_opening(saved)
    bos, end = own.bos_token_id, own.eos_token_id
    assert data.opening(own) == [bos] and data.opening(tokenizer) == []
    said = ["def f", "<bos>def f", f"def f{own.eos_token}"]
    plain = own("def f", add_special_tokens=False)["input_ids"]
    ((ids, labels),) = data.sequences([{"text": text} for text in said], own, 64).rows
    assert ids == labels == [bos, *plain, end] * 3
    prompt, completion = plain[:-1], plain[-1:]
    rows = [("def", " f"), ("<bos>def", f" f{own.eos_token}"), ("", "def f")]
    lines = read(tmp_path, *({"prompt": a, "completion": b} for a, b in rows))
    short = [bos, *prompt, *completion, end], [-100] * (1 + len(prompt)) + [*completion, end]
    assert data.sequences(lines, own, 64).rows == [short, short, ([bos, *plain, end], [-100, *plain, end])]
    own.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chat = read(tmp_path, {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]})
    ((ids, _),) = data.sequences(chat, own, 64).rows
    assert own.decode(ids) == "<user>x<assistant>x"  # as the template writes it


def test_validation_is_spread_over_the_held_out_text():
    rows = [([i, i], [i, i]) for i in range(10)]
    assert [ids[0] for ids, _ in data.limited(data.Sequences(rows), 4).rows] == [0, 2, 5, 7]
    assert data.limited(data.Sequences(rows), 10).rows == rows


def test_of_a_single_text_the_end_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    settings = DataSettings(data=[str(tmp_path / "a.txt")], validation_share=0.05)
    training, validation = data.split(data.read(settings), settings)
    assert training == [{"text": "0123456789" * 9 + "01234"}] and validation == [{"text": "56789"}]


def test_messages_through_the_chat_template(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = type(tokenizer).from_pretrained(_saved(tokenizer))
    tokenizer.chat_template = template
    ((ids, labels),) = data.sequences(read(tmp_path, {"messages": messages}), tokenizer, 64).rows
    learnt = [token for token in labels if token >= 0]
    assert tokenizer.decode(learnt) == "there" + tokenizer.eos_token
    assert (
        tokenizer.decode(ids) == "<user>hi" + tokenizer.eos_token + "<assistant>there" + tokenizer.eos_token
    )


#: A template that shows all that it is given.
GIVEN = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_a_template_is_given_the_rows_tools_and_options(tools, pair, tokenizer, tmp_path):
    """TRL's columns; tools may be JSON, for which .parquet needs no schema."""
    tokenizer = type(tokenizer).from_pretrained(_saved(tokenizer))
    tokenizer.chat_template = GIVEN
    user, answer = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    messages = {"prompt": [user], "completion": [answer]} if pair else {"messages": [user, answer]}
    row = {**messages, "tools": tools, "chat_template_kwargs": {"mood": "calm"}}
    for ended, closed in ((True, "<end>"), (False, "")):
        ((ids, labels),) = data.sequences(read(tmp_path, {**row, "ended": ended}), tokenizer, 256).rows
        before = json.dumps(TOOLS) + "calm<user>x<end><assistant>"
        assert tokenizer.decode(ids) == f"{before}x{closed}"
        assert tokenizer.decode([token for token in labels if token >= 0]) == f"x{closed}"


@pytest.mark.parametrize(
    "beside, says",
    [
        ({"tools": "{"}, "tools are neither a list nor JSON"),
        ({"tools": {"f": 1}}, "tools must be a list, got dict"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a mapping, got list"),
        ({"chat_template_kwargs": {"tokenize": True}}, "takes no such messages: .*tokenize"),
    ],
)
def test_what_no_template_can_be_given(beside, says, tmp_path, tokenizer):
    tokenizer = type(tokenizer).from_pretrained(_saved(tokenizer))
    tokenizer.chat_template = GIVEN
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages, **beside}) + "\n")
    with pytest.raises(UserError, match=f"c.jsonl line 1: .*{says}"):
        data.sequences(data.read(DataSettings(data=[str(tmp_path / "c.jsonl")])), tokenizer, 64)


@pytest.mark.parametrize("name", ["b/rows.jsonl", "rows.parquet"])
def test_rows_in_a_folder_are_not_learnt_as_text(name, tmp_path, capsys):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "a.txt").write_text("text")
    for hidden in (".git", "__pycache__"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / path.name).write_text("{}")
    assert data.read(DataSettings(data=[str(tmp_path)])) == [{"text": "text"}]
    path.write_text('{"text": "x"}')
    assert data.read(DataSettings(data=[str(tmp_path)])) == [{"text": "text"}]
    said = f"{tmp_path}: 1 files hold rows and not text, and are left out: to learn them, give the files themselves"
    assert f"{said}, --data {path}" in capsys.readouterr().out
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=f"no text in {tmp_path}"):
        data.read(DataSettings(data=[str(tmp_path)]))


def _saved(tokenizer):
    import tempfile

    folder = tempfile.mkdtemp()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "record",
    [
        "null",
        "[]",
        '{"prompt": null, "completion": "x"}',
        '{"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}',
        '{"messages": ["hi"]}',
        '{"messages": [{"role": "user"}]}',
        '{"text": 5}',
    ],
)
def test_records_of_another_shape(record, tmp_path):
    (tmp_path / "a.jsonl").write_text(record + "\n")
    with pytest.raises(UserError, match="a.jsonl line 1 has neither a text 'text' nor messages nor a prompt"):
        data.read(DataSettings(data=[str(tmp_path / "a.jsonl")]))


def test_half_a_character_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(UserError, match="a.jsonl line 2: .* surrogates not allowed"):
        data.read(DataSettings(data=[str(tmp_path / "a.jsonl")]))


@pytest.mark.parametrize(
    "roles, message",
    [
        (["assistant"], "c.jsonl line 1 has no message before the assistant's"),
        (["user", "user"], "line 1: the last message must be the assistant's"),
        (
            ["user", "user", "assistant"],
            "line 1: the chat template takes no such messages: one after another",
        ),
    ],
)
def test_conversations_that_a_template_does_not_take(roles, message, tmp_path, tokenizer):
    tokenizer = type(tokenizer).from_pretrained(_saved(tokenizer))
    tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('one after another') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]}) + "\n")
    with pytest.raises(UserError, match=message):
        data.sequences(data.read(DataSettings(data=[str(path)])), tokenizer, 64)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "a b c", "completion": ""}, None),
        ({"prompt": "", "completion": ""}, "a sequence needs 2 or more"),
        ({"prompt": "word " * 99, "completion": "x"}, "leaves no room"),
        (
            {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant")]},
            "no chat template",
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, "c.jsonl line 1: the last message must be"),
    ],
)
def test_completion_errors(record, message, tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text(json.dumps(record) + "\n")
    values = {
        "teacher": None,
        "data": [str(tmp_path / "c.jsonl")],
        "eval_strategy": "no",
        "validation_share": 0.0,
    }
    if message:
        assert message in error_of(capsys, "hard", tmp_path, **values)
    else:
        train.run(resolve("hard", options(tmp_path / "run", **values)))


@pytest.mark.parametrize(
    "config, positions",
    [
        (transformers.GPT2Config(n_positions=64), 64),
        (transformers.LlamaConfig(max_position_embeddings=64), 64),
        (
            transformers.LlamaConfig(
                max_position_embeddings=64,
                rope_parameters={
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            ),
            256,
        ),
        (
            transformers.LlamaConfig(
                max_position_embeddings=64,
                rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            ),
            128,
        ),
        (
            transformers.LlamaConfig(
                max_position_embeddings=128,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            ),
            128,
        ),
        (transformers.Gemma3TextConfig(max_position_embeddings=64), 64),
        (transformers.BloomConfig(), None),
    ],
)
def test_positions_of(config, positions):
    assert models.positions_of(config) == positions


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_more_tokens_than_positions_is_one_line(which, tmp_path, capsys, tokenizer):
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=31, n_embd=16, n_layer=1, n_head=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    values = {which: str(tmp_path / "gpt2")}
    for mode in ("soft", "co", "hard", "compare"):
        message = error_of(capsys, mode, tmp_path, **values)
        assert (
            message
            == f"error: --max_length 32 is more than the 31 positions of {tmp_path / 'gpt2'}: give 31 or less"
        )
    run("soft", tmp_path / "fits", max_length=31, max_steps=1, **values)
