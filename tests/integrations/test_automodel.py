"""NeMo Automodel's KDLoss beside its own; on many ranks in test_shards.py."""

import inspect

import pytest
import torch
from compare import assert_same, outcome
from source import load

from kdkernels.integrations import automodel as dropin

original = load("nemo-automodel", "nemo_automodel/components/loss/kd_loss.py")
LABELS = torch.tensor([[1, -100, 2, 5], [3, 4, -100, 900], [-100, 0, 7, 6]])


def logits(dtype=torch.float64):
    return [(2 * torch.randn(3, 4, 29)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.5}, {"chunk_size": 2}, {"ignore_index": 3}], ids=str
)
@pytest.mark.parametrize("num_batch_labels", [None, 17])
@pytest.mark.parametrize("flat", [False, True])
def test_kd_loss(options, num_batch_labels, flat):
    student, teacher = logits()
    labels = LABELS.flatten() if flat else LABELS
    options = {"fp32_upcast": False} | options
    if options.get("chunk_size"):  # theirs is then in fp32
        student, teacher = student.float(), teacher.float()
    ours, theirs = (
        outcome(m.KDLoss(**options), [student], teacher, labels, num_batch_labels) for m in (dropin, original)
    )
    assert_same(ours, theirs, 1e-6)


def test_half_precision():
    """Rows in fp32, the gradient in the logits' dtype: theirs to its rounding."""
    student, teacher = logits(torch.bfloat16)
    ours, theirs = (outcome(m.KDLoss(), [student], teacher, LABELS) for m in (dropin, original))
    assert ours[1][0].dtype == torch.bfloat16
    assert_same(ours, theirs, 4e-3)


def test_padding_and_nothing_to_learn():
    student, teacher = logits()
    teacher[..., 20:] = -torch.inf
    ours, theirs = (
        outcome(m.KDLoss(), [student.float()], teacher.float(), LABELS) for m in (dropin, original)
    )
    assert_same(ours, theirs, 1e-6)
    masked = torch.full_like(LABELS, -100)
    (value,), (gradient,) = outcome(dropin.KDLoss(), [student], teacher, masked)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("nothing", [0, 0.0, torch.tensor(0)])
def test_nothing_to_divide_by(nothing):
    """Theirs is 0 where no token counts, and infinite where one does."""
    student, teacher = logits()
    masked = torch.full_like(LABELS, -100)
    ours, theirs = (outcome(m.KDLoss(), [student], teacher, masked, nothing) for m in (dropin, original))
    assert_same(ours, theirs, 0, zero_gradient=True)
    assert original.KDLoss()(student, teacher, LABELS, nothing).isinf()
    with pytest.raises(ValueError, match="num_items must be > 0 where any token counts"):
        dropin.KDLoss()(student, teacher, LABELS, nothing)


@pytest.mark.parametrize("flat", ["student", "teacher"])
def test_one_side_may_be_flat(flat):
    student, teacher = logits()
    student, teacher = (
        z.flatten(0, 1) if name == flat else z for name, z in (("student", student), ("teacher", teacher))
    )
    ours, theirs = (outcome(m.KDLoss(), [student], teacher, LABELS) for m in (dropin, original))
    assert_same(ours, theirs, 1e-6)


def dtensors_on_rank(rank, folder, student, teacher):
    """Every placement that theirs takes beside it, the gradient too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))

    def placed(tensor, how):
        return tensor.clone() if how is None else distribute_tensor(tensor, mesh, [how])

    def run(module, *places):
        s, t = (placed(z, how) for z, how in zip((student, teacher), places))
        s.requires_grad_()
        loss = module.KDLoss(temperature=2.0)(s, t, LABELS)
        loss.backward()
        return [getattr(z, "full_tensor", lambda z=z: z)() for z in (loss, s.grad)]

    for places in ((None, Shard(2)), (None, Replicate()), (Replicate(), Shard(2)), (Shard(1), Shard(2))):
        ours, theirs = run(dropin, *places), run(original, *places)
        assert theirs[1].norm() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    # Theirs takes no labels that are a DTensor.
    whole = dropin.KDLoss()(student, teacher, LABELS)
    labels = distribute_tensor(LABELS, mesh, [Shard(1)])
    torch.testing.assert_close(dropin.KDLoss()(student, teacher, labels), whole)
    torch.distributed.destroy_process_group()


def test_what_is_sharded_beside_a_whole_student_is_made_whole(tmp_path):
    """On two processes; a student that is sharded over the vocabulary is in test_shards.py."""
    student, teacher = logits(torch.float32)
    student, teacher = (z[..., :28].contiguous() for z in (student, teacher))
    torch.multiprocessing.spawn(dtensors_on_rank, (tmp_path, student, teacher), nprocs=2)


def test_the_signatures_are_theirs():
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(m.KDLoss, method)) for m in (dropin, original))
        assert [(p.name, p.default) for p in ours.parameters.values()] == [
            (p.name, p.default) for p in theirs.parameters.values()
        ]
