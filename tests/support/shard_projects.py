"""Other projects' losses of sharded logits, by their names, beside their formulas on the whole."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from shard_processes import leaf, patched, told
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import kdkernels as kd
from kdkernels.integrations import automodel, megatron, modelopt, torchtitan


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
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.933333\] with 15 ids, got 0.95"):
        megatron.vocab_parallel_cross_entropy(part, labels, 0.95, group)
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
    fields = dict(defer_embedding_wgrad_compute=False, mtp_num_layers=None, gradient_accumulation_fusion=True)
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
            config=SimpleNamespace(**fields),
        )
        loss = hook(
            hidden_states=hidden, output_layer=layer, output_weight=weight, labels=labels, context=None
        )
        own = torch.autograd.grad((loss * upstream).sum(), [hidden, weight, bias])
        made.append((loss.detach(), own, truth.detach(), [true[0][here], true[1][rows], true[2][rows]]))
    for refused, way_out in [
        (dict(defer_embedding_wgrad_compute=True), "set it to False"),
        (dict(mtp_num_layers=1), "set gradient_accumulation_fusion=False"),
        (dict(use_mup=True), "from the model's logits"),
    ]:
        layer.config = SimpleNamespace(**fields | refused)
        kind, message, _ = told(lambda: megatron.output_head(hidden, layer, weight), "")
        assert kind == "ValueError" and message.endswith(way_out) and "\n" not in message, message
    layer.config = SimpleNamespace(**fields | dict(mtp_num_layers=1, gradient_accumulation_fusion=False))
    assert megatron.output_head(hidden, layer, weight).weight is weight
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
    marked = distribute_tensor(labels, mesh, [Replicate()])
    kd_loss, ranks = automodel.KDLoss(temperature=2.0), automodel.KDLoss(temperature=2.0, tp_group=group)
    made = []
    for name, loss, truth, at in [
        ("KDLoss, DTensors", lambda s: kd_loss(s, theirs, labels), kl.mean(), split),
        ("KDLoss, labels too", lambda s: kd_loss(s, theirs, marked), kl.mean(), split),
        ("KDLoss, whole DTensors", lambda s: kd_loss(s, copied, labels), kl.mean(), given),
        ("KDLoss, ranks", lambda s: ranks(s, teacher[..., here], labels, 7), kl.sum() / 7, local),
        ("KDLoss, ranks and labels", lambda s: ranks(s, teacher[..., here], marked), kl.mean(), local),
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
