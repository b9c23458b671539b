"""DistillationTrainer.evaluate: exact over the tokens, whatever rows a collator makes and however many processes there are."""

import math
import os

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from distilled_llamas import VOCAB, arguments, batch, llama, plain_loss, rows_of  # noqa: E402

from kdkernels.integrations.transformers import DistillationTrainer  # noqa: E402


def test_evaluation_is_exact_over_tokens_whatever_the_batch(tmp_path):
    student, teacher, inputs = llama(), llama(seed=7, width=32), batch(rows=5)
    expected_loss = plain_loss(student, teacher, inputs, temperature=2.0, soft=0.5, hard=0.25)
    expected_kl = plain_loss(student, teacher, inputs)
    expected_hard = plain_loss(student, teacher, inputs, soft=0.0, hard=1.0)
    for size in (2, 5):  # all rows, whatever is dropped in training
        trainer = DistillationTrainer(
            student,
            arguments(tmp_path, per_device_eval_batch_size=size, dataloader_drop_last=True),
            teacher=teacher,
            temperature=2.0,
            soft_weight=0.5,
            hard_weight=0.25,
            eval_dataset=rows_of(inputs),
        )
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected_loss.item(), rel=1e-5)
        assert metrics["eval_kl"] == pytest.approx(expected_kl.item(), rel=1e-5)
        assert metrics["eval_hard"] == pytest.approx(expected_hard.item(), rel=1e-5)


class Stream(torch.utils.data.IterableDataset):
    """Rows of no known number."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def padded(rows, length=0):
    """[B, L]: a row a sample."""
    length = max(length, *(len(row["input_ids"]) for row in rows))
    filled = lambda name, value: torch.tensor([r[name] + [value] * (length - len(r[name])) for r in rows])  # noqa: E731
    ids, labels = filled("input_ids", 0), filled("labels", -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def of_one_length(rows):
    """[B, 20], as batches are dispatched."""
    return padded(rows, 20)


def in_halves(rows):
    """[2B, L / 2]: two rows a sample, but one of a short sample."""
    cut = lambda row, a, b: {name: row[name][a:b] for name in ("input_ids", "labels")}  # noqa: E731
    whole = [cut(row, 0, 9) for row in rows]
    return padded([*whole, *(cut(row, 9, None) for row in rows if len(row["input_ids"]) > 9)])


def flat(rows):
    """[1, sum of L]: one row of all samples."""
    return transformers.DataCollatorWithFlattening()(
        [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    )


#: Samples, collator, options of the accelerator and of the arguments; 2 processes by batches of 2.
SHARED_OUT = {
    "a sample too few": (7, padded, {}, {}),
    "a batch too few": (6, padded, {}, {}),
    "fewer than processes": (1, padded, {}, {}),
    "padding-free": (5, flat, {}, {}),
    "padding-free, a batch too few": (6, flat, {}, {}),
    "padding-free, as many": (8, flat, {}, {}),
    "padding-free, batches cut in pieces": (5, flat, {"split_batches": True}, {}),
    "padding-free, uneven": (5, flat, {"even_batches": False}, {}),
    "halves": (5, in_halves, {}, {}),
    "halves, a batch too few": (6, in_halves, {}, {}),
    "cut in pieces": (7, padded, {"split_batches": True}, {}),
    "dispatched": (7, of_one_length, {"dispatch_batches": True}, {}),
    "dispatched, fewer than processes": (1, of_one_length, {"dispatch_batches": True}, {}),
    "without a length": (7, of_one_length, {}, {}),
    "the last ones dropped in training": (7, flat, {}, {"dataloader_drop_last": True}),
}


def samples(count):
    generator = torch.Generator().manual_seed(4)
    lengths = [7, 16, 5, 12, 9, 17, 6, 11][:count]
    rows = [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows]


def evaluate_on_rank(rank, folder):
    """Every case of SHARED_OUT; then an evaluation that cannot be shared out exactly."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    student, teacher = llama(dtype=torch.float32).eval(), llama(seed=7, width=32, dtype=torch.float32)

    def trainer(rows, collator, accelerator, **options):
        args = arguments(
            folder,
            per_device_eval_batch_size=2,
            accelerator_config=accelerator,
            remove_unused_columns=False,
            **options,
        )
        assert args.world_size == 2
        return DistillationTrainer(
            student, args, teacher=teacher, hard_weight=0.25, eval_dataset=rows, data_collator=collator
        )

    for name, (count, collator, accelerator, options) in SHARED_OUT.items():
        rows = samples(count)
        given = Stream(rows) if name == "without a length" else rows
        metrics = trainer(given, collator, accelerator, **options).evaluate()
        counted = [collator([row]) for row in rows]
        for which, soft, hard in (("eval_kl", 1, 0), ("eval_hard", 0, 1), ("eval_loss", 1, 0.25)):
            tokens = sum(int((one["labels"][:, 1:] != -100).sum()) for one in counted)
            expected = sum(plain_on_rows(student, teacher, one, soft, hard, tokens) for one in counted).item()
            assert metrics[which] == pytest.approx(expected, rel=1e-5), (name, which)
    with pytest.raises(
        ValueError, match="by repeating samples, which would count twice; give one with a length"
    ):
        trainer(Stream(samples(5)), flat, {"dispatch_batches": False}).evaluate()
    torch.distributed.destroy_process_group()


def plain_on_rows(student, teacher, inputs, soft, hard, tokens):
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    one = {"input_ids": inputs["input_ids"], "attention_mask": mask, "labels": inputs["labels"]}
    with torch.no_grad():
        return plain_loss(student, teacher, one, soft=soft, hard=hard, num_items=tokens)


def test_evaluation_is_exact_over_tokens_whatever_the_processes(tmp_path):
    """Whatever rows a collator makes of samples, of which two processes have not as many each."""
    torch.multiprocessing.spawn(evaluate_on_rank, (tmp_path,), nprocs=2)


def test_an_evaluation_of_no_tokens_is_no_number(tmp_path):
    """0 would be the best of all."""
    rows = rows_of(batch())
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    trainer = DistillationTrainer(llama(), arguments(tmp_path), teacher=llama(seed=7), eval_dataset=rows)
    metrics = trainer.evaluate()
    assert math.isnan(metrics["eval_loss"]) and math.isnan(metrics["eval_kl"])
