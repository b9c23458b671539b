"""Real processes: killed and resumed, out of disk, two of them under torchrun."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_runs import (  # noqa: E402
    FSDP_ON_CPU,
    PACKAGE,
    ROOT,
    TENSOR_PARALLEL_ON_CPU,
    WRITES,
    assert_same_weights,
    flags,
    options,
    process,
    weights,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from kdkernels.trainer import models, train  # noqa: E402
from kdkernels.trainer.command_line import resolve  # noqa: E402
from kdkernels.trainer.compare import plan  # noqa: E402
from kdkernels.trainer.files import read_metrics  # noqa: E402
from kdkernels.trainer.reliable import STAGING, checkpoints  # noqa: E402

#: Prints how many rows of an lm_head a loss is given of one that stays sharded.
SAYS_ROWS = """
import kdkernels.integrations.model_head as model_head
sharded_head = model_head._sharded_head
def said(*arguments):
    head = sharded_head(*arguments)
    print(f"{head.vocab_size} rows\\n", end="")  # one piece, for both processes write
    return head
model_head._sharded_head = said
"""
#: A callback that samples may call the model between two steps, all of it.
SAMPLES = """
import torch
from kdkernels.trainer.reliable import ReliableTrainer
training_step = ReliableTrainer.training_step
def sampled(self, model, inputs, *rest):
    if self.state.global_step:
        with torch.no_grad():
            model(input_ids=inputs["input_ids"])
    return training_step(self, model, inputs, *rest)
ReliableTrainer.training_step = sampled
"""
#: Ends the process by SIGKILL: {step} forwards into training, or while {name} is written for the {count}th time.
KILLER = """
import os, signal, sys, torch
from kdkernels.trainer.reliable import ReliableTrainer
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
step, count = {step}, {count}
original, save = ReliableTrainer.training_step, torch.save
def training_step(self, *arguments):
    global step
    step -= 1
    return die() if step == 0 else original(self, *arguments)
def half_a_file(thing, path, *arguments, **options):
    global count
    if str(path).endswith("optimizer.pt"):
        count -= 1
        if count == 0:
            open(path, "wb").write(b"PK half a file")
            die()
    return save(thing, path, *arguments, **options)
ReliableTrainer.training_step, torch.save = training_step, half_a_file
from kdkernels.__main__ import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory):
    """Dropout, so that the state of the random numbers matters."""
    folder = tmp_path_factory.mktemp("dropout")
    tokenizer = models.train_tokenizer(["the quick brown fox jumps over the lazy dog " * 9], 300)
    model = models.load_model("micro", tokenizer, dtype="float32", seed=3, max_length=32)
    model.config.attention_dropout = 0.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(tmp_path, dropout_model):
    """Killed in a step, then in the middle of a save, then left to finish: as if nothing had happened."""
    values = dict(
        student=str(dropout_model),
        teacher="micro",
        max_steps=8,
        save_steps=2,
        eval_steps=3,
        soft_schedule="teacher_loss",
        gradient_accumulation_steps=2,
    )
    whole = process("train", "co", *flags(options(tmp_path / "whole", **values)))
    assert whole.returncode == 0, whole.stderr
    command = ["train", "co", *flags(options(tmp_path / "killed", resume=True, **values))]
    for name, (step, count), last in (("step", (7, 0), "checkpoint-2"), ("save", (0, 2), "checkpoint-4")):
        script = tmp_path / f"{name}.py"
        script.write_text(KILLER.format(step=step, count=count))
        killed = process(*command, script=script)
        assert killed.returncode == -9, killed.stderr
        assert checkpoints(tmp_path / "killed")[-1].name == last
    assert (tmp_path / "killed" / STAGING / "checkpoint-6" / "optimizer.pt").exists()  # the half-written one
    finished = process(*command)
    assert finished.returncode == 0, finished.stderr
    assert not (tmp_path / "killed" / STAGING).exists()
    ours, theirs = weights(tmp_path / "killed" / "model"), weights(tmp_path / "whole" / "model")
    assert_same_weights(ours, theirs)
    assert any(
        not torch.equal(tensor, weights(tmp_path / "whole" / "checkpoint-6")[name])
        for name, tensor in theirs.items()
    )
    metrics = [
        [
            (line["step"], line.get("loss"), line.get("soft_weight"), line.get("eval_loss"))
            for line in read_metrics(tmp_path / run / "metrics.jsonl")
        ]
        for run in ("whole", "killed")
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """Files may not grow beyond a size that optimizer.pt reaches once the momenta exist."""
    script = tmp_path / "full.py"
    script.write_text("""
import resource, sys
from kdkernels.trainer.reliable import ReliableTrainer
original = ReliableTrainer._save_checkpoint
def save(self, *arguments):
    if self.state.global_step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return original(self, *arguments)
ReliableTrainer._save_checkpoint = save
from kdkernels.__main__ import main
main(sys.argv[1:])
""")
    full = process("train", "soft", *flags(options(tmp_path / "run")), script=script)
    assert full.returncode == 1
    line = full.stderr.strip().splitlines()[-1]
    assert line.startswith("error: step 4: the checkpoint could not be written to") and "checkpoint-2" in line
    assert "Traceback" not in full.stderr
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    again = process("train", "soft", *flags(options(tmp_path / "run", resume=True)))
    assert again.returncode == 0 and json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4


MODES = ("soft", "co")


@pytest.fixture(scope="module")
def micro_models(tmp_path_factory):
    """Folders of a student and of a teacher."""
    tokenizer = models.train_tokenizer((path.read_text() for path in sorted(PACKAGE.glob("*.py"))), 300)
    folders = []
    for seed in (3, 4):
        folders.append(str(tmp_path_factory.mktemp(f"micro{seed}")))
        model = models.load_model("micro", tokenizer, dtype="float32", seed=seed, max_length=128)
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Completions of 1 to 20 words: a mean of the micro-batches' means is then not the mean over tokens."""
    words = " ".join(path.read_text() for path in sorted(PACKAGE.glob("*.py"))).split()
    lines = [
        {"prompt": words[7 * i], "completion": " ".join(words[7 * i + 1 : 7 * i + 2 + i * 13 % 20])}
        for i in range(120)
    ]
    path = tmp_path_factory.mktemp("uneven") / "completions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"data": [str(path)], "max_length": 128}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, uneven):
    """One process, batches of 8."""
    folder = tmp_path_factory.mktemp("alone")
    for mode in MODES:
        train.run(resolve(mode, options(folder / mode, per_device_train_batch_size=8, **uneven)))
    return folder


def assert_same_metrics(ours, theirs):
    """Of two runs, in every line of their logs."""
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (ours, theirs))
    for name in (
        "loss",
        "soft",
        "kl",
        "grad_norm",
        "eval_loss",
        "eval_kl",
        "eval_hard",
        "num_input_tokens_seen",
    ):
        expected = [line[name] for line in theirs if name in line]
        assert expected and [line[name] for line in ours if name in line] == pytest.approx(
            expected, rel=2e-5
        ), name


@pytest.mark.parametrize(
    "sharded", [pytest.param(False, id="ddp"), pytest.param(True, id="fsdp", marks=pytest.mark.slow)]
)
def test_two_processes_do_what_one_does(sharded, alone, uneven, tmp_path):
    """2 processes x 2 micro-batches of 2 against 1 x 1 of 8; 5 sequences are evaluated, which 2 does not divide."""
    script = tmp_path / "main.py"
    script.write_text(FSDP_ON_CPU)
    values = dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        fsdp=True if sharded else None,
        use_cpu=None,
        **uneven,
    )
    commands = [["train", mode, *flags(options(tmp_path / mode, **values))] for mode in MODES]
    run = process(json.dumps(commands), torchrun=True, script=script)
    assert run.returncode == 0, run.stderr
    for mode in MODES:
        assert (tmp_path / mode / "checkpoint-4" / "pytorch_model_fsdp.bin").exists() == sharded
        assert_same_metrics(tmp_path / mode, alone / mode)
        ours = weights(tmp_path / mode / "model")
        for name, tensor in weights(alone / mode / "model").items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def untied_models(tmp_path_factory, micro_models):
    """The same with an lm_head of its own, and 3 rows of padding: 303 rows are 152 and 151."""
    folders = []
    for folder in micro_models:
        config = AutoConfig.from_pretrained(folder, tie_word_embeddings=False, vocab_size=303)
        torch.manual_seed(len(folders))
        folders.append(str(tmp_path_factory.mktemp("untied")))
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[-1])
        AutoTokenizer.from_pretrained(folder).save_pretrained(folders[-1])
    return folders


@pytest.mark.slow
def test_tensor_parallel_processes_do_what_one_does(micro_models, untied_models, uneven, tmp_path):
    """Every layer and the lm_heads of both models are shared out over 2 processes, which have the same batches."""
    script = tmp_path / "main.py"
    script.write_text(TENSOR_PARALLEL_ON_CPU)
    pairs = {"tied": micro_models, "untied": untied_models}

    def values(folder, name, **more):
        student, teacher = pairs[name]
        batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        more = dict(student=student, teacher=teacher, hard_weight=0.5, **batch, **uneven, **more)
        return options(tmp_path / folder / name, save_only_model=True, per_device_eval_batch_size=2, **more)

    commands = [["train", "soft", *flags(values("shared", name, tensor_parallel=2))] for name in pairs]
    run = process(json.dumps(commands), torchrun=True, script=script)
    assert run.returncode == 0, run.stderr
    assert "2 processes that share the models" in run.stdout and "4 steps of 8 sequences" in run.stdout
    for name in pairs:
        train.run(resolve("soft", values("alone", name)))
        ours, theirs = (tmp_path / folder / name for folder in ("shared", "alone"))
        assert_same_metrics(ours, theirs)
        ours, theirs = weights(ours / "model"), weights(theirs / "model")
        assert ("model/lm_head.weight" in theirs) == (name == "untied")
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_lm_heads_that_stay_sharded_do_what_one_process_does(untied_models, uneven, tmp_path):
    """FSDP2 leaves 152 and 151 rows of both lm_heads where they are, in training and evaluation."""
    script = tmp_path / "main.py"
    script.write_text(SAYS_ROWS + SAMPLES + FSDP_ON_CPU)
    student, teacher = untied_models

    def values(folder, **more):
        more = dict(student=student, teacher=teacher, hard_weight=0.5, **uneven, **more)
        return options(tmp_path / folder, **more)

    shared = values(
        "shared",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        fsdp=True,
        use_cpu=None,
        keep_sharded=True,
    )
    run = process(json.dumps([["train", "soft", *flags(shared)]]), torchrun=True, script=script)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("152 rows") == run.stdout.count("151 rows") > 2 * 2 * 4
    train.run(resolve("soft", values("alone", per_device_train_batch_size=8)))
    assert_same_metrics(tmp_path / "shared", tmp_path / "alone")
    ours, theirs = (weights(tmp_path / folder / "model") for folder in ("shared", "alone"))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=2e-5)


SHARDED = {  # name -> mode and options; LoRA on the lm_head is what shards could break first
    "soft": ("soft", {}),
    "co-lora": ("co", {"lora_rank": 2, "lora_modules": ["q_proj", "lm_head"]}),
}


@pytest.mark.slow
def test_a_sharded_run_resumes_in_the_same_bits(tmp_path, uneven, micro_models):
    """FSDP, with and without LoRA: what one process computes, and the same bits from checkpoint 2 on."""
    script = tmp_path / "main.py"
    script.write_text(FSDP_ON_CPU)

    def values(folder, name, **more):
        return options(
            tmp_path / folder / name, student=micro_models[0], **uneven, **SHARDED[name][1], **more
        )

    def run_sharded(**more):
        more = dict(per_device_train_batch_size=4, fsdp=True, **more)
        commands = [
            ["train", mode, *flags(values("sharded", name, **more))] for name, (mode, _) in SHARDED.items()
        ]
        result = process(json.dumps(commands), torchrun=True, script=script)
        assert result.returncode == 0, result.stderr
        return result.stdout.count("{'loss'")

    assert run_sharded() == 4 * len(SHARDED)
    for name in SHARDED:
        shutil.copytree(tmp_path / "sharded" / name, tmp_path / "whole" / name)
        for path in ("checkpoint-4", "model"):
            shutil.rmtree(tmp_path / "sharded" / name / path)
    assert run_sharded(resume=True) == 2 * len(SHARDED)  # steps 3 and 4
    for name, (mode, _) in SHARDED.items():
        train.run(resolve(mode, values("alone", name, per_device_train_batch_size=8)))
        resumed, whole, alone = (
            weights(tmp_path / each / name / "model") for each in ("sharded", "whole", "alone")
        )
        assert_same_weights(resumed, whole)
        for key, tensor in alone.items():
            torch.testing.assert_close(whole[key], tensor, rtol=0, atol=2e-5)
        assert "lora" not in name or any("lora_B" in key for key in whole)


#: DeepSpeed's own shared-memory collectives would be compiled first; gloo's do.
ZERO3_ON_CPU = """
import json, os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.comm.torch
deepspeed.comm.torch.build_shm_op = lambda: None
from kdkernels.__main__ import main
for command in json.loads(sys.argv[1]):
    main(command)
"""


@pytest.mark.slow
def test_zero3_shards_of_student_and_teacher(tmp_path, uneven, micro_models):
    """from_pretrained leaves an empty lm_head.weight of both models here; the numbers are those of one process."""
    pytest.importorskip("deepspeed")
    script, config = tmp_path / "main.py", tmp_path / "zero3.json"
    script.write_text(ZERO3_ON_CPU)
    ours = json.loads((ROOT / "examples" / "zero3.json").read_text())
    at_once = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    ours["zero_optimization"].update(
        at_once
    )  # a weight is let go as soon as its module is done, and be it small
    config.write_text(json.dumps(ours))
    student, teacher = micro_models

    def values(folder, **more):
        return options(tmp_path / folder, student=student, teacher=teacher, **uneven, **more)

    cases = {"whole": {}, "lora": {"lora_rank": 2, "lora_modules": ["q_proj", "lm_head"]}}
    commands = [
        ["train", "soft", *flags(values(f"zero3-{name}", deepspeed=config, **case))]
        for name, case in cases.items()
    ]
    run = process(json.dumps(commands), torchrun=True, script=script)
    assert run.returncode == 0, run.stderr
    for name, case in cases.items():
        train.run(resolve("soft", values(f"alone-{name}", per_device_train_batch_size=8, **case)))
        ours, theirs = (
            read_metrics(tmp_path / f"{run}-{name}" / "metrics.jsonl") for run in ("zero3", "alone")
        )
        for key in ("loss", "kl", "grad_norm", "eval_kl"):
            expected = [line[key] for line in theirs if key in line]
            assert expected and [line[key] for line in ours if key in line] == pytest.approx(
                expected, rel=2e-5
            ), key
        ours = weights(tmp_path / f"zero3-{name}" / "model")
        assert ours and any("lora_B" in key for key in ours) == (name == "lora")
        theirs = weights(tmp_path / f"alone-{name}" / "model")
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key.replace("zero3", "alone")], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_compare_reuses_what_is_there(tmp_path):
    values = {"max_steps": 2, "teacher_steps": 3, "eval_steps": 2, "co_teacher_at": 0.34, **WRITES}
    command = [
        "train",
        "compare",
        *flags(options(tmp_path / "all", **values)),
    ]
    first = process(*command)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "all"
    students = json.loads((folder / "comparison.json").read_text())["students"]
    assert list(students) == ["plain", "longer", "soft", "hard", "co", "on_policy"]
    assert students["longer"]["tokens"] >= students["plain"]["tokens"]
    assert len({students[name]["tokens"] for name in ("plain", "soft", "co")}) == 1
    for row in students.values():  # a text that somebody else would write as well has a loss of ln 300
        assert 3 < row["writes"]["sampled"] < 9 and row["writes"]["greedy"] < 9
        assert 0 <= row["writes"]["greedy_agreement"] <= 1
    for number, name in enumerate(("teacher", "plain", "soft", "hard", "co", "on_policy", "longer"), 1):
        assert first.stdout.count(f"[{number}/7] {name}: ") == 2  # what it does; that it is done
    assert (folder / "curves.png").stat().st_size > 5000
    assert {line["run"] for line in read_metrics(folder / "metrics.jsonl")} == {"teacher", *students}
    for row in (
        "| no teacher |",
        "| no teacher, soft's time |",
        "| soft |",
        "| hard |",
        "| co |",
        "| on-policy |",
        "Soft distillation",
    ):
        assert row in first.stdout and row in (folder / "report.md").read_text()
    before = (folder / "comparison.json").read_text()
    again = process(*command)
    assert again.returncode == 0 and again.stdout.count("reusing") == 7
    assert (folder / "comparison.json").read_text() == before
    stages = plan(resolve("compare", options(folder, **values)))
    held_out = [train.ingredients(stage).validation.rows for stage in stages.values()]
    assert all(
        rows == held_out[0] for rows in held_out
    )  # no teacher is trained on what students are judged by
    other = process(*command, "--temperature", "2.0")
    assert other.returncode == 1 and "made with other settings (temperature 1.0, now 2.0)" in other.stderr
