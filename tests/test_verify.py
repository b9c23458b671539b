"""``verify`` and ``assert_matches_reference`` pass what is right and refuse what is not."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.backends import eager
from kdkernels.commands import verify
from kdkernels.commands.verify.scenario import DIVERGENCES, DTYPES, FORMS, Scenario
from kdkernels.testing import ROWS, assert_matches_reference

FEW = [
    Scenario("random", kd.JSD(0.3), torch.float32, options=dict(hard_weight=0.5)),
    Scenario("random", kd.ForwardKL(), torch.bfloat16, ("head", "head")),
    Scenario("equal", kd.ReverseKL(), torch.float32, rows="equal"),
    Scenario("V=1", kd.TotalVariation(), torch.float32, shape=(4,), vocab=1),
    Scenario(
        "chunked",
        kd.ForwardKL(),
        torch.float32,
        ("head", "head"),
        vocab=700,
        options=dict(chunk_bytes=16_000),
    ),
    Scenario("entropy", kd.SkewKL(0.1), torch.float32, options=dict(entropy_weight=-0.5)),
    Scenario("several", kd.JSD(0.1), torch.float32, function="several divergences"),
    Scenario("ids: random", None, torch.float32, function="token_log_probs"),
]


def run(monkeypatch, tmp_path, *arguments):
    """(exit code, report) of verify over a few scenarios on the eager backend."""
    monkeypatch.setattr(verify, "scenarios", lambda: iter(FEW))
    path = tmp_path / "verify.json"
    try:
        verify.main(["--backend", "eager", "--json", str(path), *arguments])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, json.loads(path.read_text())


def test_verify_passes_and_reports(monkeypatch, tmp_path, capsys):
    code, report = run(monkeypatch, tmp_path)
    assert code == 0 and report["verified"] == len(FEW) and not report["broken"]
    said = capsys.readouterr().out
    assert "in nats" in said and said.count(" ok\n") >= 2 * len(FEW), "a row for each problem, then the table"
    errors = [c["error"] for o in report["outcomes"] for c in o["checks"] if c["what"] != "loss"]
    assert any(e > 0 for e in errors), "errors of exactly 0: the backend was compared with itself"


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verify, "scenarios", None)
    for path in (tmp_path / "nowhere" / "report.json", tmp_path):
        with pytest.raises(SystemExit):
            verify.main(["--backend", "eager", "--json", str(path)])
        assert f"--json {path}: give a file in a folder that is there" in capsys.readouterr().err


RIGHT = eager.gradient


def zeroed(tile, weights, spec, state, gradients, sparse=None):
    RIGHT(tile, weights, spec, state, gradients, sparse)
    gradients.student.zero_()


def unmasked(tile, weights, *rest):
    labels = tile.labels.clamp(min=0)
    RIGHT(tile._replace(labels=labels), weights.amax(0).expand_as(weights), *rest)


def scaled(tile, weights, *rest):
    RIGHT(tile, weights * 1.5, *rest)


def nearly_zero(tile, weights, spec, state, gradients, sparse=None):
    RIGHT(tile, weights, spec, state, gradients, sparse)
    gradients.student.add_(1e-9)


@pytest.mark.parametrize("wrong", [zeroed, unmasked, scaled, nearly_zero])
def test_verify_goes_red(monkeypatch, tmp_path, wrong, capsys):
    monkeypatch.setattr(eager, "gradient", wrong)
    code, report = run(monkeypatch, tmp_path)
    assert code == 1 and report["broken"] and "BROKEN eager" in capsys.readouterr().out


def test_a_dropped_entropy_is_seen(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(eager, "_entropy_gradient", lambda z, *given: torch.zeros_like(z))
    assert run(monkeypatch, tmp_path)[1]["broken"] == 2
    said = capsys.readouterr().out
    assert "BROKEN eager, SkewKL" in said and "BROKEN eager, token_log_probs" in said


def test_verify_sees_other_bits(monkeypatch, tmp_path):
    right = eager.fused

    def noisy(*given, **named):
        results = right(*given, **named)
        return results + torch.rand(()) * 1e-9

    monkeypatch.setattr(eager, "fused", noisy)
    code, report = run(monkeypatch, tmp_path)
    assert code == 1
    assert any("other bits" in rule for o in report["outcomes"] for rule in o["broken"])


def test_time_that_is_up_is_said(monkeypatch, tmp_path, capsys):
    code, report = run(monkeypatch, tmp_path, "--minutes", "0")
    assert code == 2 and report["not_run"] == len(FEW)
    assert f"NOT RUN: {len(FEW)}" in capsys.readouterr().out


def test_rows_come_as_they_are_known(monkeypatch):
    """Before the next problem is begun, and what is in most use before the rest."""
    order = []
    right = verify.examine
    monkeypatch.setattr(verify, "scenarios", lambda: iter(FEW[:3]))
    monkeypatch.setattr(verify, "examine", lambda *given: order.append("began") or right(*given))
    verify.verify(["eager"], "cpu", tell=lambda row: order.append(row[0].scenario.rows))
    assert order == ["began", "random", "began", "random", "began", "equal"]
    monkeypatch.undo()
    first = next(verify.scenarios())
    assert first.dtype == torch.float32 and first.form == ("logits", "logits")


def test_full_knows_no_end(monkeypatch, tmp_path):
    code, report = run(monkeypatch, tmp_path, "--minutes", "0", "--full")
    assert code == 0 and not report["not_run"] and report["verified"] == len(FEW)


def test_verify_refuses_what_is_not_there(monkeypatch, capsys):
    for arguments in (["--backend", "none"], ["--device", "no-such-device"]):
        with pytest.raises(SystemExit) as end:
            verify.main(arguments)
        assert end.value.code == 2
    monkeypatch.setattr(verify, "scenarios", lambda: iter(()))
    with pytest.raises(SystemExit) as end:
        verify.main([])
    assert end.value.code == 2 and "nothing was verified" in capsys.readouterr().err


@pytest.mark.parametrize("name", verify.usable(None))
def test_many_rows_are_compared_by_their_last(name, monkeypatch):
    """The problem of --large, at a size for tests: right, and red when the last rows are not."""
    outcome = verify.beyond_32_bits(name, "cpu", tokens=64, vocab=1024)
    assert len(outcome.checks) == 2 and not outcome.broken
    if name == "eager":

        def lost(tile, weights, spec, state, gradients, sparse=None):
            RIGHT(tile, weights, spec, state, gradients, sparse)
            gradients.student[-1] = 0

        monkeypatch.setattr(eager, "gradient", lost)
        assert verify.beyond_32_bits(name, "cpu", tokens=64, vocab=1024).broken


def test_scenarios_cover_the_matrix():
    made = list(verify.scenarios())
    assert {s.rows for s in made} == set(ROWS)
    assert {s.vocab for s in made} >= {1, 262144}
    assert {(s.divergence, s.dtype, s.form) for s in made if s.divergence is not None} == {
        (d, t, f) for d in DIVERGENCES for t in DTYPES for f in FORMS
    }
    for function in ("several divergences", "token_log_probs"):
        found = {(s.dtype, s.form) for s in made if s.function == function}
        assert found == {(t, f) for t in DTYPES for f in FORMS[:2]}
    kinds = {type(d) for d in DIVERGENCES}
    assert kinds == {k for k in kd.Divergence.__subclasses__() if k.code > 0}


def own(student, teacher, labels, *, mask=True, temperature=1.0):
    """A loss as a user would write it."""
    s, t = (
        z if isinstance(z, torch.Tensor) else F.linear(z.hidden, z.weight, z.bias) for z in (student, teacher)
    )
    log_q, log_p = (z.float().div(temperature).log_softmax(-1) for z in (s, t))
    rows = (log_p.exp() * (log_p - log_q).nan_to_num(nan=0.0)).sum(-1)
    return rows[labels != -100].mean() if mask else rows.mean()


class NoUpstream(torch.autograd.Function):
    """Gives its gradient without multiplying by what arrives."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.ones_like(grad)


def overwrites(student, teacher, labels):
    loss = own(student, teacher, labels)
    teacher.zero_()
    return loss


def zero_gradient(student, teacher, labels):
    loss = own(student, teacher, labels)
    return loss.detach() + 0.0 * loss


@pytest.mark.parametrize("form", ["logits", "head"])
def test_users_loss_passes(form):
    assert_matches_reference(own, student=form, teacher=form)
    assert_matches_reference(kd.kl_div, student=form, teacher=form, rows=list(ROWS))


def test_users_options():
    mine = lambda s, t, y: 4 * own(s, t, y, temperature=2.0)  # noqa: E731
    assert_matches_reference(mine, temperature=2.0, temperature_squared=True)
    per_token = lambda s, t, y: kd.kl_div(s, t, y, reduction="none")  # noqa: E731
    assert_matches_reference(per_token, reduction="none")


BROKEN = {
    "zero gradient": zero_gradient,
    "no mask": lambda s, t, y: own(s, t, y, mask=False),
    "wrong scale": lambda s, t, y: 4 * own(s, t, y, temperature=2.0),
    "wrong direction": lambda s, t, y: own(t, s, y),
    "no upstream gradient": lambda s, t, y: NoUpstream.apply(own(s, t, y)),
    "overwrites": overwrites,
    "per token": lambda s, t, y: kd.kl_div(s, t, y, reduction="none"),
    "bf16 throughout": lambda s, t, y: own(s.bfloat16(), t.bfloat16(), y),
}


@pytest.mark.parametrize("name", BROKEN)
def test_users_mistakes_are_seen(name):
    with pytest.raises((AssertionError, RuntimeError)):
        assert_matches_reference(BROKEN[name], dtypes=[torch.float32], rows=["random"])


def test_mistakes_are_seen_without_assertions():
    code = """
import kdkernels as kd, torch
from kdkernels.testing import assert_matches_reference
assert_matches_reference(lambda s, t, y: 1.1 * kd.kl_div(s, t, y), dtypes=[torch.float32], rows=["random"])
"""
    ran = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert "AssertionError: random rows" in ran.stderr


def test_heads_without_a_bias():
    """For a loss that takes no bias; the rows that only a bias can make are left out, and refused by name."""

    def mine(student, teacher, labels):
        assert student.bias is None and teacher.bias is None
        return own(student, teacher, labels)

    assert_matches_reference(mine, student="head", teacher="head", bias=False)
    with pytest.raises(AssertionError, match="one-hot rows.*its norm: 0, the oracle's"):
        assert_matches_reference(zero_gradient, student="head", teacher="head", bias=False, rows=["one-hot"])
    with pytest.raises(ValueError, match="'padding' are made by a head's bias"):
        assert_matches_reference(mine, student="head", bias=False, rows=["padding"])


def test_both_values_are_shown():
    """F.kl_div's formula over padding: inf - inf. What it gave, and what it should have."""

    def naive(student, teacher, labels):
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)[labels != -100].mean()

    with pytest.raises(
        AssertionError, match=r"padding rows, .* loss: nan, the oracle's [1-9]\d*\.\d+; error nan"
    ):
        assert_matches_reference(naive, dtypes=[torch.float32], rows=["padding"])


def test_a_loss_that_is_infinite_where_the_oracle_is():
    """Label smoothing over padding."""
    options = dict(hard_weight=0.5, label_smoothing=0.1)
    assert_matches_reference(lambda s, t, y: kd.distillation_loss(s, t, y, **options), **options)
    with pytest.raises(AssertionError, match="inf"):
        assert_matches_reference(
            lambda s, t, y: kd.distillation_loss(s, t, y, **options).clamp(max=1e6),
            rows=["padding"],
            **options,
        )


def test_options_that_are_not_what_a_loss_means():
    with pytest.raises(
        TypeError, match="mask is no option here; what a loss means is said by divergence, temp"
    ):
        assert_matches_reference(lambda s, t, y: s.sum(), mask=torch.ones(3, 5, dtype=torch.bool))
