"""Calls that no rank may serve, and what each rank says."""

import os

import torch
import torch.distributed as dist
from shard_processes import leaf, patched, told
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import kdkernels as kd
from kdkernels.backends import eager, native


def refused(name, group):
    """(type of the error, its message, what it should say) of a call that no rank may serve."""
    rank, shard = dist.get_rank(group), kd.Shard(group)
    student, labels = kd.ShardedLogits(leaf(3, 5), shard), torch.tensor([0, 6, 14])
    teacher = kd.ShardedLogits(leaf(3, 5), kd.Shard(group))

    def call():
        return kd.kl_div(student, teacher, labels)

    pattern = ""
    if name == "another width":
        call()
        student, pattern = kd.ShardedLogits(leaf(3, 6 if rank == 1 else 5), shard), "rank 1|first used for 5"
    elif name == "a whole teacher":
        teacher, pattern = leaf(3, 15), "the student is sharded over the vocabulary, the teacher is not"
    elif name == "another range of the teacher":
        teacher = kd.ShardedLogits(leaf(3, 7 if rank == 0 else 4), kd.Shard(group))
        pattern = r"rank 0 has the ids 0\.\.4 of the student and 0\.\.6 of the teacher; .*reshard_head"
    elif name == "a gap":
        student, pattern = kd.ShardedLogits(leaf(3, 5), kd.Shard(group, start=6 * rank)), "5 is followed by 6"
    elif name == "starts on one rank only":
        student = kd.ShardedLogits(leaf(3, 5), kd.Shard(group, start=0 if rank == 0 else None))
        pattern = "on all ranks of the group or on none"
    elif name == "an empty vocabulary":
        student, pattern = kd.ShardedLogits(leaf(3, 0), kd.Shard(group)), "empty vocabulary"
    elif name == "a backend that fails on one rank":
        pattern = "rank 1 of the shard's group failed" if rank != 1 else "out of memory"
        if rank == 1:
            with (
                patched(native, "accumulate", failing),
                patched(eager, "accumulate", failing),
            ):
                return told(call, pattern)
    elif name == "logits of own tokens":
        student = kd.ShardedLogits(leaf(3, 5), kd.Shard(group, tokens="sharded"))
        return told(lambda: kd.cross_entropy(student, labels), "needs hidden states")
    elif name == "two kinds of shards":
        teacher = kd.ShardedLogits(leaf(3, 5), kd.Shard(group, reduce_hidden=False))
        pattern = "two different reduce_hidden"
    elif name == "the oracle":
        with kd.use_backend("reference"):
            return told(call, "whole vocabularies")
    elif name == "create_graph":
        loss = call()
        return told(lambda: torch.autograd.grad(loss, student.logits, create_graph=True), "create_graph")
    return told(call, pattern)


def failing(*args, **kwargs):
    raise RuntimeError("out of memory")


def sparse(student, *, id=3, weight=0.5):
    ids, weights = (
        torch.tensor([[3, 1], [2, 4], [5, id]]),
        torch.tensor([[0.5, 0.25], [0.5, 0.5], [0.25, weight]]),
    )
    return kd.kl_div(student, kd.SparseTarget(ids, weights=weights))


def probed(student, *, ids=(3, 1, 2), slots=1, **options):
    return kd.token_log_probs(student, torch.tensor(ids)[:, None].repeat(1, slots), **options)


#: What differs, by the name that the error gives it: a call with the student, the teacher, and 1 on one rank, 0 elsewhere.
VALUES = {
    "temperature": lambda s, t, one: kd.kl_div(s, t, temperature=1.5 + one),
    "temperature: by token": lambda s, t, one: kd.kl_div(
        s, t, temperature=torch.tensor([1.5, 2.0, 1.0 + one])
    ),
    "weights": lambda s, t, one: kd.kl_div(s, t, token_weights=torch.tensor([1.0, one, 1 - one])),
    "the loss's tempered": lambda s, t, one: kd.kl_div(s, t, temperature=1.0 + one),
    "the divergence's numbers": lambda s, t, one: kd.distillation_loss(
        s, t, divergence=kd.JSD(0.3 + 0.1 * one)
    ),
    "the sparse target's ids": lambda s, t, one: sparse(s, id=3 + one),
    "the sparse target's values": lambda s, t, one: sparse(s, weight=0.5 + 0.1 * one),
    "slots": lambda s, t, one: probed(s, slots=1 + one),
    "ids": lambda s, t, one: probed(s, ids=(3, 1, 2 + one)),
    "temperature: of ids": lambda s, t, one: probed(s, temperature=1.5 + one),
}


#: What one rank is told before it comes to what ranks compare, and what is wrong with its call.
WRONG = {
    "distillation_loss needs a teacher": lambda s, t, one: kd.distillation_loss(s, None if one else t),
    "must be a divergence, not its class": lambda s, t, one: kd.distillation_loss(
        s, t, divergence=(kd.JSD() if not one else kd.JSD)
    ),
    "inplace must be True or False": lambda s, t, one: kd.kl_div(s, t, inplace=2 if one else False),
    "codistillation_loss needs labels": lambda s, t, one: kd.codistillation_loss(
        s, t, None if one else torch.tensor([1, 2, 3])
    ),
    "temperature must be > 0": lambda s, t, one: kd.token_log_probs(
        s, torch.tensor([1, 2, 3]), temperature=-1.0 if one else 1.0
    ),
    "would overwrite a leaf": lambda s, t, one: kd.kl_div(
        kd.ShardedLogits(s.logits.requires_grad_() if one else s.logits.requires_grad_() * 1, s.shard),
        t,
        inplace=True,
    ),
}


def headed(group, *, width=6, teacher=None, reduction="mean", **options):
    student = kd.LinearHead(torch.zeros(3, width), torch.zeros(5, width), shard=kd.Shard(group, **options))
    if teacher == "head":
        return kd.kl_div(student, kd.LinearHead(torch.zeros(3, 4), torch.zeros(5, 4), shard=kd.Shard(group)))
    if teacher == "sparse":
        return sparse(student)
    return kd.cross_entropy(student, torch.tensor([1, 2, 3]), reduction=reduction)


#: The same of a Shard's options, and of heads: a call with the group, and 1 on one rank.
OF_HEADS = {
    "the shard's tokens": lambda group, one: headed(group, tokens=("replicated", "sharded")[one]),
    "the shard's data_parallel": lambda group, one: headed(
        group, tokens="sharded", data_parallel=("mean", "sum")[one]
    ),
    "the shard's reduce_hidden": lambda group, one: headed(group, reduce_hidden=not one),
    "the shard's reduce_dtype": lambda group, one: headed(
        group, reduce_dtype=(torch.float32, torch.bfloat16)[one]
    ),
    "hidden widths": lambda group, one: headed(group, width=6 + one, tokens="sharded"),
    "reduction": lambda group, one: headed(group, reduction=("mean", "none")[one], tokens="sharded"),
    "another kind of teacher": lambda group, one: headed(group, teacher=("head", "sparse")[one]),
}


def other_arguments(name, group):
    """What ranks say that differ in something, with KDKERNELS_CHECK_RANKS=1."""
    rank = dist.get_rank(group)
    tokens, options, dtype, pattern = 3, {}, torch.float32, "rank 1 of the shard's group|differ"
    if name == "tokens" and rank == 1:
        tokens = 4
    elif name == "a number" and rank == 1:
        options = dict(temperature=-1.0)
    elif name == "an option" and rank == 1:
        options = dict(chunk_bytes=1000)
    elif name == "dtype" and rank == 1:
        dtype = torch.int64
    elif name == "labels":
        options = dict(labels=torch.tensor([4, 7, rank]))
    pattern = pattern if rank != 1 else "differ|temperature must be|needs fp64"
    os.environ["KDKERNELS_CHECK_RANKS"] = "1"
    try:
        if name in OF_HEADS:
            said = f"differ in {name}|makes another call, or one with {name}"
            return told(lambda: OF_HEADS[name](group, int(rank == 1)), said)
        logits = torch.zeros(tokens, 5, dtype=dtype)
        sides = [kd.ShardedLogits(logits, kd.Shard(group)) for _ in range(2)]
        if name in WRONG:
            return told(lambda: WRONG[name](*sides, int(rank == 1)), name)
        if name in VALUES:
            return told(lambda: VALUES[name](*sides, int(rank == 1)), f"differ in {name.split(':')[0]}")
        return told(lambda: kd.kl_div(*sides, **options), pattern)
    finally:
        del os.environ["KDKERNELS_CHECK_RANKS"]


def refused_dtensors(group):
    mesh, made = DeviceMesh.from_group(group, "cpu"), []

    def d(*shape, at):
        return distribute_tensor(torch.randn(shape), mesh, [at])

    labels, group_shard = torch.tensor([0, 3]), kd.Shard(group)
    for student, pattern in [
        (lambda: kd.LinearHead(torch.randn(2, 6), d(9, 6, at=Shard(0))), "hidden is a plain Tensor"),
        (lambda: kd.LinearHead(d(2, 6, at=Shard(1)), d(9, 6, at=Shard(0))), "sharded over H"),
        (lambda: kd.LinearHead(d(2, 6, at=Partial()), d(9, 6, at=Shard(0))), "is not a shard"),
        (lambda: kd.LinearHead(d(2, 6, at=Replicate()), d(9, 6, at=Shard(1))), r"needs Shard\(0\)"),
        (lambda: kd.ShardedLogits(d(2, 9, at=Shard(-1)), group_shard), "say themselves"),
        (lambda: DTensor.from_local(torch.randn(2, 9), mesh, [Partial()]), "is not a shard"),
    ]:
        made.append(told(lambda student=student: kd.cross_entropy(student(), labels), pattern))
    spread = distribute_tensor(labels, mesh, [Replicate()])
    logits = kd.ShardedLogits(torch.randn(2, 9), group_shard)
    for call, name in [
        (lambda: kd.cross_entropy(logits, spread), "labels"),
        (lambda: kd.token_log_probs(logits, spread), "ids"),
        (lambda: kd.cross_entropy(logits, labels, token_weights=spread), "token_weights"),
    ]:
        made.append(told(call, rf"{name} must be a plain Tensor, got a DTensor; give {name}.to_local\(\)"))
    return made
