"""``python -m kdkernels train``: the text that it reads, and the sequences that it makes of it."""

import json

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_runs import error_of, options, run  # noqa: E402

from kdkernels.trainer import data, models, train  # noqa: E402
from kdkernels.trainer.command_line import resolve  # noqa: E402
from kdkernels.trainer.settings import DataSettings, UserError  # noqa: E402


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


def test_packing_loses_nothing(tokenizer):
    texts = [{"text": "def f(x):\n    return x"}, {"text": "import math"}]
    rows = data.sequences(texts, tokenizer, 4).rows
    stream = [token for ids, _ in rows for token in ids]
    assert tokenizer.decode(stream) == "".join(r["text"] + tokenizer.eos_token for r in texts)


def test_validation_is_spread_over_the_held_out_text():
    rows = [([i, i], [i, i]) for i in range(10)]
    assert [ids[0] for ids, _ in data.limited(data.Sequences(rows), 4).rows] == [0, 2, 5, 7]
    assert data.limited(data.Sequences(rows), 10).rows == rows


def test_of_a_single_text_the_end_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    settings = DataSettings(data=[str(tmp_path / "a.txt")], validation_share=0.05)
    training, validation = data.split(data.read(settings), settings)
    assert training == [{"text": "0123456789" * 9 + "01234"}] and validation == [{"text": "56789"}]


def test_messages_through_the_chat_template(tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = type(tokenizer).from_pretrained(_saved(tokenizer))
    tokenizer.chat_template = template
    record = data._record({"messages": messages}, "text", "here")
    ((ids, labels),) = data.sequences([record], tokenizer, 64).rows
    learnt = [token for token in labels if token >= 0]
    assert tokenizer.decode(learnt) == "there" + tokenizer.eos_token
    assert (
        tokenizer.decode(ids) == "<user>hi" + tokenizer.eos_token + "<assistant>there" + tokenizer.eos_token
    )


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
