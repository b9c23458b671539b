"""``python -m benchmarks.demo_sweep`` in the folders of two tiny demos: what is run, kept, reused and put on the page."""

import json
import math
import sys
from dataclasses import replace

import pytest
import yaml

for name in ("pyarrow", "transformers", "accelerate"):
    pytest.importorskip(name)

from trainer_runs import WRITES, options, weights  # noqa: E402

from benchmarks import demo_runs, demo_sweep, demo_tables, pages  # noqa: E402
from kdkernels.trainer import compare, train  # noqa: E402
from kdkernels.trainer.command_line import resolve  # noqa: E402
from kdkernels.trainer.folder import COMPARISON  # noqa: E402


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Makes a finished demo of micro models; stages run in this process, and their names are in the list."""
    ran = []

    def exit_code(settings):
        train.run(resolve(settings.mode, settings.asked))
        ran.append(settings.output_dir.name)

    def make(**values):
        values = options(tmp_path / "run", judged_prompts=2, **WRITES, **values)
        compare.compare(resolve("compare", values))
        ran.clear()
        return tmp_path / "run"

    monkeypatch.setattr(compare, "exit_code", exit_code)
    monkeypatch.setattr(demo_tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(pages, "fill", lambda name, text: filled.__setitem__(name, text))
    (tmp_path / "results").mkdir()
    filled = {}
    make.ran, make.filled = ran, filled
    return make


def sweep(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo_sweep", *map(str, arguments)])
    demo_sweep.main()


def test_a_sweep_that_is_stopped_keeps_its_rows_and_goes_on(finished, monkeypatch):
    folder = finished(ways=["plain", "soft"])
    runs = [demo_runs.Run(way, {"seed": seed}) for seed in (42, 43) for way in ("plain", "soft")]
    rates = [demo_runs.Run("co", {"learning_rate": rate, "max_steps": 2}) for rate in (1e-3, 2e-3)]
    narrow = {"student": f"{demo_runs.NARROW_FOLDER}/tiny-with-0.02", "max_steps": 1}
    parts = {
        "seeds": demo_runs.Part("mean", runs, demo_runs.JUDGED),
        "sizes": demo_runs.Part("size", [demo_runs.Run("plain", narrow)], ("validation loss", "tokens")),
        "rates": demo_runs.Part("rate", [demo_runs.Run("plain", {"learning_rate": 1e-3}), *rates]),
    }
    monkeypatch.setitem(demo_runs.PARTS, "demo", parts)
    whole = compare.exit_code

    def killed(settings):
        if settings.mode == "soft":
            raise KeyboardInterrupt
        return whole(settings)

    monkeypatch.setattr(compare, "exit_code", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(monkeypatch, folder, "seeds")
    kept = demo_tables.load("demo")["seeds"]
    assert list(kept) == ["plain-seed-42", "soft-seed-42", "plain-seed-43"]
    monkeypatch.setattr(compare, "exit_code", whole)
    sweep(monkeypatch, folder)
    # Neither the demo's own runs nor the finished ones are run again.
    seeds, sizes, rates = finished.ran[:2], finished.ran[2], finished.ran[3:]
    assert seeds == ["plain-seed-43", "soft-seed-43"] and "tiny-with-0.02" in sizes
    assert rates == [f"co-learning_rate-{rate}-max_steps-2" for rate in (0.001, 0.002)]
    result = demo_tables.load("demo")
    own = json.loads((folder / COMPARISON).read_text())["students"]
    for way in ("plain", "soft"):
        assert result["seeds"][f"{way}-seed-42"]["validation_loss"] == own[way]["validation_loss"]
    other = json.loads((folder / "sweep/rates/co-learning_rate-0.002-max_steps-2/result.json").read_text())
    row = result["rates"]["co-learning_rate-0.002-max_steps-2"]
    assert other["steps"] == 2 and row["validation_loss"] == other["eval_hard"]
    sweep(monkeypatch, folder, "rates")
    assert len(finished.ran) == 5 and demo_tables.load("demo")["seeds"] == result["seeds"]
    losses = [result["seeds"][f"plain-seed-{seed}"]["validation_loss"] for seed in (42, 43)]
    deviation = abs(losses[0] - losses[1]) / math.sqrt(2)
    assert losses[0] != losses[1]
    spread = f"| no teacher | 2 | {sum(losses) / 2:.3f} ± {deviation:.3f} |"
    said = finished.filled["demo-sweep"]
    assert spread in finished.filled["demo-choice"] and spread not in said
    assert f"| co | 0.002 | 2 | {row['validation_loss']:.3f} |" in said
    assert "| no teacher | tiny-with-0.02 | 1 | " in said
    first = weights(folder / "sweep" / "sizes")
    assert next(each for name, each in first.items() if "gate" in name).std() == pytest.approx(0.02, rel=0.1)


def test_a_cached_teacher_and_the_student_s_own_text_beside_the_live_teacher(finished, saved, monkeypatch):
    folder = finished(ways=["plain", "soft"], teacher=str(saved), hard_weight=1.0)
    monkeypatch.setattr(demo_sweep, "TOP_K", 200)
    part = demo_runs.PRETRAINED["on_policy"]
    monkeypatch.setitem(demo_runs.PRETRAINED, "on_policy", replace(part, runs=part.runs[:2]))
    sweep(monkeypatch, folder, "cache", "on_policy")
    result = demo_tables.load("demo-real")
    live, cached = (result["cache"][f"soft-{title}"] for title in ("live-teacher", "from-the-cache"))
    written = result["cache"]["written"]
    assert abs(live["validation_loss"] - cached["validation_loss"]) < 0.02  # 200 of 300 ids, in 8 bits
    tokens = live["tokens"]
    # Sixteen sequences, of which the text's last may be shorter.
    assert cached["tokens"] == tokens and 15 * 32 < tokens <= 16 * 32
    assert tokens <= written["tokens"] < 600 and written["seconds"] > 0  # as many as a student reads
    assert 200 <= written["bytes_per_token"] < 200 * 3
    stage = yaml.safe_load((folder / "sweep/cache/soft-from-the-cache/config.yaml").read_text())
    assert stage["teacher"] is None and stage["targets"] == str(folder / "sweep/cache/targets")
    policy = yaml.safe_load(
        next(folder.glob("sweep/on_policy/on_policy-*half-of-w*/config.yaml")).read_text()
    )
    assert (policy["divergence"], policy["hard_weight"], policy["student_share"]) == ("reverse_kl", 0.0, 0.5)
    said = finished.filled["demo-real-sweep"]
    assert said.startswith(f"The teacher's top 200 over {written['tokens']:,} tokens were written in ")
    assert (
        f"| from the cache | {cached['validation_loss']:.3f} | {cached['kl_to_teacher']:.3f} | {tokens} |"
        in said
    )
    assert said.count("| soft |") == 2 and said.count("\n| on-policy: ") == 1
    ran = list(finished.ran)
    assert len(ran) == 3
    later = {**written["environment"], "date": "another day"}
    monkeypatch.setattr(compare, "environment", lambda settings: later)
    sweep(monkeypatch, folder, "cache", "on_policy")
    assert finished.ran == ran and demo_tables.load("demo-real")["cache"] == result["cache"]
