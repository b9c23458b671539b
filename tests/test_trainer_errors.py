"""``python -m kdkernels train``: errors of a run: one line, exit status 1, nothing lost."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import huggingface_hub  # noqa: E402
import safetensors.torch  # noqa: E402
from trainer_runs import PACKAGE, error_of, flags, options, run, weights  # noqa: E402

from kdkernels.__main__ import main  # noqa: E402
from kdkernels.trainer import data, files, models, reliable, train  # noqa: E402
from kdkernels.trainer.command_line import resolve  # noqa: E402
from kdkernels.trainer.errors import UserError  # noqa: E402
from kdkernels.trainer.files import locked  # noqa: E402
from kdkernels.trainer.folder import begun_with, claimed  # noqa: E402
from kdkernels.trainer.reliable import ReliableTrainer  # noqa: E402
from kdkernels.trainer.settings import DataSettings, ModelSettings  # noqa: E402


@pytest.mark.parametrize(
    "values, message",
    [
        ({"student": "no/such/model"}, "no model no/such/model"),
        ({"student": "{tmp}"}, "cannot load model"),
        ({"tokenizer": "{tmp}"}, "brings no tokenizer"),
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
        ({"output_dir": "{tmp}/short.txt"}, "cannot use --output_dir"),
        ({"targets": "{tmp}", "teacher": None}, "is no teacher cache"),
        (
            {"lora_modules": ["nope"], "lora_rank": 2, "student": "{saved}"},
            "Target modules {'nope'} not found",
        ),
        ({"push_to_hub": True, "hub_model_id": "a/b"}, "push_to_hub=True cannot begin: "),
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
def test_error(values, message, tmp_path, saved, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty_texts.jsonl").write_text('{"text": ""}\n' * 3)
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "keys.jsonl").write_text('{"words": "x"}\n')
    (tmp_path / "torn.jsonl").write_text('{"text": "x\n')
    places = {"tmp": tmp_path, "saved": saved}
    fill = lambda value: value.format(**places) if isinstance(value, str) else value  # noqa: E731
    values = {
        n: [fill(v) for v in value] if isinstance(value, list) else fill(value) for n, value in values.items()
    }
    assert message in error_of(capsys, "soft", tmp_path, **values)


def test_an_unknown_metric_names_those_there_are(tmp_path):
    with pytest.raises(
        UserError, match="metric_for_best_model=nope: evaluation gives .*eval_hard.*no checkpoint yet"
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


def test_a_tokenizer_that_nothing_was_begun_with_is_not_used(tmp_path, capsys):
    """It may be of another size, or of other text."""
    (tmp_path / "text.txt").write_text("a" * 99)
    asked = {"max_steps": 1, "data": [str(tmp_path / "text.txt")]}
    assert "a batch takes 9999" in error_of(
        capsys, "soft", tmp_path, dataloader_drop_last=True, per_device_train_batch_size=9999, **asked
    )
    assert not (tmp_path / "run" / "tokenizer").exists()
    (tmp_path / "text.txt").write_text("some more text " * 99)
    run("soft", tmp_path / "run", **asked)
    trained = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes()
    for name in ("begun.json", "result.json", "checkpoint-1"):  # killed before it had begun
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (tmp_path / "text.txt").write_text("other words altogether " * 99)
    run("soft", tmp_path / "run", resume=True, **asked)
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes() != trained


def test_a_tokenizer_that_no_run_made_stays(tmp_path, tokenizer, saved, capsys):
    folder = tmp_path / "run" / "tokenizer"
    tokenizer.save_pretrained(folder)
    before = (folder / "tokenizer.json").read_bytes()
    for mode in ("soft", "compare"):
        assert "run holds tokenizer, but no " in error_of(capsys, mode, tmp_path)
        assert "the only batch" in error_of(
            capsys,
            "soft",
            tmp_path,
            tokenizer=str(folder),
            dataloader_drop_last=True,
            per_device_train_batch_size=9999,
        )
    assert (folder / "tokenizer.json").read_bytes() == before


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


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
def test_a_model_without_a_tokenizer_takes_the_one_that_is_given(kind, tmp_path, saved, capsys):
    """For a Qwen2 transformers would make one that knows no word."""
    bare = str(tmp_path / "bare")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = getattr(transformers, f"{kind}Config")(vocab_size=300, num_key_value_heads=2, **sizes)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(bare)
    for named in ({"student": bare}, {"teacher": bare}, {"student": bare, "teacher": str(saved)}):
        assert f"{bare} brings no tokenizer: give the one" in error_of(capsys, "soft", tmp_path, **named)
    run("soft", tmp_path / "ours", student=bare, teacher=str(saved), tokenizer=str(saved), max_steps=1)
    larger = models.train_tokenizer([path.read_text() for path in PACKAGE.glob("*.py")], 400)
    larger.save_pretrained(tmp_path / "larger")
    message = error_of(capsys, "soft", tmp_path, student=bare, tokenizer=str(tmp_path / "larger"))
    assert "bare has a vocabulary of 300, the tokenizer 400" in message


def test_weights_that_are_not_all_there_are_one_line(tmp_path, saved, tokenizer):
    """transformers would draw them at random, and say so in a warning."""
    folder = shutil.copytree(saved, tmp_path / "model")
    file = folder / "model.safetensors"
    whole = safetensors.torch.load_file(file)
    name, tied = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"

    def load(**changes):
        kept = {n: t for n, t in {**whole, **changes}.items() if t is not None}
        safetensors.torch.save_file(kept, file, metadata={"format": "pt"})
        return models.load_model(str(folder), tokenizer, dtype="float32", seed=0, max_length=32)

    for changes in ({name: None}, {name: whole[name][1:].clone()}):
        with pytest.raises(UserError, match=f"cannot load model {folder}: .*, {name}; give the whole model"):
            load(**changes)
    with pytest.raises(UserError, match=f"{tied} and 1 more; give the whole model"):
        load(**{name: None, tied: None})
    head = load(**{tied: None, "lm_head.weight": whole[tied]}).get_input_embeddings()  # the one is the other
    assert torch.equal(head.weight, whole[tied])


def test_models_that_tensor_parallelism_cannot_share_out(tmp_path, saved):
    transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        UserError, match=r"tensor_parallel=2: transformers' tp_plan for \S+ \(gpt2\) \S+.*leave it out$"
    ):
        models.load_model(
            str(tmp_path / "gpt2"), None, dtype="float32", seed=0, max_length=32, tensor_parallel=2
        )
    settings = ModelSettings(student=str(saved), teacher=str(tmp_path / "gpt2"), tensor_parallel=2)
    with pytest.raises(UserError, match=r"needs lm_heads of the same size.* has 300, \S+gpt2 has 50257$"):
        models.check_models(settings, 32)


def test_a_run_is_never_overwritten(tmp_path, capsys):
    run("soft", tmp_path / "run", max_steps=2)
    before = weights(tmp_path / "run" / "model")
    assert "already holds a run" in error_of(capsys, "soft", tmp_path, max_steps=2)
    message = error_of(capsys, "soft", tmp_path, max_steps=2, resume=True, temperature=2.0)
    assert "temperature 1.0, now 2.0" in message
    assert weights(tmp_path / "run" / "model").keys() == before.keys()


def test_a_run_does_not_go_on_with_other_text_or_processes(tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a line of some text"}\n' * 40)
    asked = {"data": [str(text)], "resume": True}
    run("soft", tmp_path / "run", **asked)
    begun = tmp_path / "run" / "begun.json"
    text.write_text('{"text": "a line of other text"}\n' * 40)
    with pytest.raises(UserError, match=f"begun on other text than --data {text} holds now"):
        run("soft", tmp_path / "run", **asked)
    text.write_text('{"text": "a line of some text"}\n' * 40)
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"processes": 2}))
    with pytest.raises(
        UserError, match="by 2 of torchrun's processes, and now there are 1: torchrun --nproc_per_node 2"
    ):
        run("soft", tmp_path / "run", **asked)


def test_two_processes_do_not_train_in_one_folder(tmp_path, capsys):
    with locked(tmp_path, "held"):
        with pytest.raises(UserError, match="another process is training in"):
            run("soft", tmp_path, max_steps=1)
        assert not list(tmp_path.iterdir())
    run("soft", tmp_path, max_steps=1)


def test_all_processes_raise_what_the_first_one_finds(tmp_path, monkeypatch):
    """One that went on alone would end in a traceback, of a barrier that nobody else comes to."""
    second = SimpleNamespace(output_dir=tmp_path, run=SimpleNamespace(process_index=1, world_size=2))
    monkeypatch.setattr(files, "gather_object", lambda found: ["already there", *found])
    with pytest.raises(UserError, match="already there"), claimed(second):
        pass
    state = SimpleNamespace(global_step=0, is_world_process_zero=False)
    for kind in (reliable.LinesUntil, reliable.MetricsFile):
        with pytest.raises(UserError, match="already there"):
            kind(tmp_path / "lines.jsonl").on_train_begin(second.run, state, None)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("config.yaml", b"a: [1", "cannot read .*config.yaml"),
        ("config.yaml", b"", "cannot read .*config.yaml"),
        ("metrics.jsonl", b"\xff\xfe", "holds metrics.jsonl"),
    ],
)
def test_a_broken_file_in_the_folder_is_one_line(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        run("soft", tmp_path, resume=True)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("kind", [UserError, ValueError])
def test_a_run_that_fails_in_its_first_step_leaves_its_folder_free(kind, tmp_path, monkeypatch):
    """Whatever it has logged before that step."""

    def training_step(*arguments):
        raise kind("step 1: it fails")

    with monkeypatch.context() as patch, pytest.raises(kind, match="step 1"):
        patch.setattr(ReliableTrainer, "training_step", training_step)
        run("soft", tmp_path, max_steps=1, eval_on_start=True)
    run("soft", tmp_path, max_steps=1, learning_rate=1e-4)


def test_a_run_that_has_checkpoints_keeps_its_folder(tmp_path, monkeypatch):
    """Even where Trainer counts its steps anew, as auto_find_batch_size has it do."""

    def train(trainer, **options):
        (tmp_path / "checkpoint-2").mkdir()
        raise RuntimeError("it fails")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="it fails"):
        patch.setattr(ReliableTrainer, "train", train)
        run("soft", tmp_path, max_steps=1)
    assert (tmp_path / "config.yaml").exists() and (tmp_path / "begun.json").exists()


def test_what_is_moved_or_edited_of_a_checkpoint_is_no_damage(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    moved = shutil.move(folder / "checkpoint-4" / "optimizer.pt", tmp_path)
    (folder / "checkpoint-4" / "optimizer.pt").symlink_to(moved)
    record = folder / "checkpoint-4" / "files.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"README.md": 5}))
    (folder / "checkpoint-4" / "README.md").write_text("longer than it was")
    reliable.check_whole(folder / "checkpoint-4", "")


def test_the_time_of_a_resumed_run_is_that_of_all_its_parts(tmp_path):
    assert run("soft", tmp_path)["seconds"] < 500
    for checkpoint in tmp_path.glob("checkpoint-*"):
        (checkpoint / "seconds.json").write_text("1000.0")
    assert 1000 < run("soft", tmp_path, resume=True)["seconds"] < 1500


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run of which checkpoints 2 and 4 are left."""
    folder = tmp_path_factory.mktemp("two")
    run("soft", folder)
    return folder


def go_on(folder):
    return run("soft", folder, resume=True)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SAVED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")


@pytest.mark.parametrize("name", [*SAVED, "trainer_state.json"])
def test_a_checkpoint_that_is_not_whole_is_not_gone_on_from(name, two_checkpoints, tmp_path):
    """Trainer would begin with a new optimizer, or end in a traceback."""
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    path = folder / "checkpoint-4" / name
    way_out = "; delete it, and --resume goes on from checkpoint-2$"
    cut(path)
    why = ": " if name.endswith(".json") else f" has {path.stat().st_size} bytes, not "
    with pytest.raises(UserError, match=f"checkpoint-4 is damaged: {name}{why}.*{way_out}"):
        go_on(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"checkpoint-4 lacks {name}{way_out}"):
        go_on(folder)
    shutil.rmtree(folder / "checkpoint-2")
    with pytest.raises(UserError, match=f"checkpoint-4 lacks {name}; delete it, and --resume begins anew$"):
        go_on(folder)
    (folder / "checkpoint-99").mkdir()
    with pytest.raises(UserError, match="checkpoint-99 lacks files.json; .* from checkpoint-4$"):
        go_on(folder)


@pytest.mark.parametrize("name", [*SAVED, "seconds.json"])
def test_a_checkpoint_that_cannot_be_read_is_one_line(name, two_checkpoints, tmp_path):
    """Damage that leaves a file as long as it was."""
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-4")  # after which no step is left
    path = folder / "checkpoint-2" / name
    path.write_bytes(b"\xff{".ljust(path.stat().st_size))
    with pytest.raises(UserError, match=r"^cannot (load|read) .*checkpoint-2") as caught:
        go_on(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "[]", '{"text": "x"}', "{"])
def test_a_damaged_begun_json_is_one_line(text, tmp_path):
    path = tmp_path / "begun.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^cannot read {path}|{path} is damaged: .*; delete it if --data is"):
        begun_with(path)


@pytest.mark.parametrize(
    "more, says",
    [
        ({}, "; --resume goes on with it"),
        ({"save_only_model": True}, ""),
        ({"save_strategy": "no"}, ""),
    ],
)
def test_ctrl_c_is_one_line(more, says, tmp_path, capsys, monkeypatch):
    """And the exception, by which Python ends as SIGINT ends it."""
    steps, step = [], ReliableTrainer.training_step

    def training_step(*arguments):
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return step(*arguments)

    command = ["train", "soft", *flags(options(tmp_path / "run", max_steps=2, save_steps=1) | more)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(ReliableTrainer, "training_step", training_step)
        try:
            main(command)
        finally:
            said = sys.excepthook
    said(caught.type, caught.value, caught.tb)
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted{says}"
    if says:
        main([*command, "--resume"])
        assert (tmp_path / "run" / "result.json").exists()


def test_every_token_masked(tmp_path, monkeypatch):
    collate = data.Collator.__call__

    def masked(self, rows):
        return {**collate(self, rows), "labels": torch.full((len(rows), 32), -100)}

    monkeypatch.setattr(data.Collator, "__call__", masked)
    with pytest.raises(UserError, match="step 1: every token of the batch is masked"):
        run("soft", tmp_path, eval_strategy="no")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_batch(tmp_path, monkeypatch):
    original = ReliableTrainer.batch_loss

    def loss(self, *arguments):
        value = original(self, *arguments)
        return value * float("nan") if self.state.global_step == 2 else value

    monkeypatch.setattr(ReliableTrainer, "batch_loss", loss)
    with pytest.raises(UserError, match="step 3: loss is nan.*last good one is .*checkpoint-2"):
        run("soft", tmp_path)
    kept = torch.load(tmp_path / "non-finite-step-3-rank-0.pt")
    assert kept["input_ids"].shape == (4, 32)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "checkpoint-2").values())


@pytest.mark.parametrize("command", ["info", "verify", "train", "cache"])
def test_an_unknown_backend_in_the_environment_is_one_line(command, monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "bogus")
    with pytest.raises(SystemExit) as caught:
        main([command])
    assert caught.value.code.startswith("error: KDKERNELS_BACKEND: unknown backend 'bogus'; there are ")
    assert "\n" not in caught.value.code


@pytest.mark.parametrize("name", ["checkpoint-2", "model", "result.json", "comparison.json", "tokenizer"])
def test_what_no_run_of_ours_left_is_not_overwritten(name, tmp_path, capsys):
    (tmp_path / "run" / name).mkdir(parents=True)
    for mode in ("soft", "hard"):
        assert f"holds {name}, but no config.yaml" in error_of(capsys, mode, tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


@pytest.mark.parametrize("name", ["metrics.jsonl", "written.jsonl", "1-written.jsonl"])
@pytest.mark.parametrize("content", ['{"loss": 1.0}\n', "notes of mine\n"])
def test_lines_that_no_run_wrote_stay(name, content, tmp_path, capsys):
    lines = tmp_path / "run" / name
    lines.parent.mkdir()
    lines.write_text(content)
    for data_is_there in (True, False):
        values = {} if data_is_there else {"data": [str(tmp_path / "nothing.txt")]}
        assert f"holds {name}, but no config.yaml" in error_of(capsys, "on_policy", tmp_path, **values)
        assert lines.read_text() == content


def test_a_run_that_could_not_begin_deletes_no_completions(tmp_path, monkeypatch):
    """Whatever they are called."""
    written = tmp_path / "teacher-written.jsonl"
    prompts = dict(prompts=4, prompt_tokens=4, completions=str(written))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="it fails"):
        patch.setattr(ReliableTrainer, "training_step", lambda *_: raise_(UserError("it fails")))
        run("hard", tmp_path, **prompts)
    assert written.stat().st_size and not (tmp_path / "config.yaml").exists()


def raise_(error):
    raise error


def test_what_another_process_writes_after_the_first_gave_up_is_overwritten(tmp_path):
    (tmp_path / "1-written.jsonl").write_text('{"step": 1, "prompt": "", "completion": ""}\n')
    run("soft", tmp_path, max_steps=1)


def test_a_missing_report_is_one_line(tmp_path, capsys, monkeypatch):
    def missing(*arguments, **options):
        raise RuntimeError("MLflowCallback requires mlflow to be installed. Run `pip install mlflow`.")

    monkeypatch.setattr(transformers.integrations.integration_utils.MLflowCallback, "__init__", missing)
    assert "requires mlflow" in error_of(capsys, "soft", tmp_path, report_to=["mlflow"])


def test_an_output_dir_that_is_a_link_to_itself_is_one_line(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "texts").mkdir()
    said = error_of(
        capsys, "soft", tmp_path, output_dir=str(tmp_path / "loop"), data=[str(tmp_path / "texts")]
    )
    assert said.startswith("error: cannot use --output_dir")


def test_a_run_does_not_go_into_a_comparison(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "begun.json").write_text('{"mode": "compare", "trains_tokenizer": false}')
    assert "holds begun.json, but no config.yaml" in error_of(capsys, "soft", tmp_path)


def test_a_copy_of_a_checkpoint_is_none(tmp_path):
    """A run goes on from none, and deletes none when it has later ones."""
    for name in ("checkpoint-2", "checkpoint-1-kept", "checkpoint-9-kept"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert reliable.checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]


@pytest.mark.parametrize("mode", ["soft", "compare", "hard"])
def test_a_run_does_not_learn_what_it_writes(mode, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("some text\n" * 100)
    values = {"completions": str(texts / "b.jsonl")} if mode == "hard" else {"output_dir": str(texts / "run")}
    said = error_of(capsys, mode, tmp_path, data=[str(texts)], **values)
    assert f"lies in --data {texts}, and what is written there would be learnt" in said
    assert [path.name for path in texts.iterdir()] == ["a.txt"]
    run("soft", texts / ".runs", data=[str(texts)], max_steps=1)


def test_metrics_that_no_run_wrote_stay(tmp_path, capsys):
    lines = tmp_path / "run" / "metrics.jsonl"
    run("soft", tmp_path / "run", max_steps=1)
    lines.write_text('{"loss": 1.0}\n')
    with pytest.raises(UserError, match="metrics.jsonl has lines that no run wrote: they have no step"):
        run("soft", tmp_path / "run", max_steps=1, resume=True)
    assert lines.read_text() == '{"loss": 1.0}\n'


def test_a_comparison_does_not_go_into_a_run(tmp_path, capsys):
    run("soft", tmp_path / "run", max_steps=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "holds a run: it is not overwritten" in error_of(capsys, "compare", tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("mode", ["soft", "co"])
def test_the_best_checkpoint_is_found_where_the_folder_is_now(mode, tmp_path):
    """Resumed after the folder was moved; the best is not the last."""
    best = {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1}
    run(mode, tmp_path / "old", max_steps=2, **best)
    (tmp_path / "old").rename(tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / "model")
    state = tmp_path / "new" / "checkpoint-2" / "trainer_state.json"
    values = json.loads(state.read_text()) | {"best_global_step": 1}
    values["best_model_checkpoint"] = values["best_model_checkpoint"].replace("checkpoint-2", "checkpoint-1")
    state.write_text(json.dumps(values))
    run(mode, tmp_path / "new", max_steps=2, resume=True, **best)
    found, first, last = (
        list(weights(tmp_path / "new" / name).values()) for name in ("model", "checkpoint-1", "checkpoint-2")
    )
    assert all(map(torch.equal, found, first)) and not all(map(torch.equal, found, last))


@pytest.mark.parametrize("metric, greater", [("eval_kl", False), ("hard", False), ("eval_agreement", True)])
def test_the_best_model_has_the_least_divergence(metric, greater, tmp_path):
    asked = {"load_best_model_at_end": True, "metric_for_best_model": metric, "eval_steps": 2}
    assert resolve("soft", options(tmp_path, **asked)).run.greater_is_better is greater


def test_a_line_separator_within_a_string_ends_no_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\r\n{"text": "d"}\n', encoding="utf-8")
    records = data.read(DataSettings(data=[str(path)]))
    assert [record["text"] for record in records] == ["a\u2028b\x85c", "d"]


def test_an_evaluation_in_half_precision_does_not_narrow_the_saved_model(tmp_path):
    run("soft", tmp_path, max_steps=1, bf16_full_eval=True, eval_strategy="no")
    assert {tensor.dtype for tensor in weights(tmp_path / "model").values()} == {torch.float32}
