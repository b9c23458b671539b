"""Losses on vocabulary shards: what is asked, what one rank of a group makes of it, and how ranks are started.

Four processes are started once. Groups of 2, 3 and 4 of them run the cases; a group's first rank is not the world's.
"""

import contextlib
import datetime
import functools
import os
import traceback
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sparse_problems import SparseProblem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import kdkernels as kd
from kdkernels.backends import eager, native, row_state
from kdkernels.backends.row_state import hard_results
from kdkernels.core import exchange
from kdkernels.integrations import automodel, megatron, modelopt, torchtitan
from kdkernels.integrations.common import replicated
from kdkernels.testing import Problem

WORLD = 4
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


def part(tensors, bounds, rank, head, shard):
    """(this rank's leaves, its form of the model)."""
    here = slice(bounds[rank], bounds[rank + 1])
    if len(tensors) == 1:
        leaves = [tensors[0][..., here].clone().requires_grad_()]
        return leaves, kd.ShardedLogits(leaves[0], shard)
    leaves = [tensors[0].clone(), *(t[here].clone() for t in tensors[1:])]
    leaves = [t.requires_grad_() for t in leaves]
    return leaves, kd.LinearHead(*leaves, shard=shard, **head)


def policy(student, labels, **options):
    """Of each token: the log-probabilities of two ids and the entropy as a loss, and the statistics."""
    second = torch.where(labels == -100, labels, (7 * labels + 3) % VOCAB)
    made = kd.token_log_probs(student, torch.stack([labels, second], -1), entropy=True, **options)
    loss = 0.5 * made.log_probs[..., 1] - made.log_probs[..., 0] - 0.3 * made.entropy
    return loss, [made.logsumexp, made.top1]


def policy_loss(student, teacher, labels, **options):
    return policy(student, labels, **options)[0]


def several(student, teacher, labels, **options):
    """The token losses of a tuple of divergences, side by side."""
    return torch.stack(kd.distillation_loss(student, teacher, labels, **options))


def call(case, student, teacher, labels):
    """[losses], statistics."""
    if case.loss == "token_log_probs":
        loss, stats = policy(student, labels, **case.options)
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
    own, student = part(problem.student, bounds, rank, problem.head, shard)
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


class counted:
    """Every collective that is started meanwhile, with the bytes that this rank gives."""

    NAMES = (
        "all_reduce",
        "all_gather_object",
        "all_gather_single",
        "all_gather_into_tensor",
    )

    def __enter__(self):
        self.calls = []
        self.kept = {(dist, name): getattr(dist, name) for name in self.NAMES if hasattr(dist, name)}
        for name in ("_all_gather", "_reduce_scatter"):
            self.kept[exchange, name] = getattr(exchange, name)
        for (module, name), function in self.kept.items():
            setattr(module, name, self.noting(name.removeprefix("_"), function))
        return self.calls

    def noting(self, name, function):
        def noted(*args, **kwargs):
            given = args[0] if name == "all_reduce" else args[-1]
            size = given.numel() * given.element_size() if isinstance(given, torch.Tensor) else 0
            self.calls.append((name, size))
            return function(*args, **kwargs)

        return noted

    def __exit__(self, *error):
        for (module, name), function in self.kept.items():
            setattr(module, name, function)


def leaf(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randn(shape).requires_grad_()


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


def told(call, pattern):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), pattern
    return "nothing", "", pattern


@contextlib.contextmanager
def patched(owner, name, value):
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def resharded(group):
    """Rows of a head that is shared out evenly, with two rows of padding, to parts of another width."""
    rank, head = dist.get_rank(group), leaf(18, 3).detach()
    bounds = [0, 2, 2, 16]
    like = head[bounds[rank] : bounds[rank + 1]]
    moved = kd.distributed.reshard_head(head[6 * rank : 6 * rank + 6], kd.Shard(group), like, kd.Shard(group))
    return moved, like


def counted_tokens(group):
    labels = torch.arange(3).where(torch.arange(3) < dist.get_rank(group), -100)
    return kd.distributed.global_tokens(labels, group).item()


def nan(group):
    """Token losses, and the gradients of the other rows and of the row in which one rank has a NaN."""
    student, teacher = leaf(3, 4), leaf(3, 4, seed=1).detach()
    with torch.no_grad():
        student[1, 2] = torch.nan if dist.get_rank(group) == 1 else 0.0
        student[0, 3] = teacher[0, 3] = -torch.inf
    sides = [kd.ShardedLogits(side, kd.Shard(group)) for side in (student, teacher)]
    loss = kd.js_divergence(*sides, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient[[0, 2]], gradient[1]


def twice(group):
    hidden, weight = leaf(4, 6), leaf(5, 6, seed=1 + dist.get_rank(group))
    loss = kd.cross_entropy(kd.LinearHead(hidden, weight, shard=kd.Shard(group)), torch.tensor([0, 4, 9, 14]))
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    first = first.clone()
    return first, torch.autograd.grad(loss, hidden)[0]


def own_dh(group):
    """(this rank's parts of dH, added up; dH from the loss; the collectives where it is left to the caller)."""
    made = []
    for reduce_hidden in (False, True):
        hidden, weight = leaf(4, 6), leaf(5, 6, seed=1 + dist.get_rank(group))
        head = kd.LinearHead(hidden, weight, shard=kd.Shard(group, reduce_hidden=reduce_hidden))
        with counted() as calls:
            loss = kd.cross_entropy(head, torch.tensor([0, 4, 9, 14]))
            made.append(torch.autograd.grad(loss, hidden)[0])
        if not reduce_hidden:
            kept = [name for name, _ in calls]
    dist.all_reduce(made[0], group=group)
    return *made, kept


TOKENS = 15


def token_bounds(ranks):
    """Where each rank's own tokens begin, and the end; the second has none."""
    return [0, 4, *[4 + 5 * rank for rank in range(ranks - 2)], TOKENS]


def own_target(target, here):
    mask = None if target.mask is None else target.mask[here]
    return kd.SparseTarget(target.ids[here], target.logprobs[here], mask=mask, tail=target.tail)


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
            sides.append(([], own_target(tensors[0], tokens)))
        else:
            sides.append(part([tensors[0][tokens], *tensors[1:]], bounds, rank, problem.head, shard))
    with counted() as calls:
        (loss,), stats = call(case, sides[0][1], sides[1][1], problem.labels[tokens])
        gradients = torch.autograd.grad((loss * arriving(loss)).sum(), sides[0][0])
    return Outcome([loss.detach()], [list(gradients)], stats, calls)


def arriving(loss):
    return torch.arange(1, loss.numel() + 1).view(loss.shape) if loss.dim() else 3.0


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


def body():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))


def trained(wrapper, group):
    """Gradients of the body and of this rank's shard of the lm_head, of a mean over all ranks' tokens."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    inputs, labels, head = leaf(9, 6).detach(), torch.arange(9), leaf(9, 6, seed=2)
    mine, model = slice(*[0, 5, 6, 9][rank : rank + 2]), body()
    if wrapper == "DDP":
        model = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
        weight = head.detach()[3 * rank : 3 * rank + 3].clone().requires_grad_()
        rows = weight
    else:
        mesh = DeviceMesh.from_group(group, "cpu")
        model = fully_shard(model, mesh=mesh)
        linear = torch.nn.Linear(6, 9, bias=False)
        linear.weight = torch.nn.Parameter(head.detach().clone())
        weight = fully_shard(linear, mesh=mesh).weight
        rows = weight.to_local()
    items = kd.distributed.global_tokens(labels[mine], group)
    head_shard = kd.LinearHead(model(inputs[mine]), rows, shard=kd.Shard(group, tokens="sharded"))
    (ranks * kd.cross_entropy(head_shard, labels[mine], num_items=items)).backward()
    gradients = [p.grad for p in model.parameters()] + [weight.grad]
    local = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    last = weight.grad.to_local() if hasattr(weight.grad, "to_local") else weight.grad
    whole_model = body()
    kd.cross_entropy(kd.LinearHead(whole_model(inputs), head), labels).backward()
    truth = [p.grad for p in whole_model.parameters()] + [head.grad[3 * rank : 3 * rank + 3]]
    return [*local[:-1], last], truth


def tied_body():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 6), torch.nn.Tanh())


def trained_with_tied_embeddings(group):
    """Whole gradients under FSDP2, whose embedding is the lm_head too, and those of one process."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mesh, ids, labels = DeviceMesh.from_group(group, "cpu"), torch.arange(9) * 5 % 9, torch.arange(9)
    mine, model, whole_model = slice(*[0, 5, 6, 9][rank : rank + 2]), tied_body(), tied_body()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    hidden = model(ids[mine])
    rows = model[0].weight.to_local()  # in shards again, after its forward
    head = kd.LinearHead(hidden, rows, shard=kd.Shard(group, tokens="sharded"))
    (ranks * kd.cross_entropy(head, labels[mine], num_items=len(ids))).backward()
    kd.cross_entropy(kd.LinearHead(whole_model(ids), whole_model[0].weight), labels).backward()
    gradients = [p.grad.full_tensor() for p in model.parameters()]
    return gradients, [p.grad for p in whole_model.parameters()]


BROKEN = Case(
    "broken",
    dict(student="head", teacher="head"),
    dict(hard_weight=0.5, label_smoothing=0.2, soft_weight=0.5),
    ranks=3,
)


def rank_times_width(given):
    widths = [width for _, width in given]
    return tuple((rank * width, rank * width + width) for rank, width in enumerate(widths))


def mean_of_the_shard(results, side, lse, label_loss, asked, vocab):
    return hard_results(results, side, lse, label_loss, asked, 20)


def summed_twice(self, total):
    for _ in range(2):
        dist.all_reduce(total, group=self.group)


#: What others got wrong: (owner, name, what it is replaced by).
MISTAKES = {
    "dH is not summed": (exchange.Exchange, "start_sum", lambda self, total: None),
    "dH is summed twice": (exchange.Exchange, "start_sum", summed_twice),
    "smoothing over the local vocabulary": (row_state, "hard_results", mean_of_the_shard),
    "the first id is rank times width": (exchange, "_joined", rank_times_width),
    "the states of one rank": (row_state, "in_order", lambda parts: parts[0]),
}


BROKEN_SPARSE = Case("broken too", {}, dict(hard_weight=0.5), tail="bucket", ranks=3)


def own_stored_logits(self, here, ids, dtype, rows=None):
    return here()


def mistaken_sparse(group):
    """The stored logits are not summed: each rank has its own and -inf."""
    with patched(exchange.Exchange, "stored", own_stored_logits):
        return sharded(BROKEN_SPARSE, group)


def mistaken(mistake, group):
    owner, name, value = MISTAKES[mistake]
    with patched(owner, name, value):
        return sharded(BROKEN, group)


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
        logits = torch.zeros(tokens, 5, dtype=dtype)
        sides = [kd.ShardedLogits(logits, kd.Shard(group)) for _ in range(2)]
        if name == "ids":
            ids = torch.zeros(tokens, 1 + (rank == 1), dtype=torch.int64)
            return told(lambda: kd.token_log_probs(sides[0], ids), pattern)
        return told(lambda: kd.kl_div(*sides, **options), pattern)
    finally:
        del os.environ["KDKERNELS_CHECK_RANKS"]


def dtensors(group):
    """(loss, gradients and placements, those of one process) of logits and of heads, on a mesh of one dimension."""
    mesh, made = DeviceMesh.from_group(group, "cpu"), []
    labels = torch.tensor([0, 3, 4, 9, -100])
    whole = [[leaf(5, 10)], [leaf(5, 6, seed=1), leaf(10, 6, seed=2), leaf(10, seed=3)]]
    places = [[Shard(-1)]], [[Replicate()], [Shard(0)], [Shard(0)]]
    for tensors, placements in zip(whole, places):
        parts = [distribute_tensor(t.detach(), mesh, p).requires_grad_() for t, p in zip(tensors, placements)]
        both = [x[0] if len(x) == 1 else kd.LinearHead(*x) for x in (parts, tensors)]
        losses = [kd.cross_entropy(student, labels, label_smoothing=0.1) for student in both]
        losses += [kd.js_divergence(student, teacher) for student, teacher in zip(both, [both[0], both[1]])]
        mine = torch.autograd.grad(losses[0], parts)
        assert [list(g.placements) for g in mine] == [list(t.placements) for t in parts]
        made.append(
            (
                losses[0].detach(),
                losses[1].detach(),
                [g.full_tensor() for g in mine],
                torch.autograd.grad(losses[1], tensors),
            )
        )
        assert losses[2].item() == losses[3].item() == 0
    return made


def dtensors_of_own_tokens(group):
    """(this rank's loss, that of one process, gradients and those of one process), of hidden [2, 5, H] sharded over the
    second dimension: 2, 2 and 1 of 5 positions. The ranks' losses add up to the loss of one process."""
    mesh, labels = DeviceMesh.from_group(group, "cpu"), torch.arange(10).view(2, 5) * 7 % 10
    whole = [leaf(2, 5, 6, seed=1), leaf(10, 6, seed=2), leaf(10, seed=3)]
    teacher = [leaf(2, 5, 6, seed=4).detach(), leaf(10, 6, seed=5).detach(), leaf(10, seed=6).detach()]
    places = [Shard(1)], [Shard(0)], [Shard(0)]

    def distributed(tensors):
        return [distribute_tensor(t.detach(), mesh, p) for t, p in zip(tensors, places)]

    parts = [t.requires_grad_() for t in distributed(whole)]
    mine = distribute_tensor(labels, mesh, places[0]).to_local()
    options = dict(num_items=10, hard_weight=0.5)
    loss = kd.distillation_loss(kd.LinearHead(*parts), kd.LinearHead(*distributed(teacher)), mine, **options)
    gradients = torch.autograd.grad(loss, parts)
    assert [list(g.placements) for g in gradients] == [list(t.placements) for t in parts]
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    true = kd.distillation_loss(kd.LinearHead(*whole), kd.LinearHead(*teacher), labels, **options)
    return total, true.detach(), [g.full_tensor() for g in gradients], torch.autograd.grad(true, whole)


def heads_of_meshes(group):
    """Whether hidden states become a DTensor beside the lm_head of a tensor-parallel model, and beside FSDP2's."""
    found = []
    for name in ("tp", "fsdp"):
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=(name,))
        weight = distribute_tensor(torch.ones(9, 6), mesh, [Shard(0)])
        found.append(isinstance(replicated(torch.ones(2, 6), weight), DTensor))
    return found


def autocast(group):
    """(loss and gradients of fp32 shards under autocast to bf16, those of one process with rounded tensors)."""
    rank, labels = dist.get_rank(group), torch.tensor([0, 4, 9, 14])
    whole = [leaf(4, 6), leaf(15, 6, seed=1)]
    leaves = [
        t.detach()[s].clone().requires_grad_()
        for t, s in zip(whole, (slice(None), slice(5 * rank, 5 * rank + 5)))
    ]
    with torch.autocast("cpu", torch.bfloat16):
        loss = kd.cross_entropy(kd.LinearHead(*leaves, shard=kd.Shard(group)), labels)
    true = kd.cross_entropy(kd.LinearHead(*(t.bfloat16() for t in whole)), labels)
    expected = list(torch.autograd.grad(true, whole))
    expected[1] = expected[1][5 * rank : 5 * rank + 5]
    return loss.detach(), true.detach(), torch.autograd.grad(loss, leaves), expected


def two_dimensions(group):
    """The local tokens' loss of logits on a mesh of data and tensor parallel ranks, and of one process."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    logits, labels = leaf(4, 9), torch.tensor([0, 4, 5, 8])
    parts = distribute_tensor(logits.detach(), mesh, [Shard(0), Shard(-1)])
    here = slice(2 * mesh.get_local_rank(0), 2 * mesh.get_local_rank(0) + 2)
    return kd.cross_entropy(parts, labels[here]), kd.cross_entropy(logits.detach()[here], labels[here])


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
    return made


def compiled(group):
    """(loss and gradients of a function as it is, and compiled whole)."""
    shard, labels, made = kd.Shard(group), torch.tensor([0, 4, 9, 14]), []

    def loss(hidden, weight):
        return kd.cross_entropy(kd.LinearHead(hidden, weight, shard=shard), labels, label_smoothing=0.1)

    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [leaf(4, 6), leaf(5, 6, seed=1 + dist.get_rank(group))]
        value = function(*leaves)
        made.append([value.detach(), *torch.autograd.grad(value, leaves)])
    return made


def modelopt_losses(group):
    """(this rank's loss, its flags, gradient, those of one process) of ModelOpt's two losses on many ranks."""
    rank, made, bounds = dist.get_rank(group), [], [0, 2, 9, 15]
    here = slice(bounds[rank], bounds[rank + 1])
    whole, teacher = leaf(3, 4, 15), leaf(3, 4, 15, seed=1).detach()
    config = SimpleNamespace(tensor_model_parallel_size=3)
    with patched(modelopt, "_tensor_parallel_group", lambda: group):
        for kind, extra in ((modelopt.LogitsKLLoss, {}), (modelopt.TopKLogitsKLLoss, dict(top_k=5))):
            for reverse in (False, True):
                student = whole.detach()[..., here].clone().requires_grad_()
                loss, *flags = kind(config, 1.5, reverse, **extra)(student, teacher[..., here])
                truth, *_ = kind(None, 1.5, reverse, **extra)(whole, teacher)
                upstream = torch.arange(12.0).view(4, 3)
                made.append((loss.detach(), flags, torch.autograd.grad((loss * upstream).sum(), student)[0]))
                made[-1] += (
                    truth.detach(),
                    torch.autograd.grad((truth * upstream).sum(), whole)[0][..., here],
                )
    return made


def megatrons(group):
    """(this rank's token losses and gradient, those of the formula on the whole) of Megatron's cross entropy."""
    rank, made = dist.get_rank(group), []
    whole, labels = leaf(3, 2, 15), torch.tensor([[0, 4], [5, 9], [10, 14]])
    upstream = torch.arange(1.0, 7.0).view(3, 2)
    for smoothing in (0.0, 0.2):
        part = whole.detach()[..., 5 * rank : 5 * rank + 5].clone().requires_grad_()
        loss = megatron.vocab_parallel_cross_entropy(part, labels, smoothing, group)
        log_q = whole.log_softmax(-1)
        target = torch.full_like(log_q, smoothing / 14).scatter_(-1, labels[..., None], 1 - smoothing)
        truth = -(target * log_q).sum(-1)
        own, true = (
            torch.autograd.grad((x * upstream).sum(), y)[0] for x, y in ((loss, part), (truth, whole))
        )
        made.append((loss.detach(), own, truth.detach(), true[..., 5 * rank : 5 * rank + 5]))
    fused = megatron.fused_vocab_parallel_cross_entropy(part, labels, group)
    assert torch.equal(fused, made[0][0])
    return made


def megatrons_output(group):
    """(token losses [b, s], dH of this rank's tokens, dW and db of its rows, those of the formula on the whole) of an output
    layer's hook, with all tokens on every rank and under sequence parallelism."""
    rank, made = dist.get_rank(group), []
    whole = [leaf(6, 2, 5), leaf(15, 5, seed=1), leaf(15, seed=2)]
    labels = torch.tensor([[0, 4, 5, -100, 9, 10], [14, 1, 2, 3, -100, 7]])
    upstream = torch.arange(1.0, 13.0).view(2, 6)
    hook = megatron.output_processor(
        lambda head, labels: kd.cross_entropy(head, labels, label_smoothing=0.2, reduction="none")
    )
    logits = torch.nn.functional.linear(*whole)
    truth = torch.nn.functional.cross_entropy(
        logits.permute(1, 2, 0), labels, label_smoothing=0.2, reduction="none"
    )
    true = torch.autograd.grad((truth * upstream).sum(), whole)
    rows = slice(5 * rank, 5 * rank + 5)
    for sequence_parallel in (False, True):
        here = slice(2 * rank, 2 * rank + 2) if sequence_parallel else slice(None)
        hidden, weight, bias = (
            t.detach()[at].clone().requires_grad_() for t, at in zip(whole, (here, rows, rows))
        )
        layer = SimpleNamespace(
            weight=None,
            bias=bias,
            skip_bias_add=False,
            tp_group=group,
            sequence_parallel=sequence_parallel,
            allreduce_dgrad=not sequence_parallel,
            config=SimpleNamespace(defer_embedding_wgrad_compute=False),
        )
        loss = hook(
            hidden_states=hidden, output_layer=layer, output_weight=weight, labels=labels, context=None
        )
        own = torch.autograd.grad((loss * upstream).sum(), [hidden, weight, bias])
        made.append((loss.detach(), own, truth.detach(), [true[0][here], true[1][rows], true[2][rows]]))
    layer.config.defer_embedding_wgrad_compute = True
    assert "set it to False" in told(lambda: megatron.output_head(hidden, layer), "")[1]
    return made


def of_split_logits(group):
    """(name, this rank's loss and gradient, those of the formula on the whole) of losses that take DTensors or ranks."""
    rank, mesh = dist.get_rank(group), DeviceMesh.from_group(group, "cpu")
    student, teacher = leaf(2, 3, 15), 2 * leaf(2, 3, 15, seed=1).detach()
    labels = torch.tensor([[0, 4, -100], [5, 10, 14]])
    here, live = slice(5 * rank, 5 * rank + 5), labels.ne(-100)
    p, q = (torch.log_softmax(z / 2.0, -1) for z in (teacher, student))
    kl = 4 * (p.exp() * (p - q)).sum(-1)[live]
    nll = -student.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][live].sum()
    split, local = distribute_tensor(student.detach(), mesh, [Shard(-1)]), student.detach()[..., here].clone()
    theirs, copied = (
        distribute_tensor(teacher, mesh, [Shard(-1)]),
        distribute_tensor(teacher, mesh, [Replicate()]),
    )
    given = distribute_tensor(student.detach(), mesh, [Replicate()])
    kd_loss, ranks = automodel.KDLoss(temperature=2.0), automodel.KDLoss(temperature=2.0, tp_group=group)
    made = []
    for name, loss, truth, at in [
        ("KDLoss, DTensors", lambda s: kd_loss(s, theirs, labels), kl.mean(), split),
        ("KDLoss, whole DTensors", lambda s: kd_loss(s, copied, labels), kl.mean(), given),
        ("KDLoss, ranks", lambda s: ranks(s, teacher[..., here], labels, 7), kl.sum() / 7, local),
        ("cross_entropy_loss", lambda s: torchtitan.cross_entropy_loss(s, labels), nll, split),
    ]:
        at = at.detach().requires_grad_()
        value = loss(at)
        (own,) = torch.autograd.grad(value, at)
        (true,) = torch.autograd.grad(truth, student, retain_graph=True)
        own = own.full_tensor() if isinstance(own, DTensor) else own
        made.append(
            (name, value.detach(), own, truth.detach(), true if own.shape == true.shape else true[..., here])
        )
    return made


def killed(rank, folder):
    """Rank 1 dies between two losses; rank 0 writes what the second one says."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/killed",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=20),
    )
    student = kd.ShardedLogits(torch.zeros(3, 5), kd.Shard())
    kd.cross_entropy(student, torch.tensor([2, 4, 9]))
    if rank == 1:
        os._exit(0)
    said = told(lambda: kd.cross_entropy(student, torch.tensor([2, 4, 9])), "")
    torch.save(said, f"{folder}/said")
    os._exit(0)


OTHERS = {
    "mistake in sparse targets": mistaken_sparse,
    "Megatron": megatrons,
    "Megatron's output": megatrons_output,
    "ModelOpt": modelopt_losses,
    "split logits": of_split_logits,
    "dtensors": dtensors,
    "dtensors of own tokens": dtensors_of_own_tokens,
    "autocast": autocast,
    "heads of meshes": heads_of_meshes,
    "refused dtensors": refused_dtensors,
    "compiled": compiled,
    **{f"trained by {wrapper}": functools.partial(trained, wrapper) for wrapper in ("DDP", "FSDP2")},
    "trained by FSDP2 with tied embeddings": trained_with_tied_embeddings,
    "reshard_head": resharded,
    "global_tokens": counted_tokens,
    "nan": nan,
    "twice": twice,
    "own tokens twice": own_tokens_twice,
    "own dH": own_dh,
    "unbroken": functools.partial(sharded, BROKEN),
    **{f"mistake: {mistake}": functools.partial(mistaken, mistake) for mistake in MISTAKES},
}


def on_rank(rank, folder, given):
    """Every case of this rank's groups; an exception is a result too."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    groups = {size: dist.new_group(list(range(WORLD - size, WORLD))) for size in (2, 3, 4)}
    made = {}
    for key, size, work, *rest in given:
        if rank < WORLD - size:
            continue
        try:
            made[key] = work(*rest, groups[size])
        except Exception:
            made[key] = traceback.format_exc()
    torch.save(made, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def run(folder, given):
    """``work(*rest, group)`` of every (key, ranks, work, *rest), on each rank: {key: [results by rank]}."""
    mp.spawn(on_rank, (str(folder), given), WORLD)
    made = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(WORLD)]
    return {key: [results[key] for results in made if key in results] for key, *_ in given}
