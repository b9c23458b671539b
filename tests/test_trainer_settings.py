"""``python -m kdkernels train``: the options, from the command line and from YAML; what cannot be is refused before anything is read."""

import math
import pickle

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import yaml  # noqa: E402
from trainer_runs import PACKAGE, flags, options  # noqa: E402

from kdkernels.__main__ import main  # noqa: E402
from kdkernels.trainer import train  # noqa: E402
from kdkernels.trainer.command_line import parse, parser_for, resolve  # noqa: E402
from kdkernels.trainer.compare import plan  # noqa: E402
from kdkernels.trainer.errors import UserError  # noqa: E402
from kdkernels.trainer.folder import claim_folder  # noqa: E402
from kdkernels.trainer.settings import SCRATCH  # noqa: E402

SHARED = {"tensor_parallel": 2, "student": "a/b", "teacher": "c/d", "save_only_model": True}


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
        ("co", {"gradient_tolerance": 1.0}, "is no share from 0 to below 1"),
        ("co", {"soft_warmup": 0.6}, "is no share from 0 to 0.5"),
        ("soft", {"save_total_limit": -1}, "save_total_limit=-1 must be 0 or more"),
        ("soft", {"lora_rank": -1}, "lora_rank=-1 must be 0 or more"),
        ("soft", {"lora_modules": ["q_proj"]}, "give --lora_rank too"),
        (
            "soft",
            {"lora_rank": 4},
            "lora_rank=4: micro is made from scratch, and a run saves the adapter alone",
        ),
        ("soft", {"fp16": True}, "fp16=True has no effect on a CPU; give --bf16"),
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
        ("soft", {"torch_compile_backend": "eager"}, "torch_compile: the command compiles nothing"),
        ("soft", {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: it needs logits"),
        ("soft", {"resume_from_checkpoint": "x"}, "resume_from_checkpoint=x: --resume goes on from"),
        ("soft", {"do_eval": True}, "evaluates by --eval_strategy"),
        ("soft", {"dtype": "float16"}, "dtype=float16: there are"),
        ("soft", {"divergence": "jsd:x"}, "divergence 'jsd:x'"),
        ("soft", {"divergence": "jsd:0.5,1"}, "divergence 'jsd:0.5,1': it has 1 number, got 2"),
        ("soft", {"divergence": "forward_kl:1"}, "it has no numbers, got 1"),
        ("soft", {"lr_scheduler_type": "x"}, "x is not a valid SchedulerType"),
        ("soft", {"deepspeed": "/no/such.json"}, "/no/such.json"),
        ("soft", {"accelerator_config": "/no/such.json"}, "/no/such.json"),
        # what another mode has
        (
            "soft",
            {"soft_schedule": "cosine"},
            "soft_schedule=cosine: soft has none, it is of co, compare; leave it out",
        ),
        (
            "hard",
            {"temperature": 2.0},
            "temperature=2.0: hard has none, it is of soft, co, on_policy, compare",
        ),
        ("co", {"prompts": 3}, "prompts=3: co has none, it is of hard, compare"),
        ("compare", {"targets": "x"}, "targets=x: compare has none, it is of soft"),
        ("hard", {"tensor_parallel": 2}, "tensor_parallel=2: hard has none, it is of soft"),
        ("co", {"keep_sharded": True}, "keep_sharded=True: co has none, it is of soft"),
        ("soft", {"tensor_parallel": 0}, "tensor_parallel=0 must be 1 or more"),
        ("soft", {"tensor_parallel": 2}, "tensor_parallel=2: micro is made from scratch"),
        ("soft", {**SHARED, "lora_rank": 2}, "tensor_parallel=2 is of whole models"),
        ("soft", {**SHARED, "teacher": None, "targets": "x"}, "tensor_parallel=2 is of whole models"),
        ("soft", {**SHARED, "save_only_model": False}, "--save_only_model or --save_strategy no"),
        ("soft", {**SHARED, "resume": True}, "leave --resume out"),
        (
            "soft",
            SHARED,
            "there are 1 processes, and all of them share the models: torchrun --nproc_per_node 2",
        ),
        *(
            (
                mode,
                {"save_only_model": True, "resume": mode != "compare"},
                f"no run goes on from them; {way_out}",
            )
            for mode, way_out in (
                ("soft", "leave --resume out"),
                ("co", "leave --resume out"),
                ("compare", "compare's stages go on from theirs; leave it out"),
            )
        ),
        ("soft", {"teacher_steps": 3}, "teacher_steps=3: soft has none, it is of compare"),
        ("hard", {"completions": "x.jsonl", "teacher": None}, "no --teacher writes them"),
        ("hard", {"completions": "x.txt"}, "the name must end in .jsonl"),
        # what libraries would refuse in a traceback
        (
            "soft",
            {"dataloader_persistent_workers": True},
            "there are no workers; give --dataloader_num_workers",
        ),
        (
            "soft",
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"nope": 1}},
            "checkpointing_kwargs={'nope': 1}: torch.utils.checkpoint has no nope; leave it out",
        ),
        (
            "soft",
            {"gradient_checkpointing_kwargs": "nope"},
            "checkpointing_kwargs=nope: it must be a mapping",
        ),
        ("soft", {"accelerator_config": {"nope": 1}}, "unexpected keyword argument 'nope'"),
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
    with pytest.raises(UserError) as caught:
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
    with pytest.raises(UserError, match="--config .*config.yaml"):
        parse("soft", ["--config", str(path)])


def test_yaml_may_name_one_of_a_list(tmp_path):
    values = options(
        tmp_path,
        data=str(PACKAGE),
        lora_modules="q_proj",
        lora_rank=2,
        report_to="none",
        eval_steps=None,
        student="a/b",
    )
    settings = resolve("soft", values)
    assert settings.data.data == [str(PACKAGE)] and settings.model.lora_modules == ["q_proj"]
    assert settings.run.report_to == [] and settings.asked["eval_steps"] is None


def test_what_checkpointing_takes_is_not_refused(tmp_path):
    asked = {"use_reentrant": False, "preserve_rng_state": False, "every_n_layers": 2, "early_stop": False}
    settings = resolve("soft", options(tmp_path, gradient_checkpointing_kwargs=asked))
    assert settings.run.gradient_checkpointing_kwargs == asked


def test_yaml_s_no_is_a_strategy(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options(tmp_path)) + "eval_strategy: no\nsave_strategy: no\n")
    settings = parse("soft", ["--config", str(path)])
    assert settings.run.eval_strategy == settings.run.save_strategy == "no"
    assert settings.to_dict()["eval_strategy"] == "no"


def test_what_the_command_line_does_not_know():
    with pytest.raises(UserError, match="unknown options --nope 1; see --help_all"):
        parse("soft", ["--output_dir", "x", "--nope", "1"])


@pytest.mark.parametrize("again", [["--data", "b.txt"], ["--data=b.txt"]])
def test_a_list_that_is_given_twice(again, tmp_path):
    """argparse would keep the last one alone. A config's list is one that the command line replaces."""
    with pytest.raises(UserError, match="--data is given twice; give all its values after one"):
        parse("soft", ["--output_dir", "x", "--data", "a.txt", *again])
    (tmp_path / "c.yaml").write_text("teacher: micro\noutput_dir: a\ndata: [a.txt]\n")
    assert parse("soft", ["--config", str(tmp_path / "c.yaml"), *again]).data.data == ["b.txt"]


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


def test_a_token_of_the_hub_is_written_to_no_file(tmp_path):
    """Neither as YAML nor as Trainer's training_args.bin. The stages of compare have it."""
    settings = resolve("compare", options(tmp_path, hub_token="hf_x", ways=["plain", "soft"]))
    assert "hub_token" not in settings.to_dict() and settings.run.hub_token == "hf_x"
    assert pickle.loads(pickle.dumps(settings.run)).hub_token is None
    for stage in plan(settings).values():
        assert (
            stage.run.hub_token == stage.asked["hub_token"] == "hf_x" and "hub_token" not in stage.to_dict()
        )


def test_a_run_goes_on_with_another_token_of_the_hub(tmp_path):
    """And one that somebody has put into config.yaml is not compared."""
    claim_folder(resolve("soft", options(tmp_path, hub_token="hf_x")))
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_x" not in text
    again = resolve("soft", options(tmp_path, hub_token="hf_y", resume=True))
    assert not claim_folder(again)
    (tmp_path / "config.yaml").write_text(text + "hub_token: hf_x\n")
    assert not claim_folder(again)


def test_an_option_of_an_enum_is_written_and_read_again(tmp_path):
    """transformers' own options have them: debug, as a list."""
    settings = parse("soft", [*flags(options(tmp_path)), "--debug", "underflow_overflow"])
    text = yaml.safe_dump(settings.to_dict())
    assert "debug:\n- underflow_overflow\n" in text
    for values in (yaml.safe_load(text), settings.asked):
        values = {name: value for name, value in values.items() if name != "mode"}
        assert resolve("soft", values).run.debug == settings.run.debug


@pytest.mark.parametrize("mode", ["soft", "hard", "co"])
def test_the_tolerance_reaches_the_loss(mode, tmp_path, tokenizer):
    settings = resolve(mode, options(tmp_path, gradient_tolerance=0.25))
    given = train.Ingredients(settings, tokenizer, [], [], [])
    assert given.loss_options()["gradient_tolerance"] == given.cut()["gradient_tolerance"] == 0.25


def test_yaml_then_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("teacher: micro\nlearning_rate: 2e-4\ntemperature: 3\noutput_dir: a\n")
    settings = parse("soft", ["--config", str(path), "--temperature", "1.5"])
    assert settings.run.learning_rate == 2e-4 and settings.loss.temperature == 1.5
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    assert parse("soft", ["--config", str(tmp_path / "again.yaml")]).to_dict() == settings.to_dict()
    assert set(SCRATCH) == {"micro", "tiny", "small"}
