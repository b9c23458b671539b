"""Teacher targets on disk: what is read is what was written, or an error names what is wrong."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

import kdkernels.teacher_cache.reader as reader_module  # noqa: E402
import kdkernels.teacher_cache.writer as writer_module  # noqa: E402
from benchmarks import pages  # noqa: E402
from benchmarks import teacher_cache as benchmark  # noqa: E402
from kdkernels import SparseTarget  # noqa: E402
from kdkernels.teacher_cache import (  # noqa: E402
    CacheWriter,
    Manifest,
    TeacherCache,
    codec,
    data_fingerprint,
    shards,
)

VOCAB = 1000


def manifest(**changes) -> Manifest:
    given = {
        "model": "teacher",
        "tokenizer": "t" * 8,
        "vocab_size": VOCAB,
        "data": "d" * 8,
        "sequences": 6,
        "method": "top_k",
        "k": 8,
        "values": "float32",
    }
    return Manifest(**(given | changes))


def sequence(index: int, *, tokens: int = 20, k: int = 8, vocab: int = VOCAB):
    """Input ids and a top-k target of a random teacher, with empty slots in some tokens."""
    g = torch.Generator().manual_seed(index)
    logprobs, ids = (3 * torch.randn(tokens, vocab, generator=g)).log_softmax(-1).topk(k, -1)
    empty = torch.rand(tokens, k, generator=g) < 0.2
    empty[3] = True
    ids[empty] = -1
    return torch.randint(vocab, (tokens,), generator=g), SparseTarget(ids, logprobs)


def write(directory: Path, of: Manifest, **options) -> None:
    with CacheWriter(directory, of, **options) as writer:
        for index in writer.todo():
            writer.write(index, *sequence(index))


def dense(target: SparseTarget, vocab: int = VOCAB) -> torch.Tensor:
    """Probabilities [T, V]: what a target means, whatever the order of its slots."""
    t = target.values if target.logprobs is None else target.values.exp()
    t = torch.where(target.ids < 0, 0, t)
    return torch.zeros(*target.leading_shape, vocab).scatter_add_(-1, target.ids.clamp(min=0), t)


def assert_same(record, index: int) -> None:
    input_ids, target = sequence(index)
    assert record.index == index and torch.equal(record.input_ids, input_ids)
    assert torch.equal(dense(record.target), dense(target)) and dense(target).sum() > 1


# --- the codec ---------------------------------------------------------------------------------


def through(target: SparseTarget, dtype: str, vocab: int = VOCAB, draws: int = 0) -> SparseTarget:
    kind = "weights" if target.logprobs is None else "logprobs"
    kept, ids, values = codec.flatten(target)
    columns = codec.encode(kept, ids, values, kind=kind, dtype=dtype, vocab_size=vocab, draws=draws)
    assert columns["gaps"].min() >= 0
    kept, ids, values = codec.decode(columns, kind=kind, dtype=dtype, draws=draws)
    return codec.pad(kept, ids, values, kind=kind, tail=target.tail, slots=int(kept.max()))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0.1, 1.0, 5.0, 30.0]))
def test_eight_bits_stay_within_the_stated_bound_and_keep_the_mass(seed, k, sharpness):
    g = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(12, VOCAB, generator=g, dtype=torch.float64)
    logprobs, ids = logits.log_softmax(-1).topk(k, -1)
    order = ids.argsort(-1)
    true = logprobs.gather(-1, order)
    stored = through(SparseTarget(ids, logprobs.float()), "uint8")
    assert torch.equal(stored.ids, ids.gather(-1, order))
    span = true.amax(-1) - true.amin(-1)
    error = (stored.values - true).abs().amax(-1)
    bound = torch.from_numpy(np.asarray(codec.error_bound(span.numpy())))
    assert (error <= bound + 4e-6 * true.abs().amax(-1)).all()
    mass = stored.values.double().logsumexp(-1) - true.logsumexp(-1)
    assert mass.abs().max() < 1e-5 * max(1, float(true.abs().max()))


def test_the_bound_is_not_slack():
    spread = torch.linspace(-20, -1, 4000)[None]
    error = (
        (through(SparseTarget(torch.arange(4000)[None], spread), "uint8", 4000).values - spread).abs().max()
    )
    assert 0.3 * codec.error_bound(19.0) < error < codec.error_bound(19.0)


def test_bfloat16_keeps_ids_and_mass():
    target = sequence(0)[1]
    stored = through(target, "bfloat16")
    kept = torch.where(stored.ids < 0, -torch.inf, stored.values)
    true = torch.where(target.ids < 0, -torch.inf, target.values)
    assert torch.allclose(kept.logsumexp(-1), true.logsumexp(-1), atol=1e-6)
    full = (dense(target) > 0) & (dense(stored) > 0)
    assert torch.equal(full, dense(target) > 0)
    assert (dense(stored)[full].log() - dense(target)[full].log()).abs().max() < 20 * 2**-8


def test_counts_and_duplicates_are_exact():
    ids = torch.tensor([[5, 5, 2, -1], [7, 7, 7, 7]])
    target = SparseTarget(ids, weights=torch.tensor([[1.0, 2, 1, 9], [1, 1, 1, 1]]) / 4, tail="truncate")
    assert torch.equal(dense(through(target, "count", draws=4)), dense(target))
    with pytest.raises(ValueError, match="multiples of 1/3"):
        through(target, "count", draws=3)
    given_counts = SparseTarget(torch.tensor([[5, 2], [7, -1]]), weights=torch.tensor([[255.0, 1], [256, 0]]))
    says = (
        "token 1 has weight 256 for id 7, which is 65536 of 256 draws, and values 'count' hold at most 65535"
    )
    with pytest.raises(ValueError, match=says):
        through(given_counts, "count", draws=256)


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"ids": [[1, VOCAB]]}, f"token 0 has id {VOCAB} in a vocabulary of {VOCAB}"),
        ({"logprobs": [[-1.0, float("nan")]]}, "token 0 has logprobs nan for id 2"),
    ],
)
def test_what_cannot_be_stored_is_refused(bad, says):
    given = {"ids": [[1, 2]], "logprobs": [[-1.0, -2.0]]} | bad
    with pytest.raises(ValueError, match=says):
        through(SparseTarget(torch.tensor(given["ids"]), torch.tensor(given["logprobs"])), "uint8")


def test_at_most_three_bytes_per_kept_id(tmp_path):
    """K=64, V=152k, 8 bits. Ids without any structure are the worst case: 12.6 bits each at the least."""
    k, vocab, tokens = 64, 152_000, 512
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(vocab, generator=g)[:k] for _ in range(tokens)])
    logprobs = (4 * torch.randn(tokens, k, generator=g)).log_softmax(-1) - 0.1
    of = manifest(vocab_size=vocab, k=k, values="uint8", sequences=4)
    with CacheWriter(tmp_path / "c", of) as writer:
        for index in writer.todo():
            writer.write(index, torch.randint(vocab, (tokens,), generator=g), SparseTarget(ids, logprobs))
    cache = TeacherCache(tmp_path / "c")
    per_id = cache.bytes / (cache.tokens * k)
    assert 2.0 < per_id <= 3.0, per_id
    assert torch.equal(cache[3].target.ids, ids.sort(-1).values)


# --- directories -------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, shard_tokens", [(1, 10**9), (1, 1), (3, 40)])
def test_what_is_read_is_what_was_written(tmp_path, ranks, shard_tokens):
    for rank in range(ranks):
        write(tmp_path / "c", manifest(), rank=rank, world_size=ranks, shard_tokens=shard_tokens)
    cache = TeacherCache(tmp_path / "c", require={"vocab_size": VOCAB})
    assert len(cache) == 6 and cache.tokens == 120
    for index, record in enumerate(cache.stream(prefetch=2)):
        assert_same(record, index)
    order = [4, 1, 1, 5]
    assert [record.index for record in cache.stream(order)] == order
    assert_same(cache[2], 2)


def test_several_short_sequences_share_a_row_group(tmp_path):
    write(tmp_path / "c", manifest(sequences=240))
    file = next((tmp_path / "c").glob("*.parquet"))
    groups = -(-240 // -(-writer_module.ROW_GROUP_TOKENS // 20))
    assert pq.ParquetFile(file).metadata.num_row_groups == groups > reader_module.OPEN_ROW_GROUPS
    cache = TeacherCache(tmp_path / "c")
    for index in torch.randperm(240).tolist():
        assert_same(cache[index], index)


def test_a_cache_goes_to_worker_processes(tmp_path):
    write(tmp_path / "c", manifest(), shard_tokens=40)
    cache = TeacherCache(tmp_path / "c")
    assert_same(cache[0], 0)
    loader = torch.utils.data.DataLoader(cache, batch_size=None, num_workers=1, shuffle=False)
    for index, record in enumerate(loader):
        assert_same(record, index)


def test_memory_and_threads_are_bounded(tmp_path):
    import threading

    write(tmp_path / "c", manifest(sequences=40), shard_tokens=20)
    cache, before = TeacherCache(tmp_path / "c"), threading.active_count()
    stream = cache.stream(prefetch=3)
    next(stream)
    time.sleep(0.3)
    assert len(cache._groups) <= 4 and len(cache._verified) <= 6  # 1 taken, 3 queued, 1 in hand
    stream.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("prefetch, error", [(None, TypeError), (0, ValueError), (-1, ValueError)])
def test_a_prefetch_without_a_bound_is_refused(tmp_path, prefetch, error):
    """When it is asked for, not when the first record is; None would wait for ever."""
    write(tmp_path / "c", manifest())
    with pytest.raises(error, match="prefetch must be .*, got"):
        TeacherCache(tmp_path / "c").stream(prefetch=prefetch)


def test_every_flipped_byte_is_found_and_named(tmp_path):
    write(tmp_path / "c", manifest(), shard_tokens=60)
    victim = sorted((tmp_path / "c").glob("*.parquet"))[1]
    good = victim.read_bytes()
    for where in np.linspace(0, len(good) - 1, 25).astype(int):
        bad = bytearray(good)
        bad[where] ^= 0x10
        victim.write_bytes(bad)
        cache = TeacherCache(tmp_path / "c")
        assert_same(cache[0], 0)
        with pytest.raises(ValueError, match=f"{victim.name} is damaged.*resume writing"):
            list(cache.stream())
    victim.write_bytes(good)
    assert len(list(TeacherCache(tmp_path / "c").stream())) == 6


def test_a_page_that_rots_under_an_open_cache_is_found(tmp_path):
    write(tmp_path / "c", manifest(sequences=60))
    cache = TeacherCache(tmp_path / "c")
    assert_same(cache[0], 0)
    victim = next((tmp_path / "c").glob("*.parquet"))
    metadata = pq.ParquetFile(victim).metadata
    column = metadata.row_group(metadata.num_row_groups - 1).column(2)
    with open(victim, "r+b") as file:
        file.seek(column.data_page_offset + column.total_compressed_size - 3)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match=f"{victim.name} is damaged: .*CRC"):
        cache[59]


def test_damaged_records_and_manifests_are_named(tmp_path):
    write(tmp_path / "c", manifest(), shard_tokens=60)
    record = sorted((tmp_path / "c").glob("shard-*.json"))[0]
    text = record.read_text()
    record.write_text(text[:20])
    with pytest.raises(ValueError, match=f"{record.name} is damaged"):
        TeacherCache(tmp_path / "c")
    rows = json.loads(text) | {"rows": [0, 2, 1]}
    record.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="row 1 is not sequence 2"):
        TeacherCache(tmp_path / "c")[2]
    record.write_text(json.dumps(rows | {"rows": [0, 1, 5]}))
    with pytest.raises(ValueError, match="sequence 5 is also in shard-0000-000000.parquet"):
        TeacherCache(tmp_path / "c")
    for wrong in ({"rows": ["a"]}, {"rows": None}, {"bytes": "1"}, {"sha256": None}):
        record.write_text(json.dumps(rows | wrong))
        with pytest.raises(ValueError, match=f"{record.name} is damaged .*; delete it and its shard"):
            TeacherCache(tmp_path / "c")
    record.unlink()
    with pytest.raises(
        ValueError, match="3 of 6 sequences; sequence 0 is the first that it lacks; run the command"
    ):
        TeacherCache(tmp_path / "c")
    record.write_text(text)
    path = tmp_path / "c" / "manifest.json"
    path.write_text(path.read_text().replace('"shift": 1', '"shift": 0'))
    with pytest.raises(ValueError, match=f"{record.name} belongs to manifest"):
        TeacherCache(tmp_path / "c")
    path.write_text("{")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        TeacherCache(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="is no teacher cache"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize(
    "field, value", [("tokenizer", "other"), ("vocab_size", 32), ("data", "another order")]
)
def test_training_with_something_else_is_refused_with_both_values(tmp_path, field, value):
    write(tmp_path / "c", manifest())
    made_with = repr(getattr(manifest(), field))
    with pytest.raises(ValueError, match=f"made with {field} {made_with}, but this run has {value!r}"):
        TeacherCache(tmp_path / "c", require={field: value})


def test_data_order_changes_the_fingerprint():
    assert data_fingerprint([[1, 2], [3]]) == data_fingerprint([torch.tensor([1, 2]), np.array([3])])
    assert len({data_fingerprint(d) for d in ([[1, 2], [3]], [[3], [1, 2]], [[1], [2, 3]], [[1, 2, 3]])}) == 4


def test_nothing_of_the_user_is_overwritten(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="thesis.tex"):
        CacheWriter(tmp_path / "c", manifest())
    assert (tmp_path / "c" / "thesis.tex").read_text() == "mine"
    assert len(list((tmp_path / "c").iterdir())) == 1  # nothing is left beside it
    write(tmp_path / "d", manifest())
    for other, says in (({"k": 16}, "k 8, not 16"), ({"weights": "w"}, "weights None, not 'w'")):
        with pytest.raises(FileExistsError, match=says):
            CacheWriter(tmp_path / "d", manifest(**other))
    before = {p: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    write(tmp_path / "d", manifest())  # complete: nothing to do
    assert {p: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before


def test_a_writer_takes_each_sequence_once_and_only_its_own(tmp_path):
    with CacheWriter(tmp_path / "c", manifest(), rank=1, world_size=2) as writer:
        assert writer.todo() == [1, 3, 5]
        writer.write(1, *sequence(1))
        for index, says in ((1, "already written"), (2, "not for rank 1 of 2"), (6, "not one of 6")):
            with pytest.raises(ValueError, match=says):
                writer.write(index, *sequence(index))
        with pytest.raises(ValueError, match="sequence 3 has 9 tokens but a target"):
            writer.write(3, torch.zeros(9, dtype=torch.int64), sequence(3)[1])
        with pytest.raises(RuntimeError, match="as rank 1"):
            CacheWriter(tmp_path / "c", manifest(), rank=1, world_size=2)
    with CacheWriter(tmp_path / "c", manifest()) as writer:  # another number of ranks goes on
        assert writer.todo() == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
def test_any_integer_is_an_index(tmp_path, integer):
    with CacheWriter(tmp_path / "c", manifest()) as writer:
        for index in writer.todo():
            writer.write(integer(index), *sequence(index))
    assert_same(TeacherCache(tmp_path / "c")[5], 5)


@pytest.mark.parametrize("index", [1.0, np.float64(1), None, "1", torch.tensor(1.0)], ids=repr)
def test_what_is_no_index_loses_nothing(tmp_path, index):
    with CacheWriter(tmp_path / "c", manifest()) as writer:
        writer.write(0, *sequence(0))
        with pytest.raises(TypeError, match="index must be an int, got"):
            writer.write(index, *sequence(1))
    assert CacheWriter(tmp_path / "c", manifest()).todo() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "ids, says",
    [
        ([1.0, 2.5], "sequence 1 has input_ids of float64, not of an integer type"),
        ([True, False], "sequence 1 has input_ids of bool, not of an integer type"),
        ([1, 2**31], "sequence 1 has id 2147483648 at 1, which does not fit in 32 bits"),
        ([-(2**31) - 1, 2], "sequence 1 has id -2147483649 at 0, which does not fit in 32 bits"),
        (np.array([1, 2**63], np.uint64), "sequence 1 has id 9223372036854775808 at 1"),
        ([[1, 2], [3, 4]], r"sequence 1 has input_ids \[2, 2\], not \[T\]"),
        ([[1, 2], [3]], "sequence 1 has input_ids that are no array"),
        (7, r"sequence 1 has input_ids \[\], not \[T\]"),
    ],
    ids=str,
)
def test_tokens_that_would_be_changed_are_refused(tmp_path, ids, says):
    """Before they are in a shard with others."""
    target = SparseTarget(torch.tensor([[3], [4]]), torch.tensor([[-1.0], [-2.0]]))
    extremes = [-(2**31), 2**31 - 1]
    with CacheWriter(tmp_path / "c", manifest(sequences=2)) as writer:
        writer.write(0, extremes, target)
        with pytest.raises(ValueError, match=says) as error:
            writer.write(1, ids, target)
        assert "\n" not in str(error.value)
        writer.write(1, np.array([8, 9], np.uint16), target)
    cache = TeacherCache(tmp_path / "c")
    assert [record.input_ids.tolist() for record in cache.stream()] == [extremes, [8, 9]]


def test_a_closed_writer_takes_nothing(tmp_path):
    """Another may have its rank by then."""
    writer = CacheWriter(tmp_path / "c", manifest())
    writer.write(0, *sequence(0))
    writer.close()
    with pytest.raises(RuntimeError, match="c is closed; open another, which goes on where it was"):
        writer.write(1, *sequence(1))
    writer.close()
    assert CacheWriter(tmp_path / "c", manifest()).todo() == [1, 2, 3, 4, 5]


def test_a_shard_without_tokens(tmp_path):
    nothing = SparseTarget(torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1))
    with CacheWriter(tmp_path / "c", manifest(sequences=2)) as writer:
        assert writer.bytes_per_token is None
        writer.write(0, [], nothing)
        writer.commit()
        assert writer.bytes_per_token is None
        writer.write(1, *sequence(1))
        writer.commit()
        assert writer.bytes_per_token > 1
    cache = TeacherCache(tmp_path / "c")
    assert cache[0].input_ids.shape == (0,) and cache[0].target.ids.shape == (0, 1)
    assert_same(cache[1], 1)


def test_files_are_on_disk_before_they_have_a_name(tmp_path, monkeypatch):
    """fsync of the file, rename, fsync of the directory; the record only after its shard."""
    events, names = [], {}
    replace, fsync, open_ = os.replace, os.fsync, os.open

    def opened(path, *rest):
        handle = open_(path, *rest)
        names[handle] = Path(path).name
        return handle

    def replaced(source, target):
        events.append(("replace", Path(target).name))
        return replace(source, target)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(("fsync", names[handle])), fsync(handle)))
    monkeypatch.setattr(os, "replace", replaced)
    write(tmp_path / "c", manifest())
    files = ["manifest.json", "shard-0000-000000.parquet", "shard-0000-000000.json"]
    assert events == [
        event for file in files for event in (("fsync", file + ".tmp"), ("replace", file), ("fsync", "c"))
    ]


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path, monkeypatch):
    """The disk fills up within a shard: what was committed stays, what was cut off is never committed."""
    to_table = shards.to_table

    def full(rows, of):
        if rows[0][0] == 4:
            os.truncate(next((tmp_path / "c").glob("*.tmp")), 100)
            raise OSError(28, "No space left on device")
        return to_table(rows, of)

    monkeypatch.setattr(shards, "to_table", full)
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 20)  # one sequence each
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "c", manifest(), shard_tokens=60)
    monkeypatch.undo()
    with CacheWriter(tmp_path / "c", manifest()) as writer:
        assert writer.todo() == [3, 4, 5]
    write(tmp_path / "c", manifest())
    for index, record in enumerate(TeacherCache(tmp_path / "c").stream()):
        assert_same(record, index)


def test_a_commit_that_fails_is_tried_again_with_the_same_rows(tmp_path, monkeypatch):
    replace, failed = os.replace, []

    def once(source, target):
        if Path(target).suffix == ".parquet" and not failed:
            failed.append(target)
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with CacheWriter(tmp_path / "c", manifest(), shard_tokens=60) as writer:
        for index in [*range(6), *range(3)]:  # the first three are lost, and written once more
            try:
                writer.write(index, *sequence(index))
            except OSError:
                assert index == 2
    for index, record in enumerate(TeacherCache(tmp_path / "c").stream()):
        assert_same(record, index)


WRITER = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_teacher_cache import manifest, sequence
    from kdkernels.teacher_cache import CacheWriter
    rank, ranks, pause = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    with CacheWriter(sys.argv[1], manifest(sequences=60), rank=rank, world_size=ranks, shard_tokens=60) as writer:
        for index in writer.todo():
            writer.write(index, *sequence(index))
            time.sleep(pause)
"""


def start(directory: Path, rank: int, ranks: int, pause: float) -> subprocess.Popen:
    code = textwrap.dedent(WRITER.format(tests=str(Path(__file__).parent)))
    return subprocess.Popen([sys.executable, "-c", code, str(directory), str(rank), str(ranks), str(pause)])


@pytest.mark.slow
def test_killed_writers_resume_without_a_lost_or_doubled_row(tmp_path):
    """Two real processes write at once, are killed in the middle, and are started again."""
    writers = [start(tmp_path / "c", rank, 2, 0.02) for rank in range(2)]
    deadline = time.time() + 60
    while len(list((tmp_path / "c").glob("shard-*.json"))) < 4 and time.time() < deadline:
        time.sleep(0.01)
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
    done = len(list((tmp_path / "c").glob("shard-*.json")))
    assert 4 <= done < 20
    with pytest.raises(ValueError, match="of 60 sequences"):
        TeacherCache(tmp_path / "c")
    # What a kill between the two renames leaves: a shard without its record does not count.
    (tmp_path / "c" / "shard-0001-000900.parquet").write_bytes(b"half a shard")
    for writer in [start(tmp_path / "c", rank, 2, 0.0) for rank in range(2)]:
        assert writer.wait(timeout=120) == 0
    cache = TeacherCache(tmp_path / "c")
    assert (
        not list((tmp_path / "c").glob("*.tmp"))
        and not (tmp_path / "c" / "shard-0001-000900.parquet").exists()
    )
    for index, record in enumerate(cache.stream()):
        assert_same(record, index)
    assert sum(len(shard.rows) for shard in cache.shards) == 60


def test_stacked_targets_mean_the_same():
    targets = [sequence(0, tokens=5, k=3)[1], sequence(1, tokens=9, k=8)[1]]
    batch = SparseTarget.collate(targets)
    assert batch.ids.shape == (2, 9, 8)
    for row, target in zip(batch, targets, strict=False):
        assert (
            torch.equal(dense(row)[: len(target.ids)], dense(target))
            and not dense(row)[len(target.ids) :].any()
        )


def test_bytes_in_docs_are_the_committed_ones():
    committed = json.loads((pages.ROOT / "benchmarks" / "results" / "cpu-cache.json").read_text())
    assert pages.is_filled("cache", benchmark.table(committed))
