"""Every example runs as it stands, ends better than it began, and can be read in one sitting."""

import re
import runpy

import pytest
from trainer_runs import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: Run by torchrun: a test of the slow ones starts them.
SHARED = {"tensor_parallel.py"}


def run(name, capsys):
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def numbers(text, before):
    return [float(number) for number in re.findall(rf"{before} (-?[\d.]+)", text)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_is_short_and_says_how_it_is_run(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    assert re.search(rf"^(python|torchrun .*) examples/{path.name}$", text, re.M)
    assert path.name in SHARED or f"def test_{path.stem}(" in open(__file__).read()


def test_replace_kl_div(capsys):
    said = run("replace_kl_div.py", capsys)
    (before, after) = numbers(said, "loss")
    assert before == pytest.approx(after, rel=1e-5) and len(numbers(said, "peak of the step +")) == 2


def test_offline_teacher(capsys):
    pytest.importorskip("pyarrow")
    said = run("offline_teacher.py", capsys)
    first, last = numbers(said, "outcomes")
    assert last < first / 2 and "bytes per token on disk" in said


def test_codistillation(capsys):
    said = run("codistillation.py", capsys)
    for model in ("student", "teacher"):
        losses = numbers(said, model)
        assert losses[-1] < 0.8 * losses[0]


def test_hf_trainer(capsys):
    pytest.importorskip("transformers")
    before, after = numbers(run("hf_trainer.py", capsys).replace("before, ", "teacher: "), "teacher:")
    assert after < 0.9 * before


def test_on_policy(capsys):
    pytest.importorskip("transformers")
    losses = numbers(run("on_policy.py", capsys), "text")
    assert losses[-1] < 0.97 * losses[0]
