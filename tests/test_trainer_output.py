"""``python -m kdkernels train``: what a run says, on the terminal and to transformers' reports."""

import logging
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_runs import ROOT, WRITES, flags, options, run  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

import kdkernels as kd  # noqa: E402
from kdkernels.trainer import progress, train  # noqa: E402
from kdkernels.trainer.command_line import resolve  # noqa: E402


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
def test_bars_are_lines_where_no_terminal_shows_them(terminal, tmp_path, capsys, monkeypatch, request):
    transformers_logging.disable_progress_bar()  # as the command does
    request.addfinalizer(transformers_logging.enable_progress_bar)
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


def test_a_path_that_stdout_cannot_show_ends_no_run(tmp_path):
    folder = tmp_path / "pfad mit \u00e4"
    asked = flags(options(folder, max_steps=1))
    command = [sys.executable, "-m", "kdkernels", "train", "soft", *asked]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "pfad mit \\xe4" in done.stdout and (folder / "model").exists()


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
