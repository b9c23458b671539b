"""From `cache` to `train soft --targets`: the student learns what it would learn from the live teacher."""

import dataclasses
import json
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

for name in ("pyarrow", "transformers", "accelerate", "tokenizers"):
    pytest.importorskip(name)

import kdkernels as kd  # noqa: E402
from kdkernels.commands import cache as cache_command  # noqa: E402
from kdkernels.commands import train as train_command  # noqa: E402
from kdkernels.integrations.transformers import call_through_head  # noqa: E402
from kdkernels.teacher_cache import TeacherCache, tokenizer_hash  # noqa: E402
from kdkernels.trainer import data, models, train  # noqa: E402
from kdkernels.trainer.cached import CachedSequences  # noqa: E402
from kdkernels.trainer.command_line import resolve  # noqa: E402
from kdkernels.trainer.errors import UserError  # noqa: E402
from kdkernels.trainer.files import read_metrics  # noqa: E402
from kdkernels.trainer.folder import METRICS, RESULT  # noqa: E402

K = 12
DATA = {"max_length": 48, "validation_share": 0.2, "validation_sequences": 6}
RUN = {
    "use_cpu": True,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "eval_steps": 3,
    "save_steps": 100,
    "logging_steps": 1,
    "disable_tqdm": True,
    "learning_rate": 3e-3,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with text, and a teacher that was trained on it for a few steps."""
    home = tmp_path_factory.mktemp("cache")
    (home / "text").mkdir()
    for name in ("bisect", "keyword", "colorsys", "sched", "this", "stat"):
        shutil.copy(Path(sysconfig.get_paths()["stdlib"], f"{name}.py"), home / "text")
    train.run(settings(home, "hard", "teacher", student="micro", tokenizer_size=400, max_steps=30))
    return home


def settings(home: Path, mode: str, name: str, **values):
    given = {**DATA, **RUN, "data": [str(home / "text")], "student": "micro", "output_dir": str(home / name)}
    return resolve(mode, {**given, **values})


def teacher(home: Path) -> str:
    return str(home / "teacher" / "model")


def cached(home: Path, name: str, *options: str) -> Path:
    """``python -m kdkernels cache``, one sequence at a time."""
    shared = [str(part) for key, value in DATA.items() for part in (f"--{key}", value)]
    cache_command.main(
        [
            "--teacher",
            teacher(home),
            "--data",
            str(home / "text"),
            "--out",
            str(home / name),
            "--batch_size",
            "1",
            *shared,
            *options,
        ]
    )
    return home / name


def from_cache(home: Path, name: str, targets: Path, **values) -> dict:
    return train.run(settings(home, "soft", name, tokenizer=teacher(home), targets=str(targets), **values))


def losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / METRICS).read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def live_top_k(self, inputs):
    """The teacher in memory. As the cache was made: row by row without padding, slots in the order of their ids."""
    rows, length = [], inputs["input_ids"].shape[1]
    for row, ids in enumerate(inputs["input_ids"]):
        size = int(inputs["attention_mask"][row].sum()) if "attention_mask" in inputs else length
        with torch.no_grad():
            head = call_through_head(self.teacher, {"input_ids": ids[None, :size]}, lambda head: head)
        target = kd.top_k_target(dataclasses.replace(head, hidden=head.hidden[0]), K)
        order = target.ids.argsort(-1)
        rows.append(kd.SparseTarget(target.ids.gather(-1, order), target.logprobs.gather(-1, order)))
    return kd.SparseTarget.collate(rows)


def test_the_students_loss_from_the_cache_is_that_of_the_live_teacher_exactly(home, monkeypatch):
    directory = cached(home, "exact", "--top_k", str(K), "--values", "float32")
    result = from_cache(home, "from-cache", directory)
    with monkeypatch.context() as patch:
        patch.setattr(train.ReliableTrainer, "teacher_target", live_top_k)
        live = train.run(settings(home, "soft", "live", teacher=teacher(home)))
    assert losses(home / "from-cache") == losses(home / "live") and len(losses(home / "live")) == 6
    assert (
        result["eval_loss"] == live["eval_loss"] and result["eval_target_kl"] == live["eval_target_kl"] > 0.01
    )
    ours, theirs = weights(home / "from-cache"), weights(home / "live")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    start = models.load_model(
        "micro", models.AutoTokenizer.from_pretrained(teacher(home)), dtype="float32", seed=42, max_length=48
    ).state_dict()
    assert any(not torch.equal(ours[name], start[name]) for name in ours)


def test_eight_bits_train_as_well(home):
    directory = cached(home, "small", "--top_k", str(K))
    assert TeacherCache(directory).manifest.values == "uint8"
    cached(home, "exact", "--top_k", str(K), "--values", "float32")  # there from above, or made here
    exact = from_cache(home, "from-exact", home / "exact")
    eight = from_cache(home, "from-eight-bits", directory)
    assert eight["eval_target_kl"] == pytest.approx(exact["eval_target_kl"], rel=2e-3)
    assert eight["eval_hard"] == pytest.approx(exact["eval_hard"], rel=1e-4)


def test_without_validation(home):
    directory = cached(home, "no-validation", "--top_k", "4", "--validation_share", "0")
    assert not (directory / "validation").exists()
    result = from_cache(home, "no-validation-run", directory, validation_share=0.0, max_steps=1)
    assert result["steps"] == 1 and "eval_loss" not in result


def test_a_cache_of_the_users_own_pipeline_trains(home):
    """The same targets through `datasets`: same fingerprint, same loss."""
    pytest.importorskip("datasets")
    from kdkernels.teacher_cache.hf_datasets import from_dataset, to_dataset

    directory = cached(home, "mine", "--top_k", "4", "--values", "float32", "--validation_share", "0")
    of = TeacherCache(directory).manifest
    made = from_dataset(
        to_dataset(directory, streaming=True),
        home / "via-datasets",
        model=of.model,
        values="float32",
        tokenizer=of.tokenizer,
        vocab_size=of.vocab_size,
    )
    assert made.data == of.data
    for name, targets in (("mine-run", directory), ("via-run", home / "via-datasets")):
        from_cache(home, name, targets, validation_share=0.0, max_steps=2)
    assert losses(home / "mine-run") == losses(home / "via-run") != []


@pytest.mark.parametrize(
    "options, kind, values",
    [
        (["--samples", "16"], "weights", "count"),
        (["--samples", "16", "--proposal_temperature", "0.8"], "weights", "uint8"),
        (["--top_p", "0.7"], "logprobs", "uint8"),
    ],
)
def test_samples_and_top_p(home, options, kind, values):
    directory = cached(home, "-".join(options).replace("--", ""), *options)
    cache = TeacherCache(directory)
    assert (cache.manifest.kind, cache.manifest.values) == (kind, values)
    target = cache[0].target
    mass = (target.values if kind == "weights" else target.values.exp()).sum(-1)
    assert mass[-1] == 0  # nothing follows the last token
    assert {"count": mass[:-1].allclose(torch.ones(1)), "uint8": bool((mass[:-1] > 0.65).all())}[values]
    tail = {"weights": "truncate", "logprobs": "bucket"}[kind]
    assert cache.manifest.tail == tail
    assert from_cache(home, directory.name + "-run", directory, max_steps=1)["steps"] == 1


def test_draws_do_not_depend_on_where_a_run_was_interrupted(home, monkeypatch, capsys):
    whole = TeacherCache(cached(home, "whole", "--samples", "8"))
    written, wrote = cache_command.CacheWriter.write, []

    def interrupted(writer, index, *rest):
        if len(wrote) == 5:
            raise KeyboardInterrupt
        wrote.append(index)
        written(writer, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(cache_command.CacheWriter, "write", interrupted)
        patch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(KeyboardInterrupt):
            cached(home, "parts", "--samples", "8")
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command goes on with it"
    with pytest.raises(ValueError, match=f"has 5 of {len(whole)} sequences"):
        TeacherCache(home / "parts")
    parts = TeacherCache(cached(home, "parts", "--samples", "8", "--batch_size", "3"))
    for a, b in zip(whole.stream(), parts.stream(), strict=True):
        assert torch.equal(a.target.ids, b.target.ids) and torch.equal(a.target.values, b.target.values)


def test_ranks_share_the_work(home, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        cached(home, "ranks", "--top_k", "4")
        said, bar = capsys.readouterr()
        assert "bytes/token" in bar and "tok/s" in bar
        assert ("complete when the others are" in said) == (rank == 0)
    assert "bytes per token" in said
    assert {shard.file[:10] for shard in TeacherCache(home / "ranks").shards} == {"shard-0000", "shard-0001"}


def test_the_command_that_the_cache_prints_trains_on_it(home, capsys):
    """With the same data, split and lengths; what is measured against its few outcomes has names of its own."""
    cached(home, "prints", "--top_k", "4", "--text_field", "body of it")
    line = (
        capsys.readouterr()
        .out.splitlines()[-1]
        .replace("STUDENT", "micro")
        .replace("RUN", str(home / "printed"))
    )
    arguments = shlex.split(line)
    assert arguments[:4] == ["python", "-m", "kdkernels", "train"] and "body of it" in arguments
    train_command.main([*arguments[4:], "--max_steps", "2", "--logging_steps", "1"])
    said = capsys.readouterr().out
    assert f"what it said is in {home / 'prints'}" in said and "target_kl" in said and " kl" not in said
    result = json.loads((home / "printed" / RESULT).read_text())
    measured = {name for name in result if name.startswith("eval_")}
    about_target = {f"eval_target_{n}" for n in ("kl", "student_entropy", "teacher_entropy", "agreement")}
    assert about_target | {"eval_loss", "eval_hard"} <= measured
    assert not measured & {"eval_kl", "eval_student_entropy", "eval_teacher_entropy", "eval_agreement"}
    logged = [line for line in read_metrics(home / "printed" / METRICS) if "loss" in line]
    assert {"target_kl", "target_agreement", "soft"} <= logged[0].keys() and "kl" not in logged[0]


def test_another_tokenizer_vocabulary_or_order_of_data_is_refused(home):
    directory = cached(home, "refused", "--top_k", "4")
    made = TeacherCache(directory).manifest
    with pytest.raises(UserError, match=f"made with sequences {made.sequences}, but this run has"):
        from_cache(home, "refused-length", directory, max_length=40)
    given = train.ingredients(
        settings(home, "soft", "refused-order", tokenizer=teacher(home), targets=str(directory))
    )
    assert len(CachedSequences(given.train, directory, given.tokenizer)) == made.sequences
    with pytest.raises(UserError, match=f"made with data {made.data!r}, but this run has '"):
        CachedSequences(data.Sequences(given.train.rows[::-1]), directory, given.tokenizer)
    other = models.train_tokenizer(["def f(x):\n    return x\n"] * 3, 300)
    other.save_pretrained(home / "other-tokenizer")
    both = f"made with tokenizer {made.tokenizer!r}, but this run has {tokenizer_hash(other)!r}"
    with pytest.raises(UserError, match=both):
        train.run(
            settings(
                home, "soft", "refused-t", tokenizer=str(home / "other-tokenizer"), targets=str(directory)
            )
        )
    shutil.copytree(directory, home / "refused-nothing-held-out", ignore=shutil.ignore_patterns("validation"))
    with pytest.raises(UserError, match="no targets for the validation text; --validation_share 0"):
        from_cache(home, "refused-v", home / "refused-nothing-held-out")
    with pytest.raises(UserError, match="--teacher or --targets, not both"):
        from_cache(home, "refused-both", directory, teacher=teacher(home))
    with pytest.raises(UserError, match="is no teacher cache"):
        from_cache(home, "refused-none", home / "text")


def test_a_divergence_that_a_tail_does_not_have_is_one_line(home):
    directory = cached(home, "drawn", "--samples", "4")
    with pytest.raises(UserError, match="drawn: tail='truncate' defines kd.ForwardKL.. only, got JSD"):
        from_cache(home, "drawn-jsd", directory, divergence="jsd:0.5")


def test_damage_stops_training_and_is_named(home):
    directory = shutil.copytree(cached(home, "refused", "--top_k", "4"), home / "damaged")
    victim = next(directory.glob("*.parquet"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match=f"{victim.name} is damaged"):
        from_cache(home, "from-damaged", directory)
    assert not (home / "from-damaged" / RESULT).exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ["--top_k", "4", "--samples", "4"],
            "give one of --top_k, --top_p and --samples, not top_k and samples",
        ),
        ([], "not none"),
        (["--top_p", "1.5"], "top_p=1.5 is no share from 0 to 1"),
        (["--top_k", "4", "--max_k", "9"], "max_k=9 is of --top_p, not of --top_k; leave it out"),
        (["--top_k", "4", "--seed", "9"], "seed=9 is of --samples"),
        (["--top_p", "0.5", "--proposal_temperature", "2"], "proposal_temperature=2.0 is of --samples"),
        (["--samples", "4", "--proposal_temperature", "0"], "proposal_temperature=0.0 must be above 0"),
        (["--top_p", "0.5", "--max_k", "-1"], "max_k=-1 must be 0 or more"),
        (["--top_k", "4", "--batch_size", "0"], "batch_size=0 must be 1 or more"),
        (["--top_k", "4", "--shard_tokens", "0"], "shard_tokens=0 must be 1 or more"),
        (["--top_k", "4", "--max_length", "1"], "needs 2 tokens or more"),
        (["--top_k", "4", "--validation_share", "1"], "is no share from 0 to below 1"),
        (["--top_k", "4", "--dtype", "foo"], "dtype=foo: there are float32 and bfloat16"),
        (["--top_k", "4", "--bogus", "1"], "unknown options --bogus 1; see --help"),
        (["--top_k", "4", "--data", "a.txt"], "--data is given twice; give all its values after one"),
        (["--top_k", "4", "--teacher", "micro"], "made from scratch and knows nothing"),
        (["--top_k", "4", "--values", "int3"], "values is one of float32"),
    ],
)
def test_what_is_wrong_is_one_line(home, tmp_path, arguments, says):
    given = [
        "--teacher",
        teacher(home),
        "--data",
        str(home / "text"),
        "--out",
        str(tmp_path / "c"),
        *arguments,
    ]
    with pytest.raises(SystemExit) as stop:
        cache_command.main(given)
    assert says in str(stop.value) and "\n" not in str(stop.value).strip()
    assert not list(tmp_path.glob("c/shard*"))


def test_what_is_there_is_not_made_again(home, monkeypatch):
    cached(home, "twice", "--top_k", "4")
    before = {path: path.stat().st_mtime_ns for path in (home / "twice").rglob("*.parquet")}
    monkeypatch.setattr(cache_command, "load_teacher", None)  # not needed, not called
    cached(home, "twice", "--top_k", "4")
    assert {path: path.stat().st_mtime_ns for path in (home / "twice").rglob("*.parquet")} == before
    (home / "empty.txt").write_text("")
    for name, says in (("empty.txt", "no text in .*empty.txt"), ("nowhere.txt", "no data .*nowhere.txt")):
        asked = ["--teacher", teacher(home), "--top_k", "4", "--data", str(home / name)]
        with pytest.raises(SystemExit, match=says):
            cache_command.main([*asked, "--out", str(home / "nothing")])


def test_another_teacher_under_the_same_name_does_not_go_on(home, tmp_path, capsys):
    """Nor one of another dtype, nor with another seed where tokens are drawn."""
    named = shutil.copytree(teacher(home), tmp_path / "teacher")
    asked = ["--teacher", str(named), "--data", str(home / "text"), "--out", str(tmp_path / "c")]
    asked += ["--samples", "4", "--max_length", "48", "--validation_share", "0"]
    cache_command.main(asked)
    for changed, says in (
        (["--dtype", "bfloat16"], "dtype 'float32', not"),
        (["--seed", "1"], "seed 42, not 1"),
    ):
        with pytest.raises(SystemExit, match=f"has a cache with {says}"):
            cache_command.main([*asked, *changed])
    (weights_file,) = named.glob("*.safetensors")
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(SystemExit, match="has a cache with weights '.*; choose another directory"):
        cache_command.main(asked)


def test_only_learnt_tokens_are_kept(home):
    """Prompts have no label, so their tokens need no target; another mask is another cache."""
    rows = [([1, 2, 3, 4, 5], [-100, -100, 3, 4, 5])]
    tokenizer = models.AutoTokenizer.from_pretrained(teacher(home))
    model = models.load_model(teacher(home), tokenizer, dtype="float32", seed=0, max_length=48).eval()
    batch = data.Collator(0)([data.Sequences(rows)[0]])
    settings = cache_command.CacheSettings(teacher="", out="", top_k=3)
    (target,) = cache_command.targets(
        model, batch, cache_command.select(settings, [0], len(tokenizer), "bucket")
    )
    assert (target.ids >= 0).any(-1).tolist() == [False, True, True, True, False]
    assert data.Sequences(rows).fingerprint() != data.Sequences([(rows[0][0], rows[0][0])]).fingerprint()


def test_help_is_there(capsys):
    for main, arguments in ((cache_command.main, ["--help"]), (train_command.main, ["soft", "--help"])):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "targets" in capsys.readouterr().out
    assert "kdkernels.commands.cache" in sys.modules
