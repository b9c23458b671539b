"""What holds on shards beside exactness: NaN, a second backward, autocast, a compiler; rows that move, tokens that are counted."""

import torch
import torch.distributed as dist
from shard_processes import counted, leaf

import kdkernels as kd


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


def inplace_views(group):
    """(whether the logits, columns of a wider tensor, were overwritten, and nothing beside them; gradients in place and
    not), of columns that lie side by side and of others."""
    labels, made = torch.tensor([0, 4, 9, 14]), []
    for transposed in (False, True):
        gradients = []
        for inplace in (False, True):
            given = leaf(9, 4).T if transposed else leaf(4, 9)
            wide = given * 1.0
            before, logits = wide.detach().clone(), wide[:, 2:7]
            loss = kd.cross_entropy(kd.ShardedLogits(logits, kd.Shard(group)), labels, inplace=inplace)
            changed = (wide.detach() != before).any(0).tolist()
            gradients.append(torch.autograd.grad(loss, given)[0])
        made.append((changed, *gradients))
    return made


def compiled(group):
    """(loss and gradients of a function as it is, and compiled whole). Each is the first to use its shard."""
    labels, made = torch.tensor([0, 4, 9, 14]), []

    def loss(hidden, weight, shard):
        return kd.cross_entropy(kd.LinearHead(hidden, weight, shard=shard), labels, label_smoothing=0.1)

    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for width in (5, 5 + dist.get_rank(group)):  # where one rank's width changes, all of them ask again
        for function in (loss, compiled_loss):
            leaves = [leaf(4, 6), leaf(width, 6, seed=1 + dist.get_rank(group))]
            value = function(*leaves, kd.Shard(group))
            made.append([value.detach(), *torch.autograd.grad(value, leaves)])
    return made


def shard_made_while_compiling(group):
    """What is said of it: the code would make another one each time, and ask once."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(logits):
        return kd.cross_entropy(kd.ShardedLogits(logits, kd.Shard(group)), torch.tensor([0, 4, 9, 14]))

    try:
        loss(leaf(4, 5))
    except Exception as error:
        return [str(error)]
