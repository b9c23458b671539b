"""What a model writes in ``train``: from its own distribution, every row by itself, and no end of text where none was written."""

import json
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from trainer_runs import options, with_opening  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: E402

from kdkernels.trainer import data, generate, models  # noqa: E402
from kdkernels.trainer.command_line import resolve  # noqa: E402
from kdkernels.trainer.errors import UserError  # noqa: E402
from kdkernels.trainer.writing import continued, ends_of  # noqa: E402

PROMPTS = [[5, 6, 7, 8, 9], [40], [12, 13]]
CHAT = generate.Prompt([{"role": "user", "content": "hi"}], "<user>hi")


@pytest.fixture
def model(saved):
    return AutoModelForCausalLM.from_pretrained(saved)


@pytest.fixture
def own(saved):
    """A tokenizer that a test may change."""
    return AutoTokenizer.from_pretrained(saved)


def write(model, tokenizer, prompts=PROMPTS, *, rooms=(6, 6, 6), temperature=0.0, vocab_size=300):
    torch.manual_seed(0)
    return continued(
        model, prompts, tokenizer, rooms=list(rooms), temperature=temperature, vocab_size=vocab_size
    )


def never_ends(model):
    """The model, whose lm_head gives the end of text (id 0) no chance."""
    head = torch.nn.Linear(*reversed(model.lm_head.weight.shape))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()[0] = -1e4
    model.lm_head = head
    return model


@pytest.mark.parametrize("positions", [2048, 11])
def test_rows_of_different_lengths_and_rooms_are_continued_as_each_alone(positions, model, own):
    """Greedily, which nothing random hides; where there are fewer positions, in several calls."""
    model.config.max_position_embeddings = positions
    rooms = (2, 9, 6)
    together = write(never_ends(model), own, rooms=rooms)
    for prompt, room, (ids, labels) in zip(PROMPTS, rooms, together):
        assert [(ids, labels)] == write(model, own, [prompt], rooms=[room])
        assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + room
        assert labels == [-100] * len(prompt) + ids[len(prompt) :]
    assert not model.training


def test_a_short_prompt_takes_a_long_one_past_no_position(own):
    config = transformers.GPT2Config(vocab_size=300, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    gpt2 = never_ends(transformers.GPT2LMHeadModel(config))
    rows = write(gpt2, own, rooms=[8 - len(prompt) for prompt in PROMPTS])
    assert [len(ids) for ids, _ in rows] == [8, 8, 8]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lora", [False, True])
def test_the_models_own_defaults_do_not_shape_what_it_writes(lora, temperature, model, own):
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    plain = write(model, own, temperature=temperature)
    defaults = {"top_p": 0.1, "top_k": 1, "typical_p": 0.1, "temperature": 0.1, "repetition_penalty": 50.0}
    defaults |= {"no_repeat_ngram_size": 1, "suppress_tokens": [plain[0][0][-1]], "min_new_tokens": 5}
    given = GenerationConfig(do_sample=True, **defaults)
    writer = model.get_base_model() if lora else model
    writer.generation_config = given
    assert write(model, own, temperature=temperature) == plain
    assert writer.generation_config is given


def test_a_text_ends_where_a_chat_models_turn_does(model, own):
    own.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn = own.convert_tokens_to_ids("<turn>")
    model.generation_config.eos_token_id = [own.eos_token_id, turn, 7]  # 7: an id of a text's own
    assert ends_of(model, own) == [own.eos_token_id, turn]
    model.generation_config.eos_token_id = None
    assert ends_of(model, own) == [own.eos_token_id]


def test_a_model_whose_config_is_nested(own):
    text = dict(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config={**text, **heads}, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    gemma = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        gemma.get_input_embeddings().weight[300:] = gemma.get_input_embeddings().weight.sum(0)
    rows = write(gemma, own, temperature=1.0)
    assert all(token < 300 for ids, _ in rows for token in ids)


# -- the teacher's text as data ----------------------------------------------------------------------


def settings(tmp_path, **values):
    return resolve("hard", options(tmp_path, **values))


def read_back(path, lines, tokenizer):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data.sequences(data.read(data.DataSettings(data=[str(path)])), tokenizer, 64).rows


@pytest.mark.parametrize("ends", [False, True])
def test_only_a_completion_that_ended_is_taught_an_end_of_text(ends, tmp_path, model, own):
    model = never_ends(model)
    if ends:
        with torch.no_grad():
            model.lm_head.bias[0] = 1e4
    prompts = [generate.Prompt(text, text) for text in ("def f(x):", "a")]
    asked = settings(tmp_path)
    said = generate.complete(asked, model, own, generate.encode(asked, own, prompts))
    assert [ended for _, ended in said] == [ends, ends]
    lines = [prompt.line(*each) for prompt, each in zip(prompts, said)]
    rows = read_back(tmp_path / "c.jsonl", lines, own)
    assert [own.eos_token_id in labels for _, labels in rows] == [ends, ends]
    assert ends or all(len(ids) > 20 for ids, _ in rows)  # up to max_length 32, whatever the other's prompt


def test_a_chat_that_was_cut_is_not_closed(tmp_path, own):
    own.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    lines = [CHAT.line("there ", ended) for ended in (True, False)]
    learnt = [
        own.decode([token for token in labels if token >= 0])
        for _, labels in read_back(tmp_path / "c.jsonl", lines, own)
    ]
    assert learnt == ["there" + own.eos_token, "there"]


#: A template that opens an answer with more than its prompt has, and one that keeps no reasoning.
THINKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BY_LENGTH = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.content | length }}{% endfor %}"


@pytest.mark.parametrize(
    "template, said, learnt",
    [
        (FORGETS, "e", "e"),
        (FORGETS, "<", "<"),
        (FORGETS, "<think>a</think> the cat", "the cat"),
        (FORGETS, "<think>a</think> ", None),
        (THINKS, "t", "<think></think>t"),
        (THINKS, " e\n", "<think></think> e\n"),
        (THINKS, "", None),
    ],
)
def test_of_a_cut_chat_nothing_is_learnt_that_closes_it(template, said, learnt, tmp_path, own):
    """However short its text is, and whatever the template makes of it."""
    own.chat_template = template
    rows = read_back(tmp_path / "c.jsonl", [CHAT.line(said, False)], own)
    texts = [own.decode([token for token in labels if token >= 0]) for _, labels in rows]
    assert texts == ([] if learnt is None else [learnt])


def test_a_template_whose_end_of_a_cut_chat_is_unknown(tmp_path, own):
    own.chat_template = BY_LENGTH
    line = CHAT.line("there", False)
    with pytest.raises(UserError, match="line 1 was cut, and this chat template closes a message by what it"):
        read_back(tmp_path / "c.jsonl", [line], own)


def test_cut_completions_without_any_text_are_left_out(tmp_path, own, capsys):
    x = generate.Prompt("x", "x")
    lines = [x.line("", False), x.line("y", True)]
    assert len(read_back(tmp_path / "c.jsonl", lines, own)) == 1
    assert "1 of 2 completions are cut, with no text left" in capsys.readouterr().out


def test_a_padded_teacher_writes_tokens_alone(tmp_path, model, own):
    model.resize_token_embeddings(320)
    with torch.no_grad():
        model.get_output_embeddings().weight[300:] = 9.0
    asked = settings(tmp_path)
    said = generate.complete(
        asked, model, own, generate.encode(asked, own, [generate.Prompt("", "def f(x):")] * 4)
    )
    assert all(text for text, _ in said)


def wrote(folder, tokenizer, *, texts=None, **values):
    """(the lines of a shared file, the seconds that they took, whether a teacher was loaded) of a run in ``folder``."""
    completions = str(folder.parent / "c.jsonl")
    asked = settings(folder, **{"generation_batch_size": 2, "completions": completions, **values})
    loaded = []

    def load():
        loaded.append(True)
        return models.load_model("micro", tokenizer, dtype="float32", seed=1, max_length=32)

    packed = data.Sequences([([40 + i] * 20, []) for i in range(5)])
    records = [{"prompt": text, "completion": ""} for text in texts] if texts else [{"text": ""}]
    path, seconds = generate.write_completions(asked, load, tokenizer, records, packed)
    return path.read_text().splitlines(), seconds, bool(loaded)


def test_completions_are_written_once(tmp_path, own):
    """And, killed, go on as they would have; their time is that of all parts."""
    lines, seconds, loaded = wrote(tmp_path / "a", own)
    assert len(lines) == 5 and seconds > 0 and loaded
    assert wrote(tmp_path / "b", own) == (lines, seconds, False)
    (tmp_path / "c.jsonl").unlink()
    (tmp_path / "c.jsonl.part").write_text("\n".join([*lines[:3], lines[3][:9]]))
    made = tmp_path / "c.made.json"
    made.write_text(json.dumps(json.loads(made.read_text()) | {"seconds": 100.0}))
    again, seconds, loaded = wrote(tmp_path / "c", own)
    assert again == lines and seconds > 100 and loaded


@pytest.mark.parametrize("bad, says", [("", "a prompt has no tokens"), ("a" * 99, "leaves no room in max_")])
def test_prompts_are_checked_before_any_is_continued(bad, says, tmp_path, own):
    """So that nothing of theirs is in the way once the last one is mended."""
    with pytest.raises(UserError, match=says):
        wrote(tmp_path / "a", own, texts=["a", "b", "c", bad])
    assert len(wrote(tmp_path / "a", own, texts=["a", "b", "c"])[0]) == 3


def test_what_was_not_begun_may_be_asked_for_otherwise(tmp_path, own, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(
            models, "load_model", lambda *_, **__: (_ for _ in ()).throw(UserError("no such model"))
        )
        wrote(tmp_path / "a", own)
    assert len(wrote(tmp_path / "a", own, sampling_temperature=0.5)[0]) == 5


@pytest.mark.parametrize(
    "values, says",
    [
        ({"teacher": "tiny"}, "another teacher"),
        ({"seed": 7}, "another teacher"),  # its weights are drawn
        ({"dtype": "bfloat16", "max_length": 31}, "another dtype and another max_length"),
        ({"prompt_tokens": 3}, "other prompts"),
        ({"sampling_temperature": 0.5}, "another sampling_temperature"),
    ],
)
def test_completions_of_another_teacher_are_not_taken(values, says, tmp_path, own):
    wrote(tmp_path / "a", own)
    with pytest.raises(UserError, match=f"c.jsonl was written with {says}; delete it, or choose other"):
        wrote(tmp_path / "b", own, **values)
    (tmp_path / "c.made.json").unlink()
    with pytest.raises(UserError, match="c.jsonl is there, but not c.made.json.* learn it as --data"):
        wrote(tmp_path / "a", own)


@pytest.mark.parametrize("values", [{"seed": 7}, {"generation_batch_size": 3}])
def test_finished_completions_are_taken_whatever_drew_them(values, tmp_path, own, saved):
    lines, seconds, _ = wrote(tmp_path / "a", own, teacher=str(saved))
    assert wrote(tmp_path / "b", own, teacher=str(saved), **values) == (lines, seconds, False)
    (tmp_path / "c.jsonl").rename(tmp_path / "c.jsonl.part")
    (name,) = values
    with pytest.raises(UserError, match=f"c.jsonl.part was written with another {name}; delete it"):
        wrote(tmp_path / "b", own, teacher=str(saved), **values)


def test_a_fingerprint_is_of_what_a_model_is(tmp_path, saved):
    folder = shutil.copytree(saved, tmp_path / "model")

    def now():
        return models.fingerprint(str(folder)), models.fingerprint(str(folder), writes=True)

    before = now()
    for name in ("training_args.bin", "optimizer.bin", "trainer_state.json"):
        (folder / name).write_text("of a checkpoint")
    assert now() == before
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert now()[0] == before[0] and now()[1] != before[1]
    for name in ("adapter_config.json", "adapter_model.bin", "pytorch_model-1.bin", "model-2.safetensors"):
        known = now()
        (folder / name).write_text("of the model")
        assert not set(now()) & set(known)


def test_prompts_have_whole_characters(tmp_path, own):
    """A byte-level token may be a part of one; a sequence that has no whole one gives no prompt."""
    asked = settings(tmp_path, prompt_tokens=4, max_length=7)
    packed = data.sequences([{"text": "ab日本語日本語日本語"}], own, 7)
    prompts = generate.make_prompts(asked, [{"text": ""}], own, packed)
    assert prompts and all(each.given == each.text and "�" not in each.text for each in prompts)
    assert all(each.text for each in prompts)
    with pytest.raises(UserError, match="prompt_tokens=1: no training sequence begins with a whole"):
        asked.generation.prompt_tokens = 1
        generate.make_prompts(asked, [{"text": ""}], own, data.Sequences(packed.rows[1:2]))


def test_the_teacher_reads_prompts_as_they_are_learnt(tmp_path, saved):
    """What the tokenizer puts before a text is put before those it continues, once, and not into what is written."""
    own = with_opening(saved)
    own.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    asked = settings(tmp_path, prompt_tokens=4, max_length=16)
    packed = data.sequences([{"text": "import math, os, sys"}, {"text": "def f(x): return x"}], own, 16)
    prompts = generate.make_prompts(asked, [{"text": ""}], own, packed)
    assert packed.rows[0][0][:1] == data.opening(own) and not prompts[0].text.startswith("<bos>")
    encoded = generate.encode(asked, own, prompts)
    assert encoded[0] == packed.rows[0][0][:4]
    written = read_back(tmp_path / "c.jsonl", [each.line(" y", True) for each in prompts], own)
    assert [ids[: len(prompt)] for (ids, _), prompt in zip(written, encoded)] == encoded
    chat = generate._prompt({"messages": [{"role": "user", "content": "x"}], "where": ""}, own)
    assert own.bos_token_id not in generate.encode(asked, own, [chat])[0]


def test_completions_of_another_opening_are_not_taken(tmp_path, saved, own):
    """The vocabulary is the same: only what is put before a text differs."""
    one, other = with_opening(saved), with_opening(saved)
    other.backend_tokenizer.post_processor = own.backend_tokenizer.post_processor
    assert data.opening(other) == []
    wrote(tmp_path / "a", one)
    with pytest.raises(UserError, match="c.jsonl was written with other prompts"):
        wrote(tmp_path / "b", other)


def test_what_is_beside_messages_is_written_back(tmp_path, own):
    """So that reading a completion again renders the prompt that the teacher has continued."""
    own.chat_template = (
        "{{ tools | tojson }}{{ mood }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    beside = {"tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "calm"}}
    record = {"messages": [{"role": "user", "content": "x"}], "where": "here", "ended": True, **beside}
    prompt = generate._prompt(record, own)
    assert prompt.text == '[{"name": "f"}]calm<user>x<assistant>'
    line = prompt.line("y", True)
    assert {name: line[name] for name in beside} == beside
    ((ids, _),) = read_back(tmp_path / "c.jsonl", [line], own)
    assert own.decode(ids) == prompt.text + "y"


def test_a_vocabulary_goes_to_its_largest_id(own):
    gaps = Tokenizer(WordLevel({"a": 0, "b": 900}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=gaps, eos_token="a", pad_token="a")
    assert len(tokenizer) < 900 and models.vocabulary(tokenizer) == 901
    made = models.load_model("micro", tokenizer, dtype="float32", seed=0, max_length=32)
    assert made.get_output_embeddings().weight.shape[0] == 901
