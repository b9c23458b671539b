"""unsloth_zoo's loss of draft heads beside its own, loaded file by file: its package wants a GPU and more."""

import importlib.metadata
import re
import sys
import textwrap
import types

import pytest
import torch
from compare import assert_same, outcome
from source import load

from kdkernels.integrations import unsloth as dropin

original = load("unsloth_zoo", "unsloth_zoo/speculative/losses.py")
B, T, H, V = 2, 6, 12, 47


@pytest.fixture(autouse=True)
def module(monkeypatch):
    for name in ("unsloth_zoo", "unsloth_zoo.speculative"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "unsloth_zoo.speculative.losses", original)


def batch(dtype=torch.float64, teacher_width=H):
    """[hidden, weight], labels of which some are masked and some the most probable token, [teacher's hidden, weight]."""
    student, teacher = (
        [torch.randn(B, T, width, dtype=dtype), torch.randn(V, width, dtype=dtype)]
        for width in (H, teacher_width)
    )
    labels = (student[0] @ student[1].t()).argmax(-1)
    labels[:, ::2] = torch.randint(0, V, labels[:, ::2].shape)
    labels[0, :2] = -100
    return student, labels, teacher


def both(student, labels, *teacher, **options):
    """Outcomes of ours and theirs; the counts are values as well."""

    def call(loss):
        def function(*leaves):
            value, *counts = loss(*leaves, labels, **options)
            assert all(isinstance(count, int) for count in counts)
            return (value, *map(torch.tensor, counts))

        return outcome(function, student)

    if teacher:
        options |= {"teacher_hidden": teacher[0], "teacher_lm_head_weight": teacher[1]}
    return call(dropin.chunked_lm_loss), call(original.chunked_lm_loss)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 3e-5)])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("loss_type", dropin.LOSS_TYPES)
def test_every_loss(loss_type, softcap, dtype, tolerance):
    student, labels, teacher = batch(dtype, teacher_width=20)
    teacher = [] if loss_type == "ce" else teacher
    ours, theirs = both(
        student, labels, *teacher, loss_type=loss_type, logit_softcap=softcap, chunk_size=4, lk_eta=2.0
    )
    assert_same(ours, theirs, tolerance)
    tokens, correct = ours[0][1:]
    assert tokens == B * T - 2 and 0 < correct < tokens


@pytest.mark.parametrize("loss_type", ["kl_div", "lk_hybrid"])
def test_a_teacher_by_the_drafts_own_head(loss_type):
    (hidden, weight), labels, (teacher, _) = batch()
    ours, theirs = both([hidden, weight], labels, loss_type=loss_type, teacher_hidden=teacher)
    assert_same(ours, theirs, 1e-9)


@pytest.mark.parametrize("loss_type", dropin.LOSS_TYPES)
def test_no_token_counts(loss_type):
    student, labels, (teacher, _) = batch()
    ours, theirs = both(student, torch.full_like(labels, -100), loss_type=loss_type, teacher_hidden=teacher)
    assert_same(ours, theirs, 0, zero_gradient=True)


@pytest.mark.parametrize("loss_type", dropin.LOSS_TYPES)
def test_labels_outside_of_the_vocabulary(loss_type):
    """A divergence only compares them with the most probable token; a cross entropy has no such token."""
    student, labels, (teacher, _) = batch()
    for outside in (V, V + 900, -1):
        labels[1, 2] = outside
        if loss_type == "ce":
            with pytest.raises(IndexError):
                original.chunked_lm_loss(*student, labels)
            with pytest.raises(ValueError, match=f"found {outside}"):
                dropin.chunked_lm_loss(*student, labels)
            continue
        ours, theirs = both(student, labels, loss_type=loss_type, teacher_hidden=teacher)
        assert_same(ours, theirs, 1e-9)
        assert ours[0][2] > 0


@pytest.mark.parametrize("ignore_index", [-1, 0])
@pytest.mark.parametrize("loss_type", ["ce", "tv"])
def test_another_ignored_label(loss_type, ignore_index):
    student, labels, (teacher, _) = batch()
    labels = labels.where(labels != -100, ignore_index)
    options = dict(loss_type=loss_type, teacher_hidden=teacher, ignore_index=ignore_index)
    assert_same(*both(student, labels, **options), 1e-9)


def test_half_precision():
    """Logits are in the heads' dtype on both sides; the rest is fp32."""
    (hidden, weight), labels, (teacher, _) = batch(torch.bfloat16)
    ours, theirs = both([hidden, weight], labels, loss_type="kl_div", teacher_hidden=teacher)
    assert ours[0][0].dtype == torch.float32
    assert_same(ours, theirs, 2e-2)


def test_padding_is_no_term():
    (hidden, weight), labels, (teacher, _) = batch()
    hidden, teacher = hidden.abs(), teacher.abs()
    weight[40:] = -torch.inf
    options = dict(loss_type="kl_div", teacher_hidden=teacher)
    labels = labels.clamp(max=39)
    assert original.chunked_lm_loss(hidden, weight, labels, **options)[0].isnan()
    torch.testing.assert_close(
        dropin.chunked_lm_loss(hidden, weight, labels, **options)[0],
        original.chunked_lm_loss(hidden, weight[:40], labels, **options)[0],
    )


def test_mistakes():
    (hidden, weight), labels, (teacher, _) = batch()
    with pytest.raises(ValueError, match="loss_type='jsd' is none of ce, kl_div"):
        dropin.chunked_lm_loss(hidden, weight, labels, "jsd")
    with pytest.raises(ValueError, match="'tv' needs teacher_hidden"):
        dropin.chunked_lm_loss(hidden, weight, labels, "tv")
    with pytest.raises(ValueError, match="47"):
        dropin.chunked_lm_loss(hidden, weight, labels, "tv", teacher, weight[:40])


def test_unsloth_comes_first(monkeypatch, tmp_path):
    """unsloth_zoo's own beginning, which refuses to be imported where ``import unsloth`` has not been."""
    files = importlib.metadata.files("unsloth_zoo")
    source = next(file for file in files if str(file) == "unsloth_zoo/__init__.py").read_text()
    check = re.search(
        r'^ +if not \("UNSLOTH_IS_PRESENT" in os.environ\):\n +raise ImportError.*\n', source, re.M
    )
    (tmp_path / "unsloth_zoo").mkdir()
    (tmp_path / "unsloth_zoo" / "__init__.py").write_text("import os\n" + textwrap.dedent(check[0]))
    for name in [name for name in sys.modules if name.partition(".")[0] == "unsloth_zoo"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2026.10.9")
    monkeypatch.delenv("UNSLOTH_IS_PRESENT", raising=False)
    with pytest.raises(ImportError, match="import unsloth before unsloth.patch()"):
        dropin.patch()
    monkeypatch.setenv("UNSLOTH_IS_PRESENT", "1")
    with pytest.raises(
        RuntimeError, match="unsloth_zoo has no unsloth_zoo.speculative.losses.chunked_lm_loss"
    ):
        dropin.patch()


def test_versions_without_the_function_are_refused(monkeypatch):
    for version in ("2026.10", "2026.10.5", "2026.11"):
        monkeypatch.setattr(importlib.metadata, "version", lambda package, version=version: version)
        with pytest.raises(
            RuntimeError, match=f">=2026.10.6,<2026.11 and unsloth_zoo {version} is installed"
        ):
            dropin.patch()
    for version in ("2026.10.6", "2026.10.10"):
        monkeypatch.setattr(importlib.metadata, "version", lambda package, version=version: version)
        with dropin.patch():
            assert original.chunked_lm_loss is dropin.chunked_lm_loss


def test_patch_reaches_the_trainer(monkeypatch):
    trainer = types.ModuleType("unsloth_zoo.speculative.trainer")
    trainer.chunked_lm_loss = original.chunked_lm_loss
    monkeypatch.setitem(sys.modules, "unsloth_zoo.speculative.trainer", trainer)
    with dropin.patch():
        assert trainer.chunked_lm_loss is original.chunked_lm_loss is dropin.chunked_lm_loss
    assert trainer.chunked_lm_loss is original.chunked_lm_loss is not dropin.chunked_lm_loss
