"""TRL's importance-weighted on-policy distillation beside its own."""

import collections
import types
import warnings

import pytest
import torch
from compare import assert_same, outcome

from kdkernels.integrations import trl as dropin

pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "experimental"
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

B, START, T, V = 3, 2, 5, 41


def trainer(teacher=None, told=None, **changed):
    """What the losses ask of an IWOPDTrainer; ``teacher``: logits of its teacher, or ``told`` by a server."""
    made = object.__new__(IWOPDTrainer)
    given = dict(
        temperature=1.3,
        iw_opd_gamma=0.5,
        iw_opd_epsilon=1e-8,
        distillation_objective="iw_opd",
        use_teacher_server=told is not None,
        model=types.SimpleNamespace(training=True),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _raise_if_local_teacher_tokenizer_mismatch=lambda: None,
        _compute_prompt_length=lambda inputs: START,
        _get_teacher_logits=lambda inputs: teacher,
        _get_teacher_token_logprobs_from_server=lambda inputs, start: {"actual_logprobs": told},
    )
    vars(made).update({**given, **changed})
    return made


def batch(rollout=True):
    inputs = {
        "input_ids": torch.randint(0, V, (B, START + T)),
        "attention_mask": torch.ones(B, START + T),
        "labels": torch.zeros(B, START + T, dtype=torch.int64),
    }
    inputs["labels"][0, -2:] = inputs["labels"][1, START:] = -100  # the second sequence has nothing
    if rollout:
        inputs["rollout_logprobs"] = -torch.rand(B, START + T, dtype=torch.float64)
    return inputs


def losses(student, inputs, make, **options):
    """(ours under patch(), TRL's) as outcomes, and the metrics of both."""
    found, metrics = [], []
    for patched in (True, False):

        def call(s):
            one = make()
            model = lambda input_ids, attention_mask: types.SimpleNamespace(logits=s)  # noqa: E731
            loss = one.compute_loss(model, inputs, **options)
            metrics.append({name: list(values) for name, values in one._metrics["train"].items()})
            return loss

        if patched:
            with dropin.patch():
                assert IWOPDTrainer.compute_loss is dropin.iw_opd_compute_loss
                found.append(outcome(call, [student]))
        else:
            found.append(outcome(call, [student]))
    return *found, *metrics


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 3e-5)])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=str)
@pytest.mark.parametrize("rollout", [True, False])
@pytest.mark.parametrize("where", ["local", "server"])
def test_the_loss_and_its_metrics(where, rollout, items, dtype, tolerance):
    student, teacher = (2 * torch.randn(B, START + T, V, dtype=dtype) for _ in range(2))
    inputs = batch(rollout)
    told = -torch.rand(B, T - (where == "server"), dtype=dtype) if where == "server" else None
    if told is not None:
        inputs["labels"][:, -1] = -100  # a server may leave out what nobody needs
    ours, theirs, mine, their = losses(
        student, inputs, lambda: trainer(teacher, told), num_items_in_batch=items
    )
    assert_same(ours, theirs, tolerance)
    assert mine.keys() == their.keys() and len(mine) == 5
    for name, values in mine.items():
        assert values == pytest.approx(their[name], rel=100 * tolerance, abs=tolerance)


def test_what_a_server_left_out_is_said():
    inputs, student = batch(), torch.randn(B, START + T, V)
    model = lambda input_ids, attention_mask: types.SimpleNamespace(logits=student)  # noqa: E731
    for told, said in (
        (torch.zeros(B, T - 1), "for the last 1 completion tokens"),
        (torch.full((B, T), -torch.inf), "of 8 more of 8 tokens"),
    ):
        with dropin.patch(), pytest.raises(ValueError, match=said):
            trainer(told=told).compute_loss(model, inputs)


def test_no_token_counts():
    student, inputs = torch.randn(B, START + T, V), batch()
    inputs["labels"][:] = -100
    ours, theirs, *metrics = losses(student, inputs, lambda: trainer(student.clone()))
    assert_same(ours, theirs, 0, zero_gradient=True)
    assert metrics == [{}, {}]


def test_half_precision_rows_are_fp32():
    """TRL's log-probabilities are in the logits' dtype, and so is its loss."""
    student, teacher = (2 * torch.randn(B, START + T, V) for _ in range(2))
    inputs = batch()
    inputs["rollout_logprobs"] = inputs["rollout_logprobs"].float()
    exact = losses(student.bfloat16().double(), inputs, lambda: trainer(teacher.bfloat16().double()))[1]
    ours, theirs, *_ = losses(student.bfloat16(), inputs, lambda: trainer(teacher.bfloat16()))
    error, their_error = (abs(found[0][0].double() - exact[0][0]) for found in (ours, theirs))
    assert ours[0][0].dtype == torch.float32 and error < 1e-5 < 1e-4 < their_error


def test_the_other_objective_is_theirs():
    student, teacher = (2 * torch.randn(B, START + T, V) for _ in range(2))
    make = lambda: trainer(teacher, distillation_objective="jsd", beta=0.5, loss_top_k=0, loss_add_tail=True)  # noqa: E731
    ours, theirs, *_ = losses(student, batch(), make)
    assert torch.equal(ours[0][0], theirs[0][0]) and torch.equal(ours[1][0], theirs[1][0])
