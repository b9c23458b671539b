"""Gradients of a body and of this rank's rows of the lm_head under data parallelism, and those of one process."""

import torch
import torch.distributed as dist
from shard_processes import leaf
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import kdkernels as kd


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
