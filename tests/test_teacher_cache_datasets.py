"""Caches as datasets, and back."""

import pytest
import torch
from test_teacher_cache import VOCAB, assert_same, dense, manifest, sequence, write

datasets = pytest.importorskip("datasets")

from kdkernels import SparseTarget  # noqa: E402
from kdkernels.teacher_cache import TeacherCache  # noqa: E402
from kdkernels.teacher_cache.hf_datasets import from_dataset, to_dataset  # noqa: E402

OF = {"model": "teacher", "tokenizer": "t", "vocab_size": VOCAB, "values": "float32"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def same_as_written(row, index):
    input_ids, target = sequence(index)
    assert list(row["input_ids"]) == input_ids.tolist()
    for t, (ids, logprobs) in enumerate(zip(row["ids"], row["logprobs"], strict=True)):
        one = SparseTarget(torch.tensor([[*ids, -1]]), torch.tensor([[*logprobs, 0.0]]))
        assert torch.equal(dense(one)[0], dense(target)[t])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cache_is_a_dataset_and_back(tmp_path, streaming):
    write(tmp_path / "c", manifest(), shard_tokens=40)
    dataset = to_dataset(tmp_path / "c", streaming=streaming)
    for index, row in enumerate(dataset):
        same_as_written(row, index)
    made = from_dataset(dataset, tmp_path / "d", **OF)
    assert made.sequences == 6 and made.method == "given" and made.kind == "logprobs"
    for index, record in enumerate(TeacherCache(tmp_path / "d").stream()):
        assert_same(record, index)


def test_another_cache_in_the_same_place_is_another_dataset(tmp_path):
    write(tmp_path / "c", manifest(sequences=2))
    assert len(to_dataset(tmp_path / "c")) == 2
    for path in (tmp_path / "c").iterdir():
        path.unlink()
    write(tmp_path / "c", manifest(sequences=3))
    assert len(to_dataset(tmp_path / "c")) == 3


def test_a_dataset_of_the_users_own(tmp_path):
    """Padded with -1, weights, already with other columns."""
    rows = {
        "text": ["a", "b"],
        "input_ids": [[1, 2], [3]],
        "ids": [[[5, 7], [2, -1]], [[9, -1]]],
        "weights": [[[0.5, 0.25], [1.0, 0.0]], [[0.75, 0.0]]],
    }
    dataset = datasets.Dataset.from_dict(rows)
    from_dataset(dataset, tmp_path / "c", **OF, tail="truncate")
    cache = TeacherCache(tmp_path / "c")
    assert cache.manifest.kind == "weights" and cache[0].target.tail == "truncate"
    assert dense(cache[0].target)[0, [5, 7]].tolist() == [0.5, 0.25]
    assert cache[1].target.ids.tolist() == [[9]]
    stream = datasets.IterableDataset.from_generator(lambda: iter(dataset))  # which knows no columns
    assert from_dataset(stream, tmp_path / "s", **OF, tail="truncate") == cache.manifest
    empty = datasets.Dataset.from_dict({"input_ids": [[1], []], "ids": [[[5]], []], "weights": [[[1.0]], []]})
    with pytest.raises(ValueError, match="row 1 has no tokens; leave it out"):
        from_dataset(empty, tmp_path / "n", **OF, tail="truncate")
    with pytest.raises(ValueError, match="no column logprobs"):
        from_dataset(dataset.remove_columns("weights"), tmp_path / "d", **OF)
    for no_id in (2.5, float("nan"), float("inf")):
        broken = datasets.Dataset.from_dict({"input_ids": [[1]], "ids": [[[no_id]]], "weights": [[[1.0]]]})
        with pytest.raises(ValueError, match=f"row 0 has {no_id} for an id, not an integer"):
            from_dataset(broken, tmp_path / str(no_id), **OF, tail="truncate")
    ragged = dataset.map(lambda row: {"weights": [[1.0]] * len(row["ids"])})
    with pytest.raises(ValueError, match="row 0 has other slots in weights"):
        from_dataset(ragged, tmp_path / "e", **OF)
