"""SparseTargets in batches: joined, cast, pinned, loaded."""

import io

import pytest
import torch
from torch.utils.data import DataLoader

import kdkernels as kd

TEACHERS = [torch.randn(t, 30, generator=torch.Generator().manual_seed(t)) for t in (2, 4, 3)]


def targets(kind):
    if kind == "weights":
        return [kd.sample_target(teacher, 3 + i) for i, teacher in enumerate(TEACHERS)]
    made = [kd.top_k_target(teacher, 3 + i) for i, teacher in enumerate(TEACHERS)]
    if kind == "masks":
        made[1] = kd.SparseTarget(made[1].ids, made[1].logprobs, mask=torch.rand(made[1].ids.shape) < 0.7)
    return made


@pytest.mark.parametrize("kind", ["logprobs", "weights", "masks"])
def test_a_batch_is_its_parts(kind):
    parts = targets(kind)
    students = [torch.randn(len(t), 30) for t in TEACHERS]
    each = [kd.kl_div(s, t, reduction="none") for s, t in zip(students, parts)]
    together = kd.kl_div(torch.cat(students), kd.SparseTarget.cat(parts), reduction="none")
    assert torch.allclose(together, torch.cat(each), atol=1e-6) and together.any()
    batch = kd.SparseTarget.collate(parts)
    assert batch.leading_shape == (3, 4) and not batch.ids[0, 2:].ge(0).any()
    padded = torch.nn.utils.rnn.pad_sequence(students, batch_first=True)
    rows = kd.kl_div(padded, batch, reduction="none")
    assert torch.allclose(rows, torch.nn.utils.rnn.pad_sequence(each, batch_first=True), atol=1e-6)
    first = [t[:2] for t in parts]
    stacked = kd.SparseTarget.stack(first, dim=1)
    assert stacked.leading_shape == (2, 3)
    assert torch.equal(stacked[:, 1].ids[:, : parts[1].slots], parts[1].ids[:2])
    again = kd.SparseTarget.cat([t[:, None] for t in first], dim=-1)
    assert torch.equal(again.ids, stacked.ids) and torch.equal(again.values, stacked.values)


def test_what_does_not_join():
    one, two = targets("logprobs")[:2]
    with pytest.raises(ValueError, match="bucket, truncate"):
        kd.SparseTarget.cat([one, kd.SparseTarget(two.ids, two.logprobs, tail="truncate")])
    with pytest.raises(ValueError, match="logprobs, weights"):
        kd.SparseTarget.cat([one, kd.SparseTarget(two.ids, weights=two.logprobs.exp())])
    with pytest.raises(ValueError, match="at least one"):
        kd.SparseTarget.stack([])
    with pytest.raises(IndexError, match="dim=1 is none of the 1 leading dimensions"):
        kd.SparseTarget.cat([one, two], dim=1)


def test_an_index_never_reaches_the_slots():
    target = targets("masks")[1]
    for index in ((slice(None), slice(2)), (0, 0), torch.ones(target.ids.shape, dtype=torch.bool)):
        with pytest.raises(IndexError, match="too many indices"):
            target[index]
    assert target[..., 0].slots == target[0].slots == target.slots


def test_a_dataloader_stacks():
    items = [{"target": kd.top_k_target(t[:2], 3), "labels": torch.tensor([1, 2])} for t in TEACHERS]
    (batch,) = DataLoader(items, batch_size=3)
    assert batch["target"].leading_shape == (3, 2) and torch.equal(
        batch["target"][1].ids, items[1]["target"].ids
    )


@pytest.mark.parametrize("kind", ["logprobs", "weights", "masks"])
def test_saved_and_loaded(kind):
    target = targets(kind)[1]
    torch.save({"target": target}, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["target"]
    assert torch.equal(loaded.ids, target.ids) and torch.equal(loaded.values, target.values)
    assert loaded.tail == target.tail and (target.mask is None or torch.equal(loaded.mask, target.mask))
    object.__setattr__(target, "ids", target.ids.float())
    torch.save(target, file := io.BytesIO())
    file.seek(0)
    with pytest.raises(ValueError, match="int64 ids"):
        torch.load(file, weights_only=True)


def test_casts():
    target = targets("logprobs")[0]
    half = target.to(torch.bfloat16)
    assert half.logprobs.dtype == torch.bfloat16 and torch.equal(half.ids, target.ids)
    both = target.to("meta", torch.float64)
    assert both.device.type == "meta" and both.logprobs.dtype == torch.float64
    assert target.to(device="cpu", non_blocking=True).logprobs.dtype == torch.float32
