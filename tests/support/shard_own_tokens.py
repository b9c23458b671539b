"""Ranks with tokens of their own: what one of them makes of a case."""

import os
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from shard_cases import Outcome, call, part
from shard_processes import counted, leaf

import kdkernels as kd

TOKENS = 15


def token_bounds(ranks):
    """Where each rank's own tokens begin, and the end; the second has none."""
    return [0, 4, *[4 + 5 * rank for rank in range(ranks - 2)], TOKENS]


def own_target(case, target, here):
    """A ragged case's tokens have fewer slots, as many on a rank as its tokens say."""
    cut = len(target.ids[here]) % 3 if case.ragged else 0
    names = ("ids", "logprobs", "weights", "mask")
    given = {name: getattr(target, name) for name in names}
    given = {name: None if t is None else t[here, cut:] for name, t in given.items()}
    return kd.SparseTarget(**given, tail=target.tail)


def of_tokens(case, here):
    """The case, with the numbers of these tokens where they differ by token."""
    options = {n: v[here] if isinstance(v, torch.Tensor) else v for n, v in case.options.items()}
    return replace(case, options=options)


def own_tokens(case, group):
    """What this rank makes of its own tokens; what arrives differs by token where the losses do."""
    problem, bounds, rank = case.made(), case.bounds(), dist.get_rank(group)
    tokens = slice(*token_bounds(case.ranks)[rank : rank + 2])
    case = of_tokens(case, tokens)
    shard = kd.Shard(group, tokens="sharded", **case.shard)
    sides = []
    for tensors in (problem.student, problem.teacher):
        if isinstance(tensors[0], kd.SparseTarget):
            sides.append(([], own_target(case, tensors[0], tokens)))
        else:
            sides.append(part([tensors[0][tokens], *tensors[1:]], bounds, rank, problem.head, shard))
    with counted() as calls, mock.patch.dict(os.environ, KDKERNELS_CHECK_RANKS=str(int(case.ragged))):
        (loss,), stats = call(case, sides[0][1], sides[1][1], problem.labels[tokens])
        gradients = torch.autograd.grad((loss * arriving(loss)).sum(), sides[0][0])
    return Outcome([loss.detach()], [list(gradients)], stats, calls)


def arriving(loss):
    return torch.arange(1, loss.numel() + 1).view(loss.shape) if loss.dim() else 3.0


def masked_on_one_rank(group):
    """(loss, dH, dW) twice: where only the rank that masks a token gives a mask, and where all give one."""
    rank, made = dist.get_rank(group), []
    here = slice(3 * rank, 3 * rank + 3), slice(5 * rank, 5 * rank + 5)
    hidden, weight, of_teacher = (
        t.detach()[at].clone().requires_grad_()
        for t, at in zip((leaf(9, 6), leaf(15, 6, seed=1), leaf(15, 6, seed=2)), (here[0], here[1], here[1]))
    )
    mask = torch.tensor([True, rank != 1, True])
    for given in (None if rank != 1 else mask, mask):
        heads = [
            kd.LinearHead(hidden, w, shard=kd.Shard(group, tokens="sharded")) for w in (weight, of_teacher)
        ]
        loss = kd.kl_div(*heads, mask=given)
        made.append([loss.detach(), *torch.autograd.grad(loss, [hidden, weight])])
    return made


def own_tokens_twice(group):
    """(dH of this rank's tokens and dW of its shard, those of one process in fp64, dH of a frozen lm_head, the second
    dH, dW from the same loss) where a policy and its cross entropy use one head."""
    rank, labels = dist.get_rank(group), torch.tensor([0, 4, -100, 9, 14, 2, 7])
    mine, part = slice(*[0, 4, 4, 7][rank : rank + 2]), slice(5 * rank, 5 * rank + 5)
    whole = [leaf(7, 6), leaf(15, 6, seed=1)]
    hidden, weight = (t.detach()[s].clone().requires_grad_() for t, s in zip(whole, (mine, part)))
    shard = kd.Shard(group, tokens="sharded", data_parallel="sum")

    def loss(head, labels):
        each = kd.token_log_probs(head, labels, entropy=True)
        return (each.entropy - 2 * each.log_probs).sum() + kd.cross_entropy(head, labels, reduction="sum")

    head = kd.LinearHead(hidden, weight, shard=shard)
    own = loss(head, labels[mine])
    first, second = (
        torch.autograd.grad(own, [hidden, weight], retain_graph=again) for again in (True, False)
    )
    frozen = loss(kd.LinearHead(hidden, weight.detach(), shard=shard), labels[mine])
    (of_frozen,) = torch.autograd.grad(frozen, hidden)
    doubles = [t.detach().double().requires_grad_() for t in whole]
    with kd.use_backend("reference"):
        truth = torch.autograd.grad(loss(kd.LinearHead(*doubles), labels), doubles)
    return first, [truth[0][mine], truth[1][part]], of_frozen, second
