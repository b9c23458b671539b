"""``python -m kdkernels train``: each mode for a few steps, its data, its errors."""

import json
import logging
import math
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import yaml  # noqa: E402
from trainer_runs import PACKAGE, ROOT, WRITES, assert_same_weights, options, weights  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import kdkernels as kd  # noqa: E402
from kdkernels.__main__ import main  # noqa: E402
from kdkernels.trainer import data, models, progress, train  # noqa: E402
from kdkernels.trainer.codistill import SoftWeight  # noqa: E402
from kdkernels.trainer.reliable import ReliableTrainer, checkpoints, read_metrics  # noqa: E402
from kdkernels.trainer.settings import SCRATCH, DataSettings, Problem, parse, parser_for, resolve  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return models.train_tokenizer((path.read_text() for path in sorted(ROOT.glob("kdkernels/*.py"))), 300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """A folder with a micro model and its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    models.load_model("micro", tokenizer, dtype="float32", seed=5, max_length=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(mode, folder, **values):
    return train.run(resolve(mode, options(folder, **values)))


def start_weights(name, folder, seed):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return models.load_model(name, tokenizer, dtype="float32", seed=seed, max_length=32).state_dict()


# -- the modes --------------------------------------------------------------------------------------


def test_soft(tmp_path):
    result = run("soft", tmp_path, divergence="jsd:0.5", temperature=2.0, hard_weight=0.5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    moved = max(
        (p - start_weights("micro", tmp_path / "model", 42)[n]).abs().max()
        for n, p in model.named_parameters()
    )
    assert moved > 1e-4 and result["steps"] == 4 and result["tokens"] == 4 * 4 * 32
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert {
        "loss",
        "soft",
        "hard",
        "student_entropy",
        "teacher_entropy",
        "agreement",
        "tokens_per_second",
        "peak_memory_gib",
    } <= lines[1].keys()
    assert lines[1]["loss"] == pytest.approx(lines[1]["soft"] + 0.5 * lines[1]["hard"], rel=1e-4)
    assert any("eval_kl" in line for line in lines)
    again = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert again["mode"] == "soft" and again["divergence"] == "jsd:0.5" and again["learning_rate"] == 1e-3
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_hard_writes_completions_and_learns_only_them(tmp_path, monkeypatch):
    seen = []
    original = ReliableTrainer.training_step
    monkeypatch.setattr(
        ReliableTrainer,
        "training_step",
        lambda self, model, inputs, n=None: (seen.append(inputs), original(self, model, inputs, n))[1],
    )
    run("hard", tmp_path, sampling_temperature=0.7, **WRITES)
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all(
        line.keys() == {"prompt", "completion"} and line["prompt"] for line in lines
    )
    masked = (seen[0]["labels"][:, :3] == -100).float().mean()
    assert masked > 0.5 and (seen[0]["labels"] >= 0).any()
    assert "hard" in read_metrics(tmp_path / "metrics.jsonl")[0]


def test_hard_takes_text_from_elsewhere(tmp_path):
    path = tmp_path / "elsewhere.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}) + "\n" for i in range(40))
    )
    run("hard", tmp_path / "run", teacher=None, data=[str(path)])
    assert not (tmp_path / "run" / "completions.jsonl").exists()


def test_co_trains_and_keeps_both_models(tmp_path):
    result = run("co", tmp_path, soft_schedule="teacher_loss", teacher_learning_rate=2e-2)
    for part, seed in (("student", 42), ("teacher", 43)):
        for folder in (tmp_path / "model" / part, tmp_path / "checkpoint-4" / part):
            model = AutoModelForCausalLM.from_pretrained(folder)
            start = start_weights("micro", folder, seed)
            assert all((p - start[n]).abs().max() > 1e-4 for n, p in model.named_parameters() if p.dim() > 1)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    # Four steps are too few for the teacher's loss to be below log(vocab) after each of them.
    weights = [line["soft_weight"] for line in lines]
    assert weights[0] == 0 and max(weights) > 0.01
    for weight, line in zip(
        weights[1:], lines
    ):  # the loss that it stands for: a weight near 0 is a difference
        loss = pytest.approx(min(line["teacher_hard"], math.log(300)), rel=2 * torch.finfo(torch.float32).eps)
        assert (1 - weight) * math.log(300) == loss
    last = lines[-1]
    assert last["loss"] == pytest.approx(
        last["hard"] + last["soft_weight"] * last["soft"] + last["teacher_hard"], rel=1e-4
    )
    assert result["eval_teacher_hard"] > 0


def test_co_is_two_trainings_when_nothing_is_shared(tmp_path):
    """With no soft term, student and teacher end where each would have ended alone."""
    co = run("co", tmp_path / "co", soft_schedule="constant", soft_weight=0.0, student="micro", seed=42)
    run("hard", tmp_path / "alone", teacher=None, tokenizer=str(tmp_path / "co" / "tokenizer"))
    together, alone = weights(tmp_path / "co" / "model" / "student"), weights(tmp_path / "alone" / "model")
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name.replace("model/", "student/", 1)], tensor, rtol=0, atol=1e-6)
    assert co["eval_hard"] > 0


def test_co_logs_kl_at_temperature_1(tmp_path):
    """Before the first update both runs have the same models."""
    kl = []
    for name, soft in (("plain", {}), ("other", {"divergence": "jsd:0.5", "temperature": 2.0})):
        run("co", tmp_path / name, max_steps=1, eval_strategy="no", save_strategy="no", **soft)
        first = read_metrics(tmp_path / name / "metrics.jsonl")[0]
        kl.append(first["kl"])
        assert (first["kl"] == first["soft"]) == (name == "plain")
    assert kl[0] > 1e-3 and kl[1] == pytest.approx(kl[0], rel=1e-5)


def test_co_takes_trainers_options_for_one_model(tmp_path, capsys):
    """Recomputed activations change no bit; the best checkpoint (here: the highest loss) is of both models."""
    run("co", tmp_path / "plain", eval_steps=2)
    run(
        "co",
        tmp_path / "other",
        eval_steps=2,
        gradient_checkpointing=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    losses = [
        line["eval_loss"]
        for line in read_metrics(tmp_path / "other" / "metrics.jsonl")
        if "eval_loss" in line
    ]
    assert losses[0] > losses[1] and losses[2] == losses[0]
    for part in ("student", "teacher"):
        best = weights(tmp_path / "plain" / "checkpoint-2" / part)
        assert_same_weights(weights(tmp_path / "other" / "model" / part), best)
    assert "co has no neftune_noise_alpha" in error_of(capsys, "co", tmp_path, neftune_noise_alpha=5.0)


def test_lora_begins_with_the_seed_alone(tmp_path, saved):
    """A run that is killed before its first checkpoint begins anew, and must come to the same."""
    pytest.importorskip("peft")
    given = train.ingredients(
        resolve("soft", options(tmp_path, student=str(saved), teacher=str(saved), lora_rank=2))
    )
    torch.manual_seed(1)
    ours = given.student().state_dict()
    torch.manual_seed(2)
    theirs = given.student().state_dict()
    assert any("lora_A" in name and tensor.any() for name, tensor in ours.items())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("report_to", ["tensorboard", "wandb"])
def test_metrics_reach_transformers_reports(report_to, tmp_path, monkeypatch):
    package = pytest.importorskip(report_to)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged = set()
    if report_to == "wandb":
        original = package.sdk.wandb_run.Run.log
        monkeypatch.setattr(
            package.sdk.wandb_run.Run,
            "log",
            lambda self, data, *a, **k: (logged.update(data), original(self, data, *a, **k))[1],
        )
    run("co", tmp_path / "run", report_to=[report_to])
    if report_to == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (tmp_path / "run" / "runs").iterdir()
        events = EventAccumulator(str(folder))
        events.Reload()
        logged = set(events.Tags()["scalars"])
    else:
        package.finish()
    ours = {
        "loss",
        "soft",
        "hard",
        "kl",
        "student_entropy",
        "teacher_entropy",
        "agreement",
        "teacher_hard",
        "soft_weight",
        "tokens_per_second",
        "peak_memory_gib",
    }
    assert {f"train/{name}" for name in ours} | {"eval/kl", "eval/hard", "eval/agreement"} <= logged


def test_lora_student(tmp_path, saved):
    pytest.importorskip("peft")
    run(
        "soft",
        tmp_path,
        student=str(saved),
        teacher=str(saved),
        lora_rank=2,
        lora_modules=["q_proj", "lm_head"],
    )
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_padded_vocabularies_are_cut_to_the_tokenizer(tmp_path, saved, tokenizer):
    padded = AutoModelForCausalLM.from_pretrained(saved)
    padded.resize_token_embeddings(320)
    with torch.no_grad():
        padded.get_output_embeddings().weight[300:] = 9.0  # would swamp the softmax
    padded.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    result = run(
        "soft", tmp_path / "run", student=str(saved), teacher=str(tmp_path / "padded"), learning_rate=0.0
    )
    assert result["eval_kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("constant", [0.8, 0.8, 0.8]),
        ("linear", [0.2, 0.5, 0.8]),
        ("cosine", [0.2, 0.5, 0.8]),
        ("warmup_stable_decay", [0.2, 0.8, 0.2]),
    ],
)
def test_soft_weight(kind, expected):
    schedule = SoftWeight(kind, peak=0.8, start=0.2, warmup=0.25)
    assert [schedule.at(step, 100) for step in (0, 50, 100)] == pytest.approx(expected)


def test_soft_weight_follows_the_teacher():
    schedule = SoftWeight("teacher_loss", peak=0.5)
    assert schedule.at(9, 10, teacher_loss=None, vocab=100) == 0
    assert schedule.at(9, 10, teacher_loss=math.log(100), vocab=100) == 0
    assert schedule.at(9, 10, teacher_loss=0.0, vocab=100) == 0.5


# -- what a run says --------------------------------------------------------------------------------


def test_a_run_says_what_it_does_and_what_came_of_it(tmp_path, capsys):
    result = run("soft", tmp_path, resume=True)
    said = capsys.readouterr().out
    given = train.ingredients(resolve("soft", options(tmp_path)))
    tokens = sum(len(ids) for ids, _ in given.train.rows)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "model").parameters())
    for part in (
        f"nothing to resume in {tmp_path}: a new run begins",
        f"{len(given.records):,} documents in {len(given.train):,} sequences of {tokens:,} tokens",
        f"student micro: {parameters:,} parameters\n",
        f"teacher micro: {parameters:,} parameters\n",
        f"backend {kd.explain(torch.ones(1, 2)).splitlines()[-1].split(':')[0]}",
        f"4 steps of 4 sequences, in {tmp_path}",
        f"step 4, {result['tokens']:,} tokens; it took {result['seconds']:.0f} s",
        f"kl {result['eval_kl']:.4g}",
        f"the model is in {tmp_path / 'model'}",
    ):
        assert part in said, part
    run("soft", tmp_path, resume=True)
    said = capsys.readouterr().out
    assert f"going on from {tmp_path / 'checkpoint-4'}" in said and "nothing to resume" not in said


def test_hard_without_a_teacher_says_what_it_learns(tmp_path, capsys):
    run("hard", tmp_path / "text", teacher=None, max_steps=1)
    assert "no teacher: the student learns the text itself, by cross entropy" in capsys.readouterr().out
    (tmp_path / "c.jsonl").write_text('{"prompt": "a b c", "completion": "d"}\n' * 20)
    run("hard", tmp_path / "written", teacher=None, max_steps=1, data=[str(tmp_path / "c.jsonl")])
    assert "the student learns the completions in --data" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_are_lines_where_no_terminal_shows_them(terminal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 1e-9)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal)
    run("hard", tmp_path, disable_tqdm=False, **WRITES)
    error = capsys.readouterr().err
    assert ("\r" in error) == terminal
    if not terminal:
        lines = [line for line in error.splitlines() if " of " in line]
        assert any(line.startswith("teacher writes: 1 of 1 batches (100%)") for line in lines)
        assert any(line.startswith("training: 2 of 4 steps (50%)") for line in lines)
        assert any(line.startswith("training: 4 of 4 steps (100%)") and "loss=" in line for line in lines)
        assert any(line.startswith("evaluating: ") for line in lines)


def test_a_short_run_has_no_lines(tmp_path, capsys):
    run("soft", tmp_path, disable_tqdm=False, max_steps=1)
    assert "training:" not in capsys.readouterr().err


def test_resuming_tied_models_warns_of_nothing_but_what_is_missing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for mode in ("soft", "co"):
        run(mode, tmp_path / mode, max_steps=2, save_steps=2)
        run(mode, tmp_path / mode, max_steps=2, save_steps=2, resume=True)
    assert not [record for record in caplog.records if "missing keys" in record.message]
    trainer = train.build(resolve("soft", options(tmp_path / "other")))
    for missing in (["lm_head.weight", "model.norm.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        caplog.clear()
        trainer._issue_warnings_after_load(torch.nn.modules.module._IncompatibleKeys(missing, []))
        assert missing[1] in caplog.records[0].message
        assert ("lm_head.weight" in caplog.records[0].message) == (
            "embed" in missing[1]
        )  # its other half is missing too


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_saved_config_keeps_use_cache(use_cache, tmp_path, saved):
    shutil.copytree(saved, tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(saved)
    config.use_cache = use_cache
    config.save_pretrained(tmp_path / "m")
    run("co", tmp_path / "run", student=str(tmp_path / "m"), teacher=str(tmp_path / "m"), max_steps=1)
    for part in ("student", "teacher"):
        written = json.loads((tmp_path / "run" / "model" / part / "config.json").read_text())
        assert written["use_cache"] is use_cache


# -- data -------------------------------------------------------------------------------------------


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
    ((ids, labels),) = data.sequences([{"messages": messages}], tokenizer, 64).rows
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


# -- errors: one line, exit 1, nothing lost ---------------------------------------------------------


def error_of(capsys, mode, folder, **values):
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(options(folder / "run", **values)))
    with pytest.raises(SystemExit) as caught:
        main(["train", mode, "--config", str(path)])
    assert not (folder / "run" / "config.yaml").exists() or (folder / "run" / "model").exists()
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code  # printed, and exit status 1
    return caught.value.code


@pytest.mark.parametrize(
    "values, message",
    [
        ({"student": "no/such/model"}, "no model no/such/model"),
        ({"student": "{tmp}"}, "cannot load model"),
        ({"tokenizer": "{tmp}"}, "cannot load tokenizer"),
        ({"tokenizer": "no/such/model"}, "no tokenizer no/such/model"),
        ({"data": ["{tmp}/nothing.txt"]}, "no data"),
        ({"data": ["{tmp}/empty.jsonl"]}, "no text in"),
        ({"data": ["{tmp}/empty_texts.jsonl"]}, "no text in"),
        ({"data": ["{tmp}/short.txt"], "validation_share": 0.9}, "no sequence of 2 or more tokens"),
        ({"data": ["{tmp}/keys.jsonl"]}, "line 1 has neither a text 'text'"),
        ({"data": ["{tmp}/torn.jsonl"]}, "cannot read"),
        ({"divergence": "kl"}, "unknown divergence 'kl'"),
        ({"divergence": "jsd:7"}, "divergence 'jsd:7'"),
        ({"no_such_option": 1}, "unknown options no_such_option"),
        ({"fsdp": True}, "fsdp only works in distributed"),
        ({"output_dir": None}, "no --output_dir"),
        ({"output_dir": "{tmp}/short.txt"}, "cannot write to --output_dir"),
        ({"targets": "{tmp}", "teacher": None}, "is no teacher cache"),
        ({"lora_modules": ["nope"], "lora_rank": 2}, "Target modules {'nope'} not found"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 9999}, "a batch takes 9999"),
        ({"seed": -1}, "Seed must be between 0"),
        ({"report_to": ["x"]}, "x is not supported"),
        (
            {"load_best_model_at_end": True, "eval_steps": 2, "validation_share": 0.0},
            "the best checkpoint needs text to be judged by",
        ),
        ({"learning_rate": 1e-3, "optim": "galore_adamw"}, "optim=galore_adamw, optim_args=None: "),
        ({"lr_scheduler_kwargs": {"nope": 1}}, "lr_scheduler_kwargs={'nope': 1}: "),
    ],
)
def test_error(values, message, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty_texts.jsonl").write_text('{"text": ""}\n' * 3)
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "keys.jsonl").write_text('{"words": "x"}\n')
    (tmp_path / "torn.jsonl").write_text('{"text": "x\n')
    fill = lambda value: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value  # noqa: E731
    values = {
        n: [fill(v) for v in value] if isinstance(value, list) else fill(value) for n, value in values.items()
    }
    assert message in error_of(capsys, "soft", tmp_path, **values)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "a b c", "completion": ""}, None),
        ({"prompt": "", "completion": ""}, "a sequence needs 2 or more"),
        ({"prompt": "word " * 99, "completion": "x"}, "leaves no room"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no chat template"),
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
    "mode, values, message",
    [
        *(
            ("soft", {name: 0}, f"{name}=0 must be 1 or more")
            for name in (
                "per_device_train_batch_size",
                "per_device_eval_batch_size",
                "gradient_accumulation_steps",
                "eval_accumulation_steps",
                "validation_sequences",
            )
        ),
        *(
            ("hard", {name: 0}, f"{name}=0 must be 1 or more")
            for name in ("prompts", "prompt_tokens", "generation_batch_size")
        ),
        *(
            ("co", {name: value}, f"{name}={value} must be 0 or more")
            for value in (-1.0, math.nan, math.inf)
            for name in (
                "learning_rate",
                "teacher_learning_rate",
                "soft_weight",
                "hard_weight",
                "soft_weight_start",
                "weight_decay",
                "max_grad_norm",
                "neftune_noise_alpha",
            )
        ),
        *(
            ("soft", {"temperature": value}, f"temperature={value} must be above 0")
            for value in (0.0, -1.0, math.inf)
        ),
        *(
            (
                "soft",
                {f"{what}_steps": -1.0},
                f"{what}_steps=-1.0 must be above 0; --{what}_strategy no for never",
            )
            for what in ("logging", "eval", "save")
        ),
        ("soft", {"logging_steps": 0}, "requires non-zero --logging_steps"),
        ("soft", {"max_steps": 0}, "max_steps=0 must be 1 or more, or -1"),
        ("soft", {"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0.0 must be above 0"),
        ("soft", {"max_length": 1}, "needs 2 tokens or more"),
        ("soft", {"tokenizer_size": 10}, "256 bytes and the end of text"),
        ("soft", {"validation_share": 1.0}, "is no share from 0 to below 1"),
        ("co", {"soft_warmup": 0.6}, "is no share from 0 to 0.5"),
        ("soft", {"save_total_limit": -1}, "save_total_limit=-1 must be 0 or more"),
        ("soft", {"lora_rank": -1}, "lora_rank=-1 must be 0 or more"),
        ("soft", {"lora_modules": ["q_proj"]}, "give --lora_rank too"),
        ("soft", {"dataloader_num_workers": -1}, "dataloader_num_workers=-1 must be 0 or more"),
        ("hard", {"sampling_temperature": -1.0}, "sampling_temperature=-1.0 must be 0 or more"),
        ("soft", {"teacher": None}, "soft needs a --teacher, or --targets that"),
        ("co", {"teacher": None}, "co needs a --teacher"),
        ("compare", {"teacher": None}, "compare needs a --teacher"),
        ("soft", {"targets": "x"}, "--teacher or --targets, not both"),
        ("soft", {"use_cache": True}, "use_cache=True: the loss needs no cache"),
        ("soft", {"soft_weight": 0}, "the student would learn nothing"),
        ("co", {"soft_weight": 0, "hard_weight": 0}, "the student would learn nothing"),
        ("soft", {"use_liger_kernel": True}, "use_liger_kernel=True: Liger's kernels need a GPU"),
        ("soft", {"torch_compile_backend": "eager"}, "torch_compile: the loss runs inside"),
        ("soft", {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: it needs logits"),
        ("soft", {"resume_from_checkpoint": "x"}, "resume_from_checkpoint=x: --resume goes on from"),
        ("soft", {"do_eval": True}, "evaluates by --eval_strategy"),
        ("soft", {"dtype": "float16"}, "dtype=float16: there are"),
        ("soft", {"divergence": "jsd:x"}, "divergence 'jsd:x'"),
        ("soft", {"lr_scheduler_type": "x"}, "x is not a valid SchedulerType"),
        ("soft", {"deepspeed": "/no/such.json"}, "/no/such.json"),
        ("soft", {"accelerator_config": "/no/such.json"}, "/no/such.json"),
        # what another mode has
        (
            "soft",
            {"soft_schedule": "cosine"},
            "soft_schedule=cosine: soft has none, it is of co, compare; leave it out",
        ),
        ("hard", {"temperature": 2.0}, "temperature=2.0: hard has none, it is of soft, co, compare"),
        ("co", {"prompts": 3}, "prompts=3: co has none, it is of hard, compare"),
        ("compare", {"targets": "x"}, "targets=x: compare has none, it is of soft"),
        ("soft", {"teacher_steps": 3}, "teacher_steps=3: soft has none, it is of compare"),
        ("hard", {"completions": "x.jsonl", "teacher": None}, "no --teacher writes them"),
        ("hard", {"completions": "x.txt"}, "the name must end in .jsonl"),
        # YAML of other types
        ("soft", {"temperature": [1, 2]}, "temperature=[1, 2]: one value, not a list"),
        ("soft", {"max_length": None}, "max_length is null; leave it out for its default, 512"),
        ("soft", {"data": None}, "data is null"),
        ("soft", {"divergence": {"jsd": 0.5}}, "unknown divergence"),
        ("soft", {"config": "x", "help": True, "nope": 1}, "unknown options config, help, nope"),
        ("soft", {"mode": "co"}, "is of another mode than soft"),
    ],
)
def test_settings_that_cannot_be(mode, values, message, tmp_path):
    """Refused before anything is read or written."""
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(options(tmp_path / "run", **values)))
    with pytest.raises(Problem) as caught:
        parse(mode, ["--config", str(path)])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["settings.yaml"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_steps", 2.5),
        ("max_length", 32.0),
        ("max_steps", "many"),
        ("seed", True),
        ("temperature", True),
        ("temperature_squared", "perhaps"),
        ("learning_rate", "fast"),
        ("optim", "nope"),
    ],
)
def test_a_value_of_another_type(name, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        resolve("soft", options(tmp_path, **{name: value}))
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and f"--{name}" in error and str(value) in error


@pytest.mark.parametrize("text", [b"a: [1", b"just text", b"5: 3", b"\x00", b"student: \xe9", None])
def test_a_config_that_cannot_be_read(text, tmp_path):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(Problem, match="--config .*config.yaml"):
        parse("soft", ["--config", str(path)])


def test_yaml_may_name_one_of_a_list(tmp_path):
    values = options(
        tmp_path, data=str(PACKAGE), lora_modules="q_proj", lora_rank=2, report_to="none", eval_steps=None
    )
    settings = resolve("soft", values)
    assert settings.data.data == [str(PACKAGE)] and settings.model.lora_modules == ["q_proj"]
    assert settings.run.report_to == [] and settings.asked["eval_steps"] is None


def test_what_the_command_line_does_not_know():
    with pytest.raises(Problem, match="unknown options --nope 1; see --help_all"):
        parse("soft", ["--output_dir", "x", "--nope", "1"])


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
    with pytest.raises(Problem, match="a.jsonl line 1 has neither a text 'text' nor messages nor a prompt"):
        data.read(DataSettings(data=[str(tmp_path / "a.jsonl")]))


def test_an_unknown_metric_names_those_there_are(tmp_path):
    with pytest.raises(
        Problem, match="metric_for_best_model=nope: evaluation gives .*eval_hard.*no checkpoint yet"
    ):
        run(
            "soft",
            tmp_path,
            load_best_model_at_end=True,
            metric_for_best_model="nope",
            save_steps=1,
            eval_steps=1,
        )


def test_a_report_that_cannot_begin(tmp_path, capsys, monkeypatch):
    def on_train_begin(self, *arguments, **options):
        raise RuntimeError("No API key configured.\nLong advice")

    monkeypatch.setattr(train.MetricsFile, "on_train_begin", on_train_begin)
    assert "cannot begin: No API key configured." in error_of(capsys, "soft", tmp_path)
    monkeypatch.undo()
    run("soft", tmp_path / "run", max_steps=1)  # what could not begin does not stand in the way


def test_half_a_tokenizer_is_never_used(tmp_path, capsys, monkeypatch):
    def save_pretrained(self, folder, **options):
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{")
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save_pretrained)
        message = error_of(capsys, "soft", tmp_path)
        assert "cannot write" in message and "No space left on device" in message
    run("soft", tmp_path / "run", max_steps=1)


def test_a_teacher_in_shards_does_not_write(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "is_deepspeed_zero3_enabled", lambda: True)
    assert "give that run's completions.jsonl as --data" in error_of(capsys, "hard", tmp_path)


def test_compare_needs_text_to_validate_on(tmp_path, capsys):
    assert "--validation_share above 0" in error_of(capsys, "compare", tmp_path, validation_share=0.0)


def test_tokenizer_mismatch(tmp_path, saved, capsys):
    other = models.train_tokenizer(["something else entirely " * 20], 280)
    models.load_model("micro", other, dtype="float32", seed=0, max_length=32).save_pretrained(
        tmp_path / "other"
    )
    other.save_pretrained(tmp_path / "other")
    message = error_of(capsys, "soft", tmp_path, student=str(saved), teacher=str(tmp_path / "other"))
    assert "tokenizer mismatch" in message and "300 tokens" in message


def test_a_run_is_never_overwritten(tmp_path, capsys):
    run("soft", tmp_path / "run", max_steps=2)
    before = weights(tmp_path / "run" / "model")
    assert "already holds a run" in error_of(capsys, "soft", tmp_path, max_steps=2)
    message = error_of(capsys, "soft", tmp_path, max_steps=2, resume=True, temperature=2.0)
    assert "temperature 1.0, now 2.0" in message
    assert weights(tmp_path / "run" / "model").keys() == before.keys()


@pytest.mark.parametrize("mode", ["soft", "co"])
def test_a_run_that_has_all_its_steps_takes_no_more(mode, tmp_path):
    """Killed after its last checkpoint, while it evaluates or writes the model, a run resumes with no step left."""
    run(mode, tmp_path)
    before = weights(tmp_path / "model")
    result = run(mode, tmp_path, resume=True)
    assert_same_weights(weights(tmp_path / "model"), before)
    assert result["steps"] == 4 and [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_every_token_masked(tmp_path, monkeypatch):
    collate = data.Collator.__call__

    def masked(self, rows):
        return {**collate(self, rows), "labels": torch.full((len(rows), 32), -100)}

    monkeypatch.setattr(data.Collator, "__call__", masked)
    with pytest.raises(Problem, match="step 1: every token of the batch is masked"):
        run("soft", tmp_path, eval_strategy="no")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_batch(tmp_path, monkeypatch):
    original = ReliableTrainer.batch_loss

    def loss(self, *arguments):
        value = original(self, *arguments)
        return value * float("nan") if self.state.global_step == 2 else value

    monkeypatch.setattr(ReliableTrainer, "batch_loss", loss)
    with pytest.raises(Problem, match="step 3: loss is nan.*last good one is .*checkpoint-2"):
        run("soft", tmp_path)
    kept = torch.load(tmp_path / "non-finite-step-3-rank-0.pt")
    assert kept["input_ids"].shape == (4, 32)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "checkpoint-2").values())


@pytest.mark.parametrize(
    "line", [["--fsdp"], ["--fsdp", "true"], ["--fsdp=True"], ["--fsdp", "--output_dir", "x"]]
)
def test_fsdp_needs_no_value(line):
    assert parser_for("co").parse_known_args(["--output_dir", "y", *line])[0].fsdp is True
    assert parser_for("co").parse_known_args(["--output_dir", "y"])[0].fsdp is None
    assert parser_for("co").parse_known_args(["--output_dir", "y", "--fsdp", "false"])[0].fsdp is False


def test_an_unknown_mode_has_an_error_line(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "sofft"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "error: argument MODE: invalid choice: 'sofft'" in error
    with pytest.raises(SystemExit) as caught:
        main(["train"])
    assert caught.value.code == 0 and "together, one codistillation_loss per step" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "verify", "train", "cache"])
def test_an_unknown_backend_in_the_environment_is_one_line(command, monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "bogus")
    with pytest.raises(SystemExit) as caught:
        main([command])
    assert caught.value.code.startswith("error: KDKERNELS_BACKEND: unknown backend 'bogus'; there are ")
    assert "\n" not in caught.value.code


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


def test_a_machine_without_an_accelerator_trains_on_its_cpu(tmp_path):
    """Told so: else accelerate takes each process of torchrun for the only one."""
    values = options(tmp_path)
    del values["use_cpu"]
    assert resolve("soft", values).run.use_cpu != torch.accelerator.is_available()
    assert resolve("soft", values).to_dict()["use_cpu"] is False  # as asked: the run may go on elsewhere


def test_help_is_short_and_names_the_options(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("soft", ["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and len(text.splitlines()) < 130
    assert "--divergence" in text and "--learning_rate" in text and "--push_to_hub" not in text
    assert "--soft_warmup" not in text and "--prompts" not in text  # of other modes


def test_yaml_then_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("teacher: micro\nlearning_rate: 2e-4\ntemperature: 3\noutput_dir: a\n")
    settings = parse("soft", ["--config", str(path), "--temperature", "1.5"])
    assert settings.run.learning_rate == 2e-4 and settings.loss.temperature == 1.5
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    assert parse("soft", ["--config", str(tmp_path / "again.yaml")]).to_dict() == settings.to_dict()
    assert set(SCRATCH) == {"micro", "tiny", "small"}
