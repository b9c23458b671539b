"""DistillationTrainer's loss with lm_heads sharded over two processes, as FSDP2 leaves them."""

import pytest
import torch
import torch.distributed as dist
from compare import assert_same, relative
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

pytest.importorskip("trl")


def on_rank(rank, store, hidden, weights, biases, mask):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    from kdkernels.integrations.trl import chunked_divergence_loss

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def run(function, shard, hidden=hidden):
        place = (lambda t: distribute_tensor(t, mesh, [Shard(0)])) if shard else torch.clone
        student, teacher = [place(w) for w in weights], [place(b) for b in biases]
        leaves = [hidden[0].clone(), student[0], teacher[0]]
        for leaf in leaves:
            leaf.requires_grad_()
        values = function(
            leaves[0],
            hidden[1],
            leaves[1],
            student[1],
            mask,
            0.5,
            student_lm_head_bias=leaves[2],
            teacher_lm_head_bias=teacher[1],
        )
        values[0].backward()
        grads = [leaf.grad.full_tensor() if shard and i else leaf.grad for i, leaf in enumerate(leaves)]
        return [v.detach() for v in values], grads

    ours, theirs = run(chunked_divergence_loss, True), run(_chunked_divergence_loss, True)
    assert_same(ours, theirs, 3e-5)
    assert_same(ours, run(chunked_divergence_loss, False), 1e-6)
    # Each rank its own data, as in training: the head's gradient is the mean here. TRL's is not reduced
    # where the head is a unit of its own: a rank keeps its slice of the gradient of its own data.
    data = hidden[0] * (rank + 1), hidden[1]
    mean = run(chunked_divergence_loss, False, data)[1][1]
    dist.all_reduce(mean, dist.ReduceOp.SUM)
    ours, theirs = (run(f, True, data)[1][1] for f in (chunked_divergence_loss, _chunked_divergence_loss))
    assert relative(ours, mean / 2) < 1e-6 and relative(theirs, mean / 2) > 0.1
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_heads(tmp_path):
    hidden = torch.randn(2, 3, 16), torch.randn(2, 3, 24)
    weights = torch.randn(38, 16), torch.randn(38, 24)
    biases = torch.randn(38), torch.randn(38)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    torch.multiprocessing.spawn(on_rank, (tmp_path / "store", hidden, weights, biases, mask), nprocs=2)
