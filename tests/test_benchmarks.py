"""The harness measures what it says: right inputs, right floors, right errors, ratios that compare."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import kdkernels as kd
from benchmarks import __main__ as command
from benchmarks import (
    accuracy,
    cases,
    compare,
    demo,
    goals,
    gpu,
    inputs,
    instructions,
    measure,
    memory,
    pages,
    peers,
    real,
    report,
    run,
    shards,
    variants,
)
from benchmarks.machine import last_level_cache_bytes

TINY = cases.Case(16, 300, losses=("kl", "rkl", "jsd", "ce"), masked=0.25)
TINY_HIDDEN = replace(TINY, width=24, teacher_width=40)
TINY_POLICY = replace(TINY_HIDDEN, losses=("log-probs", "log-probs + entropy"))
TINY_SPARSE = replace(TINY, masked=0.0, losses=("kl",), top_k=8)
TINY_CODISTILL = replace(TINY_HIDDEN, losses=("codistill",))
EVERY_CASE = sorted(
    {c.shrunk(tokens=16, vocab=300, width=24) for s in cases.SUITES.values() for c in s}, key=str
)


@pytest.fixture(scope="module")
def result():
    """A whole result of tiny cases, two of them on a curve."""
    curve = [
        replace(TINY, tokens=n, masked=0.0, plot=("tokens",), headline=False, peers=False) for n in (8, 16)
    ]
    small = [TINY, TINY_HIDDEN, TINY_CODISTILL, TINY_SPARSE, *curve]
    return run.run_suite("small", small, "cpu", rounds=1)


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda c: c.name)
def test_every_case_of_every_suite_runs_and_is_right(case):
    """At shrunken sizes, without compilations; what only runs on a GPU is left to one."""
    case = replace(case, compiled=())
    made, _ = variants.variants_of(case, "cpu")
    ulp = torch.finfo(case.torch_dtype).eps
    for variant, errors in zip(made, accuracy.errors(case, made, "cpu")):
        assert "problem" not in errors, (variant, errors)
        if variant.package in ("kdkernels", "torch"):
            within = 0.1 if "tolerance" in variant.label else 32 * ulp
            assert variant.is_floor or errors["gradient_error"] < within, (variant, errors)
    watches = measure.round_robin(case, [v for v in made if v.package in ("kdkernels", "torch")], "cpu", 1)
    assert all(watch.problem is None and watch.stats[2].total > 0 for watch in watches)


def test_a_case_on_a_real_model_takes_its_numbers(monkeypatch):
    made = {name: torch.randn(32, 8) for name in ("teacher", *real.STUDENTS)}
    made |= {"weight": torch.randn(300, 8), "labels": torch.arange(32)}
    monkeypatch.setattr(real, "read", lambda: made)
    given = inputs.Inputs(cases.Case(16, 300, "bfloat16", width=8, spectrum="real"))
    assert torch.equal(given.student[0], made["without six layers"][:16].bfloat16())
    assert torch.equal(given.teacher[1], given.student[1]) and given.labels.tolist() == list(range(16))
    with pytest.raises(ValueError, match="2048 tokens, 576 -> 49152"):
        inputs.Inputs(cases.Case(16, 301, width=8, spectrum="real"))


def test_a_case_whose_inputs_nobody_has_made_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(real, "FIXTURE", tmp_path / "none.pt")
    (case,) = (case for case in cases.SUITES["cpu"] if case.spectrum == "real" and case.dtype == "float32")
    result = run.run_suite("cpu", [case], "cpu")
    assert result["cases"] == [] and result["not_run"] == [case.name]


def test_large_bf16_products_are_left_to_processors_that_have_them(monkeypatch):
    large = cases.Case(256, 32768, "bfloat16", width=512)
    small, logits = replace(large, tokens=16), replace(large, width=0)
    for there in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda there=there: there)
        assert large.can_run("cpu") == there
        assert small.can_run("cpu") and logits.can_run("cpu") and large.can_run("cuda")


def test_peers_agree_with_the_oracle():
    """Each installed peer, on cases with masked tokens and unequal widths: its own gradient is right."""
    seen = set()
    for case in (TINY, TINY_HIDDEN, TINY_POLICY):
        made, _ = variants.variants_of(case, "cpu")
        for variant, errors in zip(made, accuracy.errors(case, made, "cpu")):
            if variant.package not in ("kdkernels", "torch"):
                assert errors["gradient_error"] < 1e-5, (variant.label, errors)
                seen.add(variant.package)
    assert seen == {f.NAME for f in peers.FAMILIES if f.why_not("cpu") is None}


def test_sparse_peers_agree_with_the_oracle():
    case = replace(TINY_HIDDEN, masked=0.0, top_k=8, losses=("kl", "kl conditional"))
    made, skipped = variants.variants_of(case, "cpu")
    theirs = [v.package for v in made if v.package not in ("kdkernels", "torch")]
    assert set(theirs) | set(skipped) == {family.NAME for family in peers.SPARSE_FAMILIES}
    for variant, errors in zip(made, accuracy.errors(case, made, "cpu")):
        assert variant.is_floor or errors["gradient_error"] < 1e-5, (variant.label, errors)


def test_families_name_losses_that_exist():
    sparse = replace(TINY_HIDDEN, top_k=8)
    for family in peers.FAMILIES + peers.SPARSE_FAMILIES:
        made = [row for case in (TINY, TINY_HIDDEN, sparse) for row in family.variants(case)]
        assert made and all(loss in cases.LOSSES and callable(run) for _, loss, run in made)


def test_a_wrong_variant_is_seen():
    made, _ = variants.variants_of(TINY, "cpu")
    wrong = [replace(v, forward=lambda step, v=v: 0 * v.forward(step)) for v in made]
    for variant, errors in zip(wrong, accuracy.errors(TINY, wrong, "cpu")):
        assert variant.is_floor or errors["gradient_error"] > accuracy.ANOTHER_LOSS or variant.inplace


def test_a_failure_is_a_result():
    def fails(step):
        raise RuntimeError("no such kernel | here")

    made, _ = variants.variants_of(TINY, "cpu")
    broken = [replace(made[-1], forward=fails)]
    assert "no such kernel" in accuracy.errors(TINY, broken, "cpu")[0]["problem"]
    assert "no such kernel" in measure.round_robin(TINY, broken, "cpu", 1)[0].problem
    row = {"loss": "kl", "variant": "x", "problem": "no such kernel | here"}
    assert report._line(row).count("|") == 12


def test_inputs_are_larger_than_the_cache():
    for case in (TINY, cases.Case(64, 32768)):
        sets = measure.input_sets(case, "cpu")
        total = sum(s.bytes for s in sets)
        assert total >= 4 * last_level_cache_bytes("cpu") or len(sets) == 32
        assert len({t.data_ptr() for s in sets for t in s.tensors()}) == 3 * len(sets)


def test_masked_share_and_restored_logits():
    given = inputs.Inputs(TINY)
    assert int((given.labels == -100).sum()) == 4 == TINY.tokens - TINY.live_tokens
    step = inputs.Step(given, inplace=True)
    variants.our_loss(step, "kl", inplace=True).backward()
    assert not torch.equal(given.scratch(), given.student[0])
    given.restore()
    assert torch.equal(given.scratch(), given.student[0])


def test_floors():
    frozen = replace(TINY_HIDDEN, frozen_head=True)
    assert variants.floor_of(TINY_HIDDEN, "kl", False) == "4 GEMMs"
    assert variants.floor_of(TINY_HIDDEN, "ce", False) == "3 GEMMs"
    assert variants.floor_of(frozen, "kl", False) == "3 GEMMs"
    for case, loss, products in ((TINY_HIDDEN, "kl", 4), (frozen, "ce", 2), (TINY_CODISTILL, "codistill", 6)):
        made = variants._gemms(case, loss)(inputs.Step(inputs.Inputs(case)))
        assert len(made) == products and made[0].shape == (case.live_tokens, case.vocab)


def test_result_holds_everything(result):
    assert len(result["cases"]) == 6 and not result["not_run"]
    for field in ("name", "cpu", "versions", "commit", "date"):
        assert result["machine"][field]
    for case in result["cases"]:
        for row in case["variants"]:
            assert "problem" not in row, (row["variant"], row["problem"])
            assert {"forward_ms", "backward_ms", "both_ms", "rounds"} <= set(row), row
            if row["floor"]:
                assert {
                    "to_floor",
                    "percent_of_floor",
                    "peak_bytes",
                    "peak_units",
                    "loss_error",
                    "gradient_error",
                } <= set(row), row
    json.dumps(result)


def test_time_that_is_up_is_said():
    made = run.run_suite("small", [TINY], "cpu", rounds=1, seconds=-1.0)
    assert made["cases"] == [] and made["not_run"] == [TINY.name]
    assert "Not run" in report.full(made)


def test_report_and_plots(result, tmp_path):
    pytest.importorskip("matplotlib")
    written = {path.name for path in command.write_report(result, tmp_path)}
    assert written == {"tables.md", "time-tokens.png", "memory-tokens.png", "headline.png"}
    page = (tmp_path / "tables.md").read_text()
    assert result["machine"]["name"] in page and TINY_CODISTILL.name in page
    figures = report.figures(result)
    assert result["machine"]["name"] in figures and TINY.name in figures
    page = pages.with_part("a\n<!-- figures -->\nold\n<!-- /figures -->\nb\n", "figures", figures)
    assert "old" not in page and page.startswith("a\n") and page.endswith("\nb\n")
    with pytest.raises(ValueError, match="no <!-- figures -->"):
        pages.with_part("nothing here", "figures", figures)


def test_a_busy_machine_is_told(result):
    for load, told in ((3.6, True), (0.1, False)):
        assert ("busy" in report.where({**result, "machine": {**result["machine"], "load": load}})) is told


def test_compare(result, tmp_path, capsys):
    slower = json.loads(json.dumps(result))
    row = next(
        r for r in slower["cases"][0]["variants"] if r["variant"] == "kdkernels" and r["loss"] == "jsd"
    )
    row["to_floor"] *= 1.2
    _, lost = compare.compare(result, slower)
    assert len(lost) == 1 and "jsd" in lost[0]
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for path, content in zip(paths, (result, slower, {**result, "cases": []})):
        path.write_text(json.dumps(content))
    assert command.main(["compare", str(paths[0]), str(paths[1])]) == 1
    assert command.main(["compare", str(paths[1]), str(paths[0])]) == 0
    assert command.main(["compare", str(paths[0]), str(paths[1]), "--limit", "1.3"]) == 0
    assert command.main(["compare", str(paths[0]), str(paths[2])]) == 2
    assert "in common" in capsys.readouterr().err


def test_a_machine_that_is_slower_is_no_regression(result):
    slower = json.loads(json.dumps(result))
    for row in (row for case in slower["cases"] for row in case["variants"]):
        for key in ("forward_ms", "backward_ms", "both_ms"):
            row[key]["median"] *= 3
    for case in slower["cases"]:
        run._add_floors(case["variants"])
    assert compare.compare(result, slower)[1] == []


def test_memory_sees_what_eager_holds():
    case = cases.Case(64, 65536, losses=("jsd",), peers=False)
    made, _ = variants.variants_of(case, "cpu")
    peaks = {v.label: p.get("peak_units") for v, p in zip(made, memory.peaks(case, made, "cpu"))}
    assert peaks["F.kl_div to mixture"] > 5
    assert peaks["kdkernels in place"] < 0.5 and peaks["kdkernels"] < 0.5


@pytest.mark.parametrize("suite", cases.SUITES)
def test_cases_have_names_of_their_own(suite):
    names = [case.name for case in cases.SUITES[suite]]
    assert len(set(names)) == len(names)


def test_goals_name_cases_and_variants_that_exist(monkeypatch):
    monkeypatch.setattr(variants.native, "cannot", lambda *_: None)
    known = {
        case.name: (case, device)
        for device, suite in (("cpu", "cpu"), ("cuda", "gpu"))
        for case in cases.SUITES[suite]
    }
    for goal in goals.GOALS:
        there = {v.key for v in variants.variants_of(*known[goal.case])[0]}
        assert {(goal.variant, goal.loss), (goal.against, goal.against_loss)} <= there, goal


def test_committed_results_fill_the_pages():
    """README and docs say what the committed JSON says, to the letter."""
    results = {path: command.load(path) for path in command.committed()}
    assert "cpu" in {result["suite"] for result in results.values()}
    made = report.parts(list(results.values()), [command.load(path) for path in command.processors()])
    assert {"headline", "figures", "processors"} == set(made) and made["headline"].count("\n") >= 8
    for name, text in (made | demo.committed()).items():
        assert pages.is_filled(name, text), pages.PAGES[name]
    for path, result in results.items():
        assert path.with_name(f"{result['suite']}-tables.md").read_text() == report.full(result)


def test_instructions_in_docs_are_the_committed_ones():
    assert pages.is_filled("instructions", instructions.table(json.loads(instructions.RESULT.read_text())))


def test_a_shape_of_your_own():
    assert cases.chosen("small", "logits 8 1000 bfloat16") == [
        cases.Case(8, 1000, "bfloat16", losses=("kl", "rkl", "jsd", "ce"))
    ]
    assert cases.chosen("small", "hidden 8 16 1000") == [
        cases.Case(8, 1000, width=16, losses=("kl", "rkl", "jsd", "ce"))
    ]
    assert len(cases.chosen("small", "co-distillation")) == 1
    for wrong in ("logits 8", "logits 8 -1", "hidden 8 16", "logits 8 1000 int8", "nothing"):
        assert cases.chosen("small", wrong) == []


@pytest.mark.slow
def test_one_command(tmp_path):
    """The command in a process of its own: JSON, tables, exit code; a second run overwrites nothing."""
    arguments = [
        sys.executable,
        "-m",
        "benchmarks",
        "--suite",
        "small",
        "--rounds",
        "1",
        "--case",
        "hidden [64, 256] -> 8192 float32, co",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(arguments, cwd=command.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 GEMMs" in done.stdout and command.load(tmp_path / "result.json")["cases"]
    again = subprocess.run(arguments, cwd=command.ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "already holds a result" in again.stderr


@pytest.mark.slow
def test_pytest_benchmarks(tmp_path):
    """``pytest benchmarks`` times the same cases under pytest-benchmark."""
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-k", "distillation", f"--benchmark-json={out}"],
        cwd=command.ROOT,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    )
    assert done.returncode == 0, done.stdout
    assert {b["group"] for b in json.loads(out.read_text())["benchmarks"]} == {
        "hidden [64, 256] -> 8192 float32, co-distillation"
    }


def test_our_loss_is_the_oracle_under_reference():
    step = inputs.Step(inputs.Inputs(TINY).double())
    with kd.use_backend("reference"):
        truth = variants.our_loss(step, "jsd")
    assert torch.isclose(truth, variants.plain_loss(step, "jsd"), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["check", "measure", "tune"])
def test_what_a_card_is_for_is_rehearsed(stage, tmp_path):
    """Every step of `make gpu` but the build runs here on small shapes."""
    steps = [step.name for wave in gpu.STAGES[stage]("cpu") for step in wave if step.name != "build"]
    words = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        stage,
        "--rehearse",
        "--out",
        str(tmp_path),
        "--minutes",
        "30",
    ]
    done = subprocess.run([*words, "--but", "build"], cwd=command.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert set(json.loads((tmp_path / f"{stage}.json").read_text())) == set(steps)


def test_a_step_on_a_card_that_fails_stops_no_other(tmp_path):
    bad = gpu.Step("bad", (sys.executable, "-c", "raise SystemExit(3)"), 20)
    slow = gpu.Step("slow", (sys.executable, "-c", "import time; time.sleep(30)"), 5.5)
    tool = gpu.Step("tool", (sys.executable, "-c", "0"), 20, ("no-such-tool",))
    ends = gpu.run([slow, bad, tool], tmp_path, 100, False)
    assert ends == {
        "bad": "exit code 3",
        "slow": "stopped after 6 s",
        "tool": "not run: no no-such-tool here",
    }
    assert gpu.run([bad], tmp_path, 1, False) == {"bad": "not run: the time was up"}


def test_the_suite_of_shards_runs(tmp_path):
    """Every variant's gradient is compared inside with that of the whole vocabulary."""
    sizes = [shards.Size(8, 100), shards.Size(8, 100, 16)]
    assert shards.measure(tmp_path, rounds=1, sizes=sizes) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    counts = {(row["loss"], row["variant"]): row["collectives"] for row in rows}
    assert counts["kl", "kdkernels"] == counts["ce", "kdkernels"] == 1
    assert counts["kl of hidden states", "kdkernels"] == 2
    assert counts["kl", "NeMo-RL, Fast-LLM"] == 5 and counts["ce", "Megatron"] == 3
    assert shards.page(json.loads((tmp_path / "result.json").read_text())).startswith(
        "Here kl of 8 x 100 takes "
    )


def test_the_committed_result_of_shards_fills_its_page():
    assert pages.is_filled("shards", shards.page(json.loads(shards.COMMITTED.read_text())))
