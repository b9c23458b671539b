"""TRL's real trainers, patched and not: twenty steps, evaluation, resuming, LoRA, memory."""

import contextlib
import importlib
import os
import sys
import types

import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl")

import tiny  # noqa: E402
import torch  # noqa: E402
from peak import peak_of  # noqa: E402
from trl import DistillationConfig, DistillationTrainer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402
from trl.experimental.gold import GOLDConfig, GOLDTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from kdkernels.integrations import trl as dropin  # noqa: E402

STEPS = 20
TRAINERS = {
    "distillation": (DistillationTrainer, DistillationConfig, tiny.prompts, dict(max_completion_length=8)),
    "gkd": (GKDTrainer, GKDConfig, tiny.conversations, dict(max_new_tokens=8, lmbda=0.5, max_length=48)),
    "gold": (
        GOLDTrainer,
        GOLDConfig,
        tiny.conversations,
        dict(max_completion_length=8, lmbda=0.5, max_length=48),
    ),
}


def trainer(kind, folder, student=None, **options):
    cls, config, data, own = TRAINERS[kind]
    options = dict(max_steps=STEPS, save_strategy="no", beta=0.5, **own) | options
    args = config(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=3,
        **options,
    )
    return cls(
        model=student or tiny.model(),
        teacher_model=tiny.model(48, seed=1),
        args=args,
        train_dataset=data(),
        eval_dataset=data(8),
        processing_class=tiny.tokenizer(),
    )


def history(made, key="loss"):
    return torch.tensor([line[key] for line in made.state.log_history if key in line])


def counted(monkeypatch):
    """How often one of our losses is called: a patch that is not reached proves nothing."""
    calls = []
    real = dropin.js_divergence
    monkeypatch.setattr(dropin, "js_divergence", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    return calls


@pytest.mark.parametrize("kind", TRAINERS)
def test_twenty_steps_agree(kind, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    results = []
    for context in (contextlib.nullcontext, dropin.patch):
        with context():
            made = trainer(kind, tmp_path)
            made.train()
            results.append((history(made), made.evaluate()["eval_loss"], calls.copy()))
    (theirs, their_eval, before), (ours, our_eval, after) = results
    assert not before and len(after) >= 2 * STEPS
    assert len(ours) == STEPS and ours.unique().numel() > STEPS // 2
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    assert our_eval == pytest.approx(their_eval, rel=2e-5)


@pytest.mark.parametrize("kind", ["distillation", "gkd"])
def test_resume(kind, tmp_path):
    """A checkpoint made patched goes on, patched or not, to the same losses."""
    with dropin.patch():
        trainer(kind, tmp_path, max_steps=10, save_strategy="steps", save_steps=10).train()
    losses = []
    for context in (contextlib.nullcontext, dropin.patch):
        with context():
            made = trainer(kind, tmp_path / "again")
            made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
        assert made.state.global_step == STEPS
        losses.append(history(made)[10:])
    assert len(losses[0]) == 10
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["distillation", "gkd"])
def test_lora(kind, tmp_path):
    """The lm_head is frozen; TRL 1.16 refuses adapters on it."""
    peft = pytest.importorskip("peft")
    losses = []
    for context in (contextlib.nullcontext, dropin.patch):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        student = peft.get_peft_model(tiny.model(), config)
        with context():
            made = trainer(kind, tmp_path, student, max_steps=5)
            made.train()
        assert any(p.any() for n, p in student.named_parameters() if "lora_B" in n)
        losses.append(history(made))
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-5, atol=1e-6)


def test_memory_of_logit_losses_falls():
    student, teacher = (torch.randn(1, 256, 32768) for _ in range(2))
    labels = torch.zeros(1, 256, dtype=torch.int64)

    def step():
        leaf = student.detach().requires_grad_()
        GKDTrainer.generalized_jsd_loss(leaf, teacher, labels).backward()

    theirs = peak_of(step)
    with dropin.patch():
        ours = peak_of(step)
    unit = student.numel() * 4
    assert theirs >= 6 * unit and ours <= 1.5 * unit


def test_memory_of_the_chunked_loss_falls():
    hidden, t_hidden = torch.randn(1, 512, 16, requires_grad=True), torch.randn(1, 512, 16)
    weight, t_weight = torch.randn(32768, 16), torch.randn(32768, 16)
    mask = torch.ones(1, 512)

    def step():
        distillation_trainer._chunked_divergence_loss(hidden, t_hidden, weight, t_weight, mask, 0.5)[
            0
        ].backward()

    theirs = peak_of(step)
    with dropin.patch():
        ours = peak_of(step)
    assert ours <= 0.6 * theirs


def attributes():
    return [target.get() for target in dropin._TARGETS]


def test_unpatch_puts_the_same_objects_back():
    before = attributes()
    with dropin.patch():
        during = attributes()
        with dropin.patch():
            pass
        assert all(a is b for a, b in zip(attributes(), during)), "the inner block undid the outer"
    assert all(a is b for a, b in zip(attributes(), before))
    assert not any(a is b for a, b in zip(during, before))
    dropin.patch()
    dropin.unpatch()
    dropin.unpatch()
    assert all(a is b for a, b in zip(attributes(), before))


def test_what_was_imported_by_name_follows(monkeypatch):
    """Before patch() or while it holds; two trainers have functions of the same name, each its own."""
    utils = importlib.import_module("trl.trainer.utils")
    theirs, name = utils.selective_log_softmax, "selective_log_softmax"
    earlier, later = types.ModuleType("trl.earlier"), types.ModuleType("trl.later")
    earlier.selective_log_softmax = theirs
    monkeypatch.setitem(sys.modules, "trl.earlier", earlier)
    with dropin.patch():
        later.selective_log_softmax = utils.selective_log_softmax
        monkeypatch.setitem(sys.modules, "trl.later", later)
        assert [getattr(module, name) for module in (utils, earlier, later)] == [
            dropin.selective_log_softmax
        ] * 3
    assert [getattr(module, name) for module in (utils, earlier, later)] == [theirs] * 3


def test_unpatch_after_an_error():
    before = attributes()
    with pytest.raises(KeyError), dropin.patch():
        raise KeyError
    assert all(a is b for a, b in zip(attributes(), before))


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "1.17.0.dev0", "2.0"])
def test_other_versions_are_refused(version, monkeypatch):
    before = attributes()
    monkeypatch.setattr(dropin.importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=rf"tested with trl >=1.16,<1.17 and trl {version} is installed"):
        dropin.patch()
    assert all(a is b for a, b in zip(attributes(), before))


def test_another_signature_is_refused(monkeypatch):
    monkeypatch.setattr(GOLDTrainer, "generalized_jsd_loss", staticmethod(lambda student, teacher: None))
    before = attributes()
    with pytest.raises(RuntimeError, match="GOLDTrainer.generalized_jsd_loss takes"):
        dropin.patch()
    assert all(a is b for a, b in zip(attributes(), before))


def test_somebody_elses_patch_is_not_lost(monkeypatch):
    with dropin.patch():
        ours = vars(GKDTrainer)["generalized_jsd_loss"]
        GKDTrainer.generalized_jsd_loss = staticmethod(print)
        with pytest.raises(RuntimeError, match="GKDTrainer.generalized_jsd_loss was replaced again"):
            dropin.unpatch()
        GKDTrainer.generalized_jsd_loss = ours
