"""``python -m kdkernels train compare``: its plan, what students are judged by, and what the report says."""

import json
import multiprocessing
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_runs import WRITES, flags, options, run  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from kdkernels.__main__ import main  # noqa: E402
from kdkernels.trainer import compare, judge, models, report, train  # noqa: E402
from kdkernels.trainer.command_line import resolve  # noqa: E402
from kdkernels.trainer.errors import UserError  # noqa: E402
from kdkernels.trainer.files import read_metrics  # noqa: E402
from kdkernels.trainer.folder import claim_comparison, claimed_comparison  # noqa: E402
from kdkernels.trainer.settings import SCRATCH  # noqa: E402


def test_co_goes_on_with_a_teacher_that_is_under_way(tmp_path):
    values = options(tmp_path, teacher_steps=30, co_teacher_at=0.334, save_total_limit=1, **WRITES)
    stages = compare.plan(resolve("compare", values))
    assert list(stages) == ["teacher", "plain", "soft", "hard", "co", "on_policy"]
    teacher, co = stages["teacher"].run, stages["co"]
    assert (teacher.max_steps, teacher.save_steps, teacher.save_total_limit) == (30, 10, 0)
    assert co.model.teacher == str(tmp_path / "teacher" / "checkpoint-10")
    stages = compare.plan(resolve("compare", {**values, "co_teacher_at": 0.0}))
    assert stages["co"].model.teacher == "micro" and stages["teacher"].run.save_total_limit == 1


@pytest.mark.parametrize("asked, weight", [({}, 1.0), ({"hard_weight": 0.25}, 0.25)])
def test_co_has_the_hard_weight_that_was_asked_for(asked, weight, tmp_path):
    stages = compare.plan(resolve("compare", options(tmp_path, ways=["plain", "soft", "co"], **asked)))
    assert stages["co"].loss.hard_weight == weight
    assert stages["soft"].loss.hard_weight == asked.get("hard_weight", 0.0)


def test_a_comparison_goes_on_as_it_is_asked_for_now(tmp_path, monkeypatch, capsys):
    """What was judged by other prompts is judged again, and students of different text are not compared."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} of it\n" * 9}) + "\n" for i in range(20)))
    values = options(tmp_path / "run", data=[str(text)], ways=["plain", "soft"], max_steps=1, **WRITES)
    judged = []

    def judge_one(given, teacher, folder, prompts):
        judged.append((folder, prompts))
        return {**row(5.0), "writes": {}}

    in_this_process(monkeypatch)
    monkeypatch.setattr(judge, "judged", judge_one)
    for prompts, counts in ((4, [4] * 3), (4, []), (8, [8] * 3)):
        compare.compare(resolve("compare", {**values, "judged_prompts": prompts}))
        assert [count for _, count in judged] == counts
        judged.clear()
    text.write_text(text.read_text().replace("line 3 ", "another "))
    with pytest.raises(UserError, match="co had other text in --data than soft"):
        compare.compare(resolve("compare", {**values, "ways": ["plain", "soft", "co"]}))


def in_this_process(monkeypatch, *, fails=False):
    """Stages as runs here, and nothing that judges them."""

    def exit_code(settings):
        if fails:
            return 1
        train.run(resolve(settings.mode, settings.asked))

    monkeypatch.setattr(compare, "exit_code", exit_code)
    monkeypatch.setattr(judge, "judged", lambda *_: {**row(5.0), "writes": {}})


@pytest.mark.parametrize("name", ["report.md", "curves.png", "metrics.jsonl", "comparison.json"])
def test_what_no_comparison_wrote_is_not_overwritten(name, tmp_path):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=f"--output_dir {tmp_path} holds {name}, but no comparison: "):
        compare.compare(resolve("compare", options(tmp_path, max_steps=1, **WRITES)))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, '{"mine": 1}')]


def test_a_comparison_s_own_files_are_written_again(tmp_path, monkeypatch):
    """A run that could not begin may have left another begun.json."""
    in_this_process(monkeypatch)
    values = options(tmp_path, ways=["plain", "soft"], max_steps=1, **WRITES)
    (tmp_path / "begun.json").write_text('{"text": "x", "processes": 1}')
    for _ in range(3):
        compare.compare(resolve("compare", values))
        assert "Soft distillation" in (tmp_path / "report.md").read_text()
        (tmp_path / "report.md").write_text("old")


@pytest.mark.parametrize("stages", [[], ["teacher"]])
def test_a_comparison_that_was_killed_goes_on(stages, tmp_path, monkeypatch):
    """With the tokenizer of its stages. Before any has begun, another one may be asked for."""
    values = options(tmp_path, ways=["plain", "soft"], max_steps=1, **WRITES)
    settings = resolve("compare", values)
    claim_comparison(settings)
    for name in stages:
        train.run(resolve("hard", compare.plan(settings)[name].asked))
    trained = compare.tokenizer(settings)
    in_this_process(monkeypatch)
    if stages:
        Path(trained, "it_is_the_same").touch()
        compare.compare(settings)
        assert Path(trained, "it_is_the_same").exists()
    else:
        compare.compare(resolve("compare", {**values, "tokenizer_size": 310}))
        assert len(AutoTokenizer.from_pretrained(trained)) == 310


def test_a_killed_comparison_s_tokenizer_is_its_own_only_if_it_trains_one(tmp_path, saved):
    """What was given as --tokenizer may lie in the folder too."""
    folder = shutil.copytree(saved, tmp_path / "tokenizer")
    values = options(tmp_path, ways=["plain", "soft"], **WRITES)
    claim_comparison(resolve("compare", {**values, "tokenizer": str(folder)}))
    with pytest.raises(UserError, match=f"{tmp_path} holds tokenizer, but no comparison"):
        claim_comparison(resolve("compare", values))
    assert (folder / "tokenizer.json").exists()


def test_a_comparison_that_could_not_begin_leaves_its_folder_free(tmp_path, monkeypatch):
    in_this_process(monkeypatch, fails=True)
    values = options(tmp_path, ways=["plain", "soft"], max_steps=1, **WRITES)
    with pytest.raises(UserError, match="teacher did not finish"):
        compare.compare(resolve("compare", values))
    assert not list(tmp_path.iterdir())


def test_a_comparison_whose_stages_are_gone_keeps_its_folder(tmp_path):
    settings = resolve("compare", options(tmp_path, ways=["plain", "soft"], **WRITES))
    with pytest.raises(UserError, match="it fails"), claimed_comparison(settings):
        (tmp_path / "comparison.json").write_text("{}")
        raise UserError("it fails")
    claim_comparison(settings)


def test_a_comparison_that_is_interrupted_stops_its_stage(tmp_path, monkeypatch, capsys):
    """At its exit it would wait for it to the end."""
    context, started = multiprocessing.get_context("fork"), []

    class Interrupted(context.Process):
        def join(self, timeout=None):
            if self not in started:
                started.append(self)
                raise KeyboardInterrupt
            super().join(timeout)

    monkeypatch.setattr(context, "Process", Interrupted)
    monkeypatch.setattr(compare.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(compare, "_stage", lambda mode, asked: time.sleep(30))
    command = ["train", "compare", *flags(options(tmp_path, ways=["plain", "soft"], max_steps=1, **WRITES))]
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(KeyboardInterrupt) as caught:
        main(command)
    sys.excepthook(caught.type, caught.value, caught.tb)
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command goes on with it"
    assert [process.exitcode for process in started] == [-signal.SIGTERM]


@pytest.mark.parametrize("rates, steps", [((300.0, 200.0), 6), ((200.0, 300.0), 4)])
def test_the_longer_student_has_the_time_of_soft(rates, steps, tmp_path, monkeypatch):
    stages = compare.plan(resolve("compare", options(tmp_path, **WRITES)))
    paces = dict(zip(("hard", "soft"), rates))
    monkeypatch.setattr(compare, "speed", lambda s: {"tokens": 512, "tokens_per_second": paces[s.mode]})
    longer = compare.longer(stages)
    assert longer.run.max_steps == steps and longer.output_dir == tmp_path / "longer"
    assert longer.model.teacher is None and longer.mode == "hard"


def test_the_calibration_error_is_how_far_confidence_is_from_being_right():
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.2, 0.2])
    right = torch.tensor([True, True, True, False, True, False])
    assert judge.binned_error(confidence, right) == pytest.approx((4 * 0.2 + 2 * 0.3) / 6, abs=1e-6)
    assert judge.binned_error(torch.ones(3), torch.tensor([True] * 3)) == 0.0


def test_a_student_is_judged_by_the_whole_of_what_it_says(tmp_path):
    """Against plain softmax over the model's logits."""
    result = run("soft", tmp_path)
    evaluated = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "eval_hard" in line]
    assert [line["step"] for line in evaluated] == [4]  # once, although it is the last step too
    given = train.ingredients(resolve("soft", {**options(tmp_path), "resume": True}))
    model = models.load_trained(str(tmp_path / "model"), given.tokenizer, given.settings).eval()
    confidence, right, entropy = [], [], []
    for ids, _ in given.validation.rows:
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0, :-1].softmax(-1)
        first = p.max(-1)
        confidence.append(first.values)
        right.append(first.indices == torch.tensor(ids[1:]))
        entropy.append(-(p * p.log()).sum(-1))
    row = judge.judged(given, given.teacher(), str(tmp_path / "model"), 3)
    expected = judge.binned_error(torch.cat(confidence), torch.cat(right))
    assert row["calibration_error"] == pytest.approx(expected, abs=1e-4) and expected > 0
    assert row["entropy"] == pytest.approx(torch.cat(entropy).mean().item(), rel=1e-4)
    assert row["validation_loss"] == pytest.approx(result["eval_hard"], rel=1e-6)
    assert set(row["writes"]) == {"greedy", "greedy_agreement", "sampled", "sampled_agreement"}


@pytest.mark.parametrize("name", SCRATCH)
def test_first_weights_are_scaled_by_the_width(name, tokenizer):
    model = models.load_model(name, tokenizer, dtype="float32", seed=0, max_length=32)
    weight = model.model.layers[0].mlp.gate_proj.weight
    assert weight.std().item() == pytest.approx(model.config.hidden_size**-0.5, rel=0.1)


def row(loss, **values):
    cost = {"tokens": 1000, "tokens_per_second": 100.0, "seconds": 12.0, "writing_seconds": 0.0}
    said = {"kl_to_teacher": 0.5, "agreement": 0.5, "entropy": 2.0, "calibration_error": 0.01}
    writes = {"sampled": 3.0, "greedy": 1.0}
    return {"validation_loss": loss, **said, **cost, "peak_memory_bytes": 2**20, "writes": writes, **values}


def comparison(**students):
    settings = {"data": ["stdlib"], "max_length": 128}
    teacher = {**row(4.0), "parameters": 3_000_000}
    for name in ("tokens", "tokens_per_second", "writing_seconds", "peak_memory_bytes"):
        del teacher[name]
    return {
        "settings": settings,
        "students": students,
        "teacher": teacher,
        "student_parameters": 1_000_000,
        "validation_tokens": 500,
        "co_teacher": {"validation_loss": 4.5},
    }


def test_the_report_says_what_came_out_and_not_more():
    slow = {"tokens_per_second": 50.0}
    said = comparison(plain=row(5.0), longer=row(4.7, tokens=2000), soft=row(4.8, **slow))
    (done, soft, _, _) = report.sentences(said)
    assert "1.00 M parameters" in done and "1,000 tokens each" in done and "one seed" in done
    assert "beats the student without a teacher at equal tokens: validation loss 4.800 against 5.000" in soft
    assert "in 2.0 times the time" in soft
    assert (
        "It does not beat the one without a teacher that is given that time, on 2,000 tokens: 4.700" in soft
    )
    said = comparison(plain=row(5.0), soft=row(5.0), co=row(4.9, writes={"sampled": 2.0, "greedy": 1.0}))
    (_, soft, _, writes, co) = report.sentences(said)
    assert "does not beat" in soft and "trained along came to 4.500" in co and "beats" in co
    assert "co 2.000, no teacher 3.000, soft 3.000" in writes


def test_the_table_leaves_out_what_was_not_measured():
    lines = report.table(comparison(plain=row(5.0), soft=row(4.8, writing_seconds=7.0))).splitlines()
    assert lines[2].startswith("| *the teacher* | 4.000 | 0.500 |") and lines[2].endswith("|  |  |  |")
    assert lines[4].startswith("| soft | 4.800 |") and "| 17 s |" in lines[4]
    students = {name: row(5.0, writes={}) for name in ("plain", "soft")}
    assert "what it writes" not in report.table(comparison(**students))


def test_the_report_says_that_it_was_not_alone_on_the_machine():
    where = {"machine": "a CPU", "threads": 2, "torch": "2.13", "date": "2026-01-01", "cores": 2}
    alone = report.machine({"seconds": 300.0, "environment": {**where, "load_average": 2.4}})
    assert alone == "a CPU, 2 threads, torch 2.13, 2026-01-01, 300 s in all after the setup"
    busy = report.machine({"seconds": None, "environment": {**where, "load_average": 7.5}})
    assert busy.endswith("2026-01-01, beside other programs (load 7.5 on 2 cores)")
