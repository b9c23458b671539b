"""Every example runs as it stands, ends better than it began, and can be read in one sitting."""

import re
import runpy

import pytest
import torch
from trainer_runs import ROOT, process

import kdkernels as kd

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name, capsys):
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def numbers(text, before):
    return [float(number) for number in re.findall(rf"{before} (-?[\d.]+)", text)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_is_short_and_says_how_it_is_run(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    assert re.search(rf"^(python|torchrun .*) examples/{path.name}$", text, re.M)
    assert f"def test_{path.stem}(" in open(__file__).read()


def test_replace_kl_div(capsys):
    said = run("replace_kl_div.py", capsys)
    (before, after) = numbers(said, "loss")
    assert before == pytest.approx(after, rel=1e-5) and len(numbers(said, "peak of the step +")) == 2


def test_offline_teacher(capsys):
    pytest.importorskip("pyarrow")
    said = run("offline_teacher.py", capsys)
    first, last = numbers(said, "outcomes")
    assert last < first / 2 and "bytes per token on disk" in said


def test_codistillation(capsys):
    said = run("codistillation.py", capsys)
    for model in ("student", "teacher"):
        losses = numbers(said, model)
        assert losses[-1] < 0.8 * losses[0]


def test_hf_trainer(capsys):
    pytest.importorskip("transformers")
    before, after = numbers(run("hf_trainer.py", capsys).replace("before, ", "teacher: "), "teacher:")
    assert after < 0.9 * before


def test_on_policy(capsys):
    pytest.importorskip("transformers")
    losses = numbers(run("on_policy.py", capsys), "text")
    assert losses[-1] < 0.97 * losses[0]


def test_draft_model(capsys):
    pytest.importorskip("transformers")
    said = run("draft_model.py", capsys)
    accepted, losses = numbers(said, "accepted"), numbers(said, "loss")
    assert accepted[-1] > 2 * accepted[0] and losses[-1] < losses[0] / 2


def test_what_the_draft_model_is_told():
    """Its judgement and its loss, from hidden states, beside textbook formulas on whole logits in fp64."""
    pytest.importorskip("transformers")
    example = runpy.run_path(str(ROOT / "examples" / "draft_model.py"))
    hidden, weight = torch.randn(3, 7, 16), torch.randn(50, 16) / 2
    t2d = torch.rand(50) < 0.6
    teacher, mask, mass = example["judged"](kd.LinearHead(hidden, weight), t2d, weight[t2d])
    p = (hidden.double() @ weight.double().t()).softmax(-1)
    assert torch.equal(mask, t2d[p.argmax(-1)]) and mask.any() and not mask.all()
    torch.testing.assert_close(mass.double(), p[..., t2d].sum(-1), rtol=1e-5, atol=1e-6)
    states, head = (
        torch.randn(3, 7, 8, requires_grad=True),
        torch.randn(int(t2d.sum()), 8, requires_grad=True),
    )
    loss, accepted = example["loss_of"](kd.LinearHead(states, head), teacher, mask)
    wide = [t.detach().double().requires_grad_() for t in (states, head)]
    p, log_q = p[..., t2d] / p[..., t2d].sum(-1, keepdim=True), (wide[0] @ wide[1].t()).log_softmax(-1)
    kl, overlap = (p * (p.log() - log_q)).sum(-1), torch.minimum(p, log_q.exp()).sum(-1)
    weights = (-3 * overlap.detach()).exp()
    exact = (weights * kl - (1 - weights) * overlap.log())[mask].mean()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0.0)
    assert accepted == pytest.approx(overlap[mask].mean().item(), rel=1e-5)
    for mine, true in zip(torch.autograd.grad(loss, (states, head)), torch.autograd.grad(exact, wide)):
        assert (mine.double() - true).norm() < 1e-5 * true.norm() and true.norm() > 1e-3


@pytest.mark.slow
def test_tensor_parallel():
    done = process(script=ROOT / "examples" / "tensor_parallel.py", torchrun=True)
    assert done.returncode == 0, done.stderr
    losses = numbers(done.stdout, "loss") + numbers(done.stdout, "process")
    assert len(losses) == 4 and len(set(losses)) == 1
    assert len(re.findall(r"dH [0-9]e-(?:0[6-9]|1\d)", done.stdout)) == 2, done.stdout
    assert len(re.findall(r"dW (?:0e\+00|[0-9]e-(?:0[6-9]|1\d))", done.stdout)) == 2, done.stdout


@pytest.mark.slow
def test_teacher_elsewhere():
    done = process(script=ROOT / "examples" / "teacher_elsewhere.py", torchrun=True)
    assert done.returncode == 0, done.stderr
    losses = numbers(done.stdout, "KL")
    assert losses[-1] < 0.6 * losses[0]
