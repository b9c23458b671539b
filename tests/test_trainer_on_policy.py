"""``train on_policy``: what the student writes, how it is judged, and that a resumed run ends in the same bits."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_runs import assert_same_weights, error_of, run, weights  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from kdkernels.trainer.files import read_metrics  # noqa: E402
from kdkernels.trainer.on_policy import OnPolicyTrainer  # noqa: E402

SHORT = {"prompt_tokens": 4}


@pytest.fixture
def batches(monkeypatch):
    """(inputs, num_items) of every micro-batch that is trained on."""
    seen, original = [], OnPolicyTrainer.training_step
    monkeypatch.setattr(
        OnPolicyTrainer,
        "training_step",
        lambda self, model, inputs, n=None: (seen.append((inputs, n)), original(self, model, inputs, n))[1],
    )
    return seen


def lines(folder):
    return [json.loads(line) for line in (folder / "written.jsonl").read_text().splitlines()]


def test_the_student_writes_and_learns_what_it_wrote(tmp_path, batches):
    result = run("on_policy", tmp_path, gradient_accumulation_steps=2, max_steps=3, **SHORT)
    assert result["steps"] == 3 and result["eval_kl"] > 0 and len(batches) == 6
    for pair in (batches[:2], batches[2:4], batches[4:]):
        items = sum(int((inputs["labels"][:, 1:] >= 0).sum()) for inputs, _ in pair)
        assert [int(n) for _, n in pair] == [items, items], "tokens of the whole batch, as they were written"
    labels = batches[0][0]["labels"]
    assert (labels[:, :4] == -100).all() and (labels[:, 4] >= 0).all()
    written = lines(tmp_path)
    assert len(written) == 3 * 2 * 4 and {line["step"] for line in written} == {1, 2, 3}
    assert len({line["completion"] for line in written}) > 12 and all(line["prompt"] for line in written)
    assert {"loss", "soft", "agreement"} <= read_metrics(tmp_path / "metrics.jsonl")[0].keys()


def test_the_loss_is_the_reverse_kl_of_what_was_written(tmp_path, batches, saved, monkeypatch):
    """By the formula on full logits, before the first update."""
    options = dict(student=str(saved), teacher="micro", max_steps=1, **SHORT)
    found = {}
    original = OnPolicyTrainer.teacher_target
    monkeypatch.setattr(
        OnPolicyTrainer,
        "teacher_target",
        lambda self, i: (found.update(teacher=self.teacher), original(self, i))[1],
    )
    run("on_policy", tmp_path, **options)
    inputs, _ = batches[0]
    student = AutoModelForCausalLM.from_pretrained(saved)
    own = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        q, p = (m(**own).logits[:, :-1].double().log_softmax(-1) for m in (student, found["teacher"]))
    live = inputs["labels"][:, 1:] >= 0
    expected = (q.exp() * (q - p)).sum(-1)[live].mean().item()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("judge", ["top_k:5", "sampled"])
def test_other_judges(tmp_path, judge):
    run("on_policy", tmp_path, judge=judge, **SHORT)
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert abs(first["loss"]) > 1e-4 and first["loss"] == pytest.approx(first["soft"], rel=1e-4)
    assert ("target_agreement" in first) == (judge != "sampled")


def test_a_share_is_the_text_itself(tmp_path, batches):
    run(
        "on_policy",
        tmp_path,
        student_share=0.5,
        max_steps=12,
        new_tokens=3,
        save_steps=12,
        eval_steps=12,
        **SHORT,
    )
    text = [bool((inputs["labels"][:, 0] >= 0).all()) for inputs, _ in batches]
    assert 2 < sum(text) < 10
    assert all(
        inputs["input_ids"].shape[1] <= 4 + 3 for (inputs, _), is_text in zip(batches, text) if not is_text
    )


def test_a_resumed_run_writes_and_ends_alike(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("on_policy", whole, student_share=0.7, **SHORT)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoint-4")
    (cut / "result.json").unlink()
    run("on_policy", cut, student_share=0.7, resume=True, **SHORT)
    assert_same_weights(weights(cut / "model"), weights(whole / "model"))
    assert lines(cut) == lines(whole)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"judge": "half"}, "full, sampled and top_k:K"),
        ({"judge": "top_k:301"}, "judge=top_k:301: there are 300 tokens; give fewer, or full"),
        ({"judge": "sampled", "student_share": 0.5}, "student_share must be 1, not 0.5"),
        (
            {"judge": "sampled", "sampling_temperature": 0.7},
            "that the student itself drew: sampling_temperature must be 1, not 0.7",
        ),
        ({"judge": "sampled", "divergence": "jsd:0.5"}, "divergence=JSD(beta=0.5): judge=sampled"),
        ({"judge": "sampled", "hard_weight": 5.0}, "hard_weight=5.0: judge=sampled"),
        ({"judge": "sampled", "temperature": 3.0}, "temperature=3.0: judge=sampled"),
        ({"student_share": 0.0}, "share above 0"),
        ({"prompt_tokens": 32}, "leaves no room in max_length=32"),
        ({"teacher": None}, "on_policy needs a --teacher"),
    ],
)
def test_mistakes(tmp_path, capsys, values, message):
    assert message in error_of(capsys, "on_policy", tmp_path, **{**SHORT, **values})


def test_default_divergence(tmp_path):
    from trainer_runs import options

    from kdkernels.trainer.command_line import resolve

    assert resolve("on_policy", options(tmp_path)).loss.divergence == "reverse_kl"
    assert resolve("soft", options(tmp_path)).loss.divergence == "forward_kl"
