"""A loss on vocabulary shards: what is asked, and what one rank of a group makes of it."""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from shard_processes import counted
from sparse_problems import SparseProblem

import kdkernels as kd
from kdkernels.testing import Problem

VOCAB = 61


@dataclass(frozen=True)
class Case:
    """``split``: how the vocabulary is shared out; ``shard``: options of kd.Shard; ``ranks``: how many."""

    name: str
    problem: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    loss: str = "distillation_loss"
    split: str = "uneven"
    shard: dict[str, Any] = field(default_factory=dict)
    ranks: int = 2
    backend: str = "auto"
    tail: str | None = None  # of a sparse target
    ragged: bool = (
        False  # ranks with tokens of their own have another number of ids for each, by their number
    )

    @property
    def meaning(self) -> dict[str, Any]:
        """The options without those that say how it is computed."""
        return {name: value for name, value in self.options.items() if name not in ("chunk_bytes", "inplace")}

    def made(self) -> Problem:
        torch.manual_seed(len(self.name))
        kind = functools.partial(SparseProblem, tail=self.tail) if self.tail else Problem
        problem = kind(vocab=VOCAB, **self.problem)
        first = [0, *self.bounds()[1:-1], self.bounds()[-1] - 1]  # labels at every boundary
        labels, most = problem.labels.view(-1), self.options.get("vocab_size", VOCAB)
        most -= VOCAB // 5 if problem.rows == "padding" else 0
        labels[-len(first) :] = torch.tensor(first)
        labels[labels >= 0] %= most
        return problem

    def bounds(self) -> list[int]:
        """Where each rank's part begins, and the end."""
        even = [VOCAB * rank // self.ranks for rank in range(self.ranks + 1)]
        if self.split == "uneven":  # 0, 7, ..., of which one part ends in the middle of a vector
            return [0, *(7 + 20 * rank for rank in range(self.ranks - 1)), VOCAB]
        if self.split == "empty":  # the last rank has nothing, and of more than two the second neither
            return [0, *[VOCAB // 3] * max(self.ranks - 2, 0), VOCAB, VOCAB]
        return even


@dataclass
class Outcome:
    """What a rank made: losses, its part of the gradients, statistics, and the collectives that it took."""

    losses: list[torch.Tensor]
    gradients: list[list[torch.Tensor]]
    stats: Any = None
    calls: list[tuple[str, int]] = field(default_factory=list)


def part(tensors, bounds, rank, head, shard, inplace=False):
    """(this rank's leaves, its form of the model)."""
    here = slice(bounds[rank], bounds[rank + 1])
    if len(tensors) == 1:
        leaves = [tensors[0][..., here].clone().requires_grad_()]
        return leaves, kd.ShardedLogits(leaves[0] * 1 if inplace else leaves[0], shard)
    leaves = [tensors[0].clone(), *(t[here].clone() for t in tensors[1:])]
    leaves = [t.requires_grad_() for t in leaves]
    return leaves, kd.LinearHead(*leaves, shard=shard, **head)


def policy(student, labels, more=0, **options):
    """Of each token: the log-probabilities of two ids and ``more`` and the entropy as a loss, and the statistics."""
    vocab = options.get("vocab_size", VOCAB)
    others = [
        torch.where(labels == -100, labels, (7 * labels + 3 + 5 * at) % vocab) for at in range(1 + more)
    ]
    made = kd.token_log_probs(student, torch.stack([labels, *others], -1), entropy=True, **options)
    loss = 0.5 * made.log_probs[..., 1:].sum(-1) - made.log_probs[..., 0] - 0.3 * made.entropy
    return loss, [made.logsumexp, made.top1]


def policy_loss(student, teacher, labels, **options):
    return policy(student, labels, **options)[0]


def several(student, teacher, labels, **options):
    """The token losses of a tuple of divergences, side by side."""
    return torch.stack(kd.distillation_loss(student, teacher, labels, **options))


def call(case, student, teacher, labels):
    """[losses], statistics."""
    if case.loss == "token_log_probs":
        loss, stats = policy(student, labels, len(labels) % 3 if case.ragged else 0, **case.options)
        return [loss], stats
    if case.loss == "several":
        return [several(student, teacher, labels, **case.options)], None
    if case.loss == "cross_entropy":
        return [kd.cross_entropy(student, labels, **case.options)], None
    made = getattr(kd, case.loss)(student, teacher, labels, **case.options)
    made, stats = made if case.options.get("return_stats") else (made, None)
    return list(made) if isinstance(made, tuple) else [made], stats


def sharded(case, group):
    """What this rank makes of a case."""
    problem, bounds, rank = case.made(), case.bounds(), dist.get_rank(group)
    shard = kd.Shard(group, **case.shard)
    inplace = case.options.get("inplace", False)
    own, student = part(problem.student, bounds, rank, problem.head, shard, inplace)
    theirs, teacher = [], getattr(problem, "target", None)
    if teacher is None:
        theirs, teacher = part(problem.teacher, bounds, rank, problem.head, shard)
    with counted() as calls, kd.use_backend(case.backend):
        losses, stats = call(case, student, teacher, problem.labels)
        learning = [own, theirs] if case.loss == "codistillation_loss" else [own]
        flat = [leaf for leaves in learning for leaf in leaves]
        made = iter(torch.autograd.grad(sum(loss.sum() for loss in losses), flat))
        gradients = [[next(made) for _ in leaves] for leaves in learning]
    return Outcome([loss.detach() for loss in losses], gradients, stats, calls)
