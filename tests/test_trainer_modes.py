"""``python -m kdkernels train``: each mode for a few steps: what it trains, logs and writes."""

import json
import math
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import yaml  # noqa: E402
from trainer_runs import WRITES, assert_same_weights, error_of, options, run, start_weights, weights  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from kdkernels.trainer import train  # noqa: E402
from kdkernels.trainer.codistill import SoftWeight  # noqa: E402
from kdkernels.trainer.command_line import resolve  # noqa: E402
from kdkernels.trainer.files import read_metrics  # noqa: E402
from kdkernels.trainer.reliable import ReliableTrainer, checkpoints  # noqa: E402


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
        line.keys() == {"prompt", "completion", "ended"} and line["prompt"] for line in lines
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
    result = run("co", tmp_path, soft_schedule="teacher_loss", teacher_learning_rate=2e-2, max_steps=8)
    for part, seed in (("student", 42), ("teacher", 43)):
        for folder in (tmp_path / "model" / part, tmp_path / "checkpoint-8" / part):
            model = AutoModelForCausalLM.from_pretrained(folder)
            start = start_weights("micro", folder, seed)
            assert all((p - start[n]).abs().max() > 1e-4 for n, p in model.named_parameters() if p.dim() > 1)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    # The first steps are too few for the teacher's loss to be below log(vocab) after each of them.
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


def test_co_unscales_gradients_once_and_clips_each_model(tmp_path, monkeypatch):
    """What --fp16 makes of a GPU's run, put in by hand: the command refuses fp16 on a CPU."""
    settings = resolve("co", options(tmp_path, max_steps=2, max_grad_norm=0.01, remove_unused_columns=False))
    trainer, norms = train.build(settings), []
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    class Norms(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *ignored, **given):
            for model in trainer.models:
                norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())

    trainer.add_callback(Norms())
    trainer.train()
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    logged = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert len(logged) == 2 and all(0.1 < norm < 20 for norm in logged)  # of both as they were, unscaled


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
