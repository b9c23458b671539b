"""ModelOpt's logit losses: the Hugging Face one beside its own, the Megatron ones beside their formula."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, outcome
from source import load

from kdkernels.integrations import modelopt as dropin

HERE = Path(__file__).parent
original = load("nvidia-modelopt", "modelopt/torch/distill/losses.py")


def logits(shape=(3, 4, 29)):
    return [2 * torch.randn(shape, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(3, 4, 29), (7, 29)])
def test_logits_distillation_loss(reduction, temperature, shape):
    student, teacher = logits(shape)
    ours, theirs = (
        outcome(m.LogitsDistillationLoss(temperature, reduction), [student], teacher)
        for m in (dropin, original)
    )
    assert_same(ours, theirs, 1e-11)


def test_their_conversion_takes_it(tmp_path):
    """A model that ``mtd.convert`` wraps, distilled whole and at a layer: the loss and the gradient are theirs."""
    subprocess.run(
        [sys.executable, HERE.parent / "isolated" / "modelopt_conversion.py", tmp_path / "outcomes.pt"],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        check=True,
        timeout=300,
    )
    for ours, theirs in torch.load(tmp_path / "outcomes.pt"):
        assert theirs[1].norm() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.fixture
def trainers(monkeypatch):
    """modelopt.torch.distill.plugins.huggingface, with names alone in the place of what it imports beside the loss."""
    trainer = type(
        "Trainer", (), {"__init__": lambda self: None, "is_fsdp_enabled": False, "use_liger_kernel": False}
    )
    stand_ins = {
        "modelopt.torch.distill.losses": vars(original),
        "modelopt.torch.opt.plugins": {"ModelOptHFTrainer": trainer},
        "modelopt.torch.opt.plugins.transformers": {
            "_LIGER_KERNEL_IMPORT_ERROR": "",
            "ModelOptHFArguments": SimpleNamespace,
            "_forward_redirect": None,
            "is_liger_available": None,
        },
        "modelopt.torch.utils": {"print_rank_0": print},
    }
    for name in ("modelopt", "modelopt.torch", "modelopt.torch.distill", "modelopt.torch.opt"):
        stand_ins.setdefault(name, {})
    for name, attributes in stand_ins.items():
        module = ModuleType(name)
        vars(module).update({k: v for k, v in attributes.items() if k not in ("__name__", "__spec__")})
        monkeypatch.setitem(sys.modules, name, module)
    return load("nvidia-modelopt", "modelopt/torch/distill/plugins/huggingface.py")


def test_replace(trainers):
    """Their Hugging Face trainer's own loss of a batch, before and after."""
    pytest.importorskip("transformers")
    settings = SimpleNamespace(criterion="logits_loss", teacher_model=torch.nn.Linear(1, 1), temperature=2.0)
    trainer = trainers.KDTrainer(distill_args=settings)
    student, teacher = logits()
    labels = torch.tensor([[1, -100, 2, 5], [3, 4, -100, 9], [-100, 0, 7, 6]])

    def loss(s):
        trainer._last_teacher_outputs = SimpleNamespace(logits=teacher)
        return trainer._standard_kd_loss(SimpleNamespace(logits=s), labels)

    theirs = outcome(loss, [student])
    dropin.replace(trainer)
    assert isinstance(trainer._kd_criterion, dropin.LogitsDistillationLoss)
    assert_same(outcome(loss, [student]), theirs, 1e-5)
    with pytest.raises(TypeError, match="its _kd_criterion, found None in .*SimpleNamespace"):
        dropin.replace(SimpleNamespace())
    with pytest.raises(TypeError, match=r"found MSELoss\(\) in"):
        dropin.replace(SimpleNamespace(_kd_criterion=torch.nn.MSELoss()))
    trainer.use_liger_kernel = True
    with pytest.raises(ValueError, match="the trainer's loss is Liger's"):
        dropin.replace(trainer)


def formula(student, teacher, temperature, reverse):
    p, q = (z.div(temperature).log_softmax(-1) for z in (student, teacher))
    p, q = (q, p) if reverse else (p, q)
    return F.kl_div(p, q, reduction="none", log_target=True).sum(-1).transpose(0, 1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reverse", [False, True])
def test_logits_kl_loss(temperature, reverse):
    student, teacher = logits()
    loss = dropin.LogitsKLLoss(None, temperature, reverse)
    values, gradients = outcome(lambda s: loss(s, teacher)[0], [student])
    assert_same((values, gradients), outcome(formula, [student], teacher, temperature, reverse), 1e-11)
    assert loss(student, teacher)[1:] == (True, False)
    assert torch.equal(loss((student, None), (teacher, None))[0], values[0])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("top_k", [1, 5, 29])
def test_top_k_logits_kl_loss(temperature, reverse, top_k):
    student, teacher = logits()
    values, ids = teacher.topk(top_k, -1)
    loss = dropin.TopKLogitsKLLoss(None, temperature, reverse, top_k)
    ours = outcome(lambda s: loss(s, teacher)[0], [student])
    theirs = outcome(lambda s: formula(s.gather(-1, ids), values, temperature, reverse), [student])
    assert_same(ours, theirs, 1e-11, zero_gradient=top_k == 1)
    assert loss(student, teacher)[1:] == (False, False)


def test_signature_and_refusals():
    ours, theirs = (inspect.signature(m.LogitsDistillationLoss.__init__) for m in (dropin, original))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]
    with pytest.raises(ModuleNotFoundError, match="megatron"):  # many ranks: tests/test_shards.py
        dropin.LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=2))(*logits())
    with pytest.raises(ValueError, match="top_k=30 is larger"):
        dropin.TopKLogitsKLLoss(top_k=30)(*logits())
