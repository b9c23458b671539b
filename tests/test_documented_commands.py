"""Every command line that README, CONTRIBUTING and docs show. Ours are run as they stand, on tiny models and data; of
those that install, serve, build, measure or test, what they name is looked at. A line of another kind fails."""

import contextlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest

for name in ("pyarrow", "transformers", "accelerate", "peft"):
    pytest.importorskip(name)

from trainer_runs import FSDP_ON_CPU, PACKAGE, ROOT, TENSOR_PARALLEL_ON_CPU, process  # noqa: E402

from kdkernels.__main__ import main  # noqa: E402
from kdkernels.trainer import models  # noqa: E402
from kdkernels.trainer.files import read_metrics  # noqa: E402

PROGRAM = r"(?:[A-Z_]+=\S+ )*(?:make|pip|python|torchrun|pytest|tensorboard)"
SHORT = ["--max_length", "32", "--validation_sequences", "5"]
STEPS = shlex.split("--max_steps 2 --logging_steps 1 --per_device_train_batch_size 4 --disable_tqdm true")


def documented():
    """The lines of code blocks without a language, and `commands` within sentences; without their comments."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        fence = r"^ *```(\w*)\n(.*?)^ *```$"
        for language, block in re.findall(fence, text, re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines() if not language else ():
                yield from (shlex.split(part, comments=True) for part in line.split("&&"))
        for code in re.findall(r"`([^`]+)`", re.sub(fence, "", text, flags=re.S | re.M)):
            if re.match(rf"{PROGRAM}\s", code):
                yield shlex.split(code)


LINES = {" ".join(line): line for line in documented()}


def lines(pattern):
    found = {name: line for name, line in LINES.items() if re.match(pattern, name)}
    assert found, f"no documented line is like {pattern}"
    return pytest.mark.parametrize("line", found.values(), ids=found)


OURS, VERIFY = r"python -m kdkernels (?!verify)", "python -m kdkernels verify"
SHARED = "torchrun .* -m kdkernels "
MAKE, BENCHMARKS = "make ", r"(?:PYTHONPATH=\. |\.venv/bin/)?python -m benchmarks"
PYTEST = "(?:python -m )?pytest "
FUZZ = r"python -m tests\.fuzz "
ELSEWHERE = "pip install |tensorboard --logdir"  # the network, a server


def test_every_line_is_of_a_kind_that_is_checked_here():
    kinds = (OURS, SHARED, VERIFY, MAKE, BENCHMARKS, PYTEST, FUZZ, ELSEWHERE)
    assert len(LINES) > 20
    assert [name for name in LINES if not any(re.match(kind, name) for kind in kinds)] == []


# -- ours, as they stand: the placeholders are names of folders that are there ------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documented")
    texts = [path.read_text() for path in sorted(PACKAGE.glob("*.py"))]
    tokenizer = models.train_tokenizer(texts, 300)
    for seed, name in enumerate(("NAME_OR_FOLDER", "MODEL", "STUDENT")):
        size = "tiny" if name == "MODEL" else "micro"  # two layers, of which make-student drops one
        model = models.load_model(size, tokenizer, dtype="float32", seed=seed, max_length=32)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "DATA").mkdir()
    (folder / "DATA" / "a.txt").write_text(texts[0])
    (folder / "DATA" / "b.txt").write_text(texts[1][:1000])
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text[:3000]}) + "\n" for text in texts))
    (folder / "run.yaml").write_text("student: STUDENT\nteacher: MODEL\ndata: texts.jsonl\n")
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


@pytest.fixture
def home(originals, tmp_path, monkeypatch):
    shutil.copytree(originals, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def tiny(line):
    """The arguments of kdkernels in a line, made to last no longer than they must."""
    given = line[line.index("kdkernels") + 1 :]
    return given + {"train": [*SHORT, *STEPS], "cache": SHORT}.get(given[0], [])


@lines(OURS)
def test_ours(line, home, capsys):
    if "--targets" in line:  # they come from the line before it
        main(
            tiny(next(each for each in LINES.values() if each[:4] == ["python", "-m", "kdkernels", "cache"]))
        )
    with contextlib.suppress(SystemExit) if "--help" in line else contextlib.nullcontext():
        main(tiny(line))
    said = capsys.readouterr().out
    if "--output_dir" in line:
        folder = line[line.index("--output_dir") + 1]
        assert f"is in {folder}/model" in said and (home / folder / "model").is_dir()
        assert "loss" in read_metrics(home / folder / "metrics.jsonl")[0]
        if "--targets" not in line:  # "--resume goes on after a kill"
            main([*tiny(line), "--resume"])
            assert "going on from" in capsys.readouterr().out
    elif line[3] == "cache":
        assert (home / "DIR" / "validation").is_dir() and "bytes per token" in said
    elif line[3] == "make-student":
        assert "of 2 layers without" in said and (home / line[line.index("--out") + 1]).is_dir()
    else:
        assert "native" in said or "--divergence" in said


@pytest.mark.slow
@lines(SHARED)
def test_shared_between_two_processes(line, home):
    """Two, not eight. Shards need accelerate's switch set by hand, or it refuses a CPU."""
    split = "--tensor_parallel" in line  # the two share a model, and so one batch
    (home / "main.py").write_text(TENSOR_PARALLEL_ON_CPU if split else FSDP_ON_CPU)
    by_script = split or "--fsdp" in line
    arguments = [*tiny(line), "--output_dir", str(home / "shared")]
    if split:
        arguments[arguments.index("--tensor_parallel") + 1] = "2"
    script, given = (home / "main.py", [json.dumps([arguments])]) if by_script else (None, arguments)
    run = process(*given, torchrun=True, script=script, cwd=home, timeout=590)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "2 processes" in run.stdout and run.stdout.count("done: step 2") == 1
    alone = [*(part for part in arguments if part != "--fsdp"), "--output_dir", str(home / "alone")]
    for option in {"--deepspeed", "--tensor_parallel"} & set(alone):
        del alone[(at := alone.index(option)) : at + 2]
    main([*alone, *(() if split else ("--per_device_train_batch_size", "8"))])
    for name in ("loss", "grad_norm"):
        ours, theirs = (
            [each[name] for each in read_metrics(home / folder / "metrics.jsonl") if name in each]
            for folder in ("shared", "alone")
        )
        assert len(theirs) == 2 and ours == pytest.approx(theirs, rel=2e-5), name


@pytest.mark.slow
@lines(VERIFY)
def test_verify(line, home):
    """Its options are shown in brackets; that of a device is for those who have one."""
    given = re.sub(r"\[--device cuda\]|[\[\]]", "", " ".join(line)).split()
    assert (
        subprocess.run([sys.executable, *given[1:]], env={"PYTHONPATH": str(ROOT)}, timeout=3000).returncode
        == 0
    )
    assert "--json" not in given or json.loads((home / "FILE").read_text())


# -- the others -------------------------------------------------------------------------------------


@lines(MAKE)
def test_make_has_the_target(line):
    dry = subprocess.run(["make", "-n", *line[1:]], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0 and dry.stdout, dry.stderr


@lines(BENCHMARKS)
def test_benchmarks_take_these_options(line, monkeypatch, capsys):
    module, *given = line[line.index("-m") + 1 :]
    if given[:1] == ["compare"]:
        given = ["compare", *[str(ROOT / "benchmarks" / "results" / "cpu.json")] * 2]
    options = [part for part in given if part.startswith("--")]
    monkeypatch.setattr(sys, "argv", [module, *given, *(["--help"] if given[:1] != ["compare"] else [])])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert all(option in said for option in options) and said


@lines(PYTEST)
def test_pytest_finds_what_is_named(line):
    values = {"cuda", "slow", "aarch64"}  # of --device, -m and -k
    named = [
        part for part in line[line.index("pytest") + 1 :] if not part.startswith("-") and part not in values
    ]
    assert named and all((ROOT / part).exists() for part in named)


@lines(FUZZ)
def test_fuzz(line):
    done = subprocess.run(
        [sys.executable, *line[1:], "--seconds", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and ", 0 failed" in done.stdout, done.stdout + done.stderr
