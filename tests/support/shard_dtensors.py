"""DTensors in and out, beside one process."""

import torch
import torch.distributed as dist
from shard_processes import leaf
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import kdkernels as kd
from kdkernels.integrations.common import replicated


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
        if len(tensors) == 1:
            expected = torch.autograd.grad(losses[0], parts, retain_graph=True)[0]
            inplace = kd.cross_entropy(parts[0] * 1, labels, label_smoothing=0.1, inplace=True)
            assert torch.equal(torch.autograd.grad(inplace, parts)[0].to_local(), expected.to_local())
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


def two_dimensions(group):
    """The local tokens' loss of logits on a mesh of data and tensor parallel ranks, and of one process."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    logits, labels = leaf(4, 9), torch.tensor([0, 4, 5, 8])
    parts = distribute_tensor(logits.detach(), mesh, [Shard(0), Shard(-1)])
    here = slice(2 * mesh.get_local_rank(0), 2 * mesh.get_local_rank(0) + 2)
    return kd.cross_entropy(parts, labels[here]), kd.cross_entropy(logits.detach()[here], labels[here])
