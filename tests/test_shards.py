"""Losses whose vocabulary is shared out over 2, 3 and 4 gloo processes, against the fp64 oracle of the whole."""

import dataclasses
import re
from pathlib import Path

import pytest
import shard_cases
import shard_mistakes
import shard_own_tokens
import shard_plan
import shard_processes
import torch
import torch.multiprocessing as mp
from problems import assert_exact, assert_refused, relative
from shard_plan import (
    CASES,
    DIFFERENT,
    DIVERGENCES,
    LOOSE,
    OWN,
    POLICIES,
    REFUSED,
    SEVERAL,
    SPARSE,
    STATS,
    TOGETHER,
)

import kdkernels as kd
from kdkernels.backends import row_state
from kdkernels.backends.spec import Asked, Spec


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return shard_processes.run(tmp_path_factory.mktemp("shards"), shard_plan.everything())


def of(outcomes, key):
    """What each rank made."""
    failed = [outcome for outcome in outcomes[key] if isinstance(outcome, str)]
    assert not failed, "\n".join(failed)
    return outcomes[key]


def whole(parts, which=0):
    """The gradients of the whole vocabulary; that for hidden states is the same on all ranks."""
    gradients = [outcome.gradients[which] for outcome in parts]
    if len(gradients[0]) == 1:
        return [torch.cat([g[0] for g in gradients], -1)]
    assert all(torch.equal(g[0], gradients[0][0]) for g in gradients), "dH differs between ranks"
    return [gradients[0][0], *(torch.cat(pieces) for pieces in list(zip(*gradients))[1:])]


def same_on_all_ranks(parts):
    """The losses, which have the same bits everywhere."""
    for outcome in parts[1:]:
        assert all(map(torch.equal, outcome.losses, parts[0].losses)), "the loss differs between ranks"
    return parts[0].losses


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shards_are_exact(case, outcomes):
    parts, problem = of(outcomes, ("exact", case.name)), case.made()
    options = case.meaning
    if case.loss == "cross_entropy":
        options.update(soft_weight=0.0, hard_weight=1.0)
    oracle, plain = problem.oracle(**options), problem.plain(**options)
    (loss,) = same_on_all_ranks(parts)
    assert_exact((loss, whole(parts)), oracle, plain, dtype=problem.dtype, projected=problem.projected)


@pytest.mark.parametrize("case", POLICIES + SEVERAL, ids=lambda case: f"{case.loss} {case.name}")
def test_token_losses_of_shards(case, outcomes):
    kind, loss = (
        ("several", shard_cases.several) if case in SEVERAL else ("policies", shard_cases.policy_loss)
    )
    parts, problem = of(outcomes, (kind, case.name)), case.made()
    truth, gradients = problem.oracle(loss=loss, **case.meaning)
    (loss,) = same_on_all_ranks(parts)
    ulp = torch.finfo(problem.dtype).eps
    assert relative(loss, truth) < 10 * ulp
    for mine, true in zip(whole(parts), gradients, strict=True):
        assert true.norm() > 1e-3 and relative(mine, true) < 10 * ulp


@pytest.mark.parametrize("case", TOGETHER, ids=lambda case: case.name)
def test_both_models_learn_on_shards(case, outcomes):
    parts, problem = of(outcomes, ("codistilled", case.name)), case.made()
    students, teachers = same_on_all_ranks(parts)
    options = dict(hard_weight=1.0) | case.options
    theirs = dataclasses.replace(case).made()
    theirs.student = problem.teacher
    hard = dict(soft_weight=0.0, hard_weight=1.0, reduction=options.get("reduction", "mean"))
    for loss, which, one, asked in [(students, 0, problem, options), (teachers, 1, theirs, hard)]:
        oracle, plain = one.oracle(**asked), one.plain(**asked)
        assert_exact((loss, whole(parts, which)), oracle, plain, dtype=one.dtype, projected=one.projected)


@pytest.mark.parametrize("case", SPARSE, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:a temperature other")
def test_sparse_targets_on_shards(case, outcomes):
    parts = of(outcomes, ("sparse", case.name))
    truth, gradients = case.made().oracle(**case.meaning)
    (loss,) = same_on_all_ranks(parts)
    assert torch.allclose(loss.double(), truth, rtol=1e-5, atol=2e-6)
    for mine, oracle in zip(whole(parts), gradients, strict=True):
        assert mine.shape == oracle.shape and oracle.norm() > 1e-6
        assert relative(mine, oracle) < 4e-6


@pytest.mark.parametrize("case", STATS, ids=lambda case: case.name)
def test_statistics_on_shards(case, outcomes):
    parts, problem = of(outcomes, ("stats", case.name)), case.made()
    student = problem.side([t.double() for t in problem.student])
    teacher = problem.side(problem.teacher if case.tail else [t.double() for t in problem.teacher])
    with kd.use_backend("reference"):
        _, truth = kd.distillation_loss(student, teacher, problem.labels, **case.options)
    for outcome in parts:
        for name, ours, oracle in zip(truth._fields, outcome.stats, truth):
            assert ours.double().item() == pytest.approx(
                oracle.item(), rel=2e-2 if problem.projected else 1e-5
            ), name
        assert all(map(torch.equal, outcome.stats, parts[0].stats))


ROWS, LIVE, SLOTS = 15, 13, 10


@pytest.mark.parametrize(
    ("kind", "name", "gathers", "sums"),
    [
        # fp64 columns of the rows' states, and one row that carries errors
        ("exact", "ForwardKL() of logits", [5 * 8 * (ROWS + 1)], []),
        ("exact", "ReverseKL() of logits", [5 * 8 * (ROWS + 1)], []),
        ("exact", "JSD(beta=0.3) of logits", [4 * 8 * (ROWS + 1), 2 * 8 * (ROWS + 1)], []),
        ("exact", "SkewKL(alpha=0.1) of logits", [5 * 8 * (ROWS + 1), 2 * 8 * (ROWS + 1)], []),
        ("exact", "hard term of logits", [4 * 8 * (ROWS + 1)], []),
        # dH of the tokens that count, in fp32
        ("exact", "ForwardKL() of heads", [7 * 8 * (LIVE + 1)], [LIVE * 16 * 4]),
        # the normaliser of the rest and the label's logit; the stored ids' logits
        ("sparse", "bucket, logits", [3 * 8 * (ROWS + 1)], [SLOTS * 4 * (ROWS + 1)]),
        # token losses: the backward exchanges nothing but dH
        ("exact", "token losses of heads", [6 * 8 * (LIVE + 1), 2 * 8 * (LIVE + 1)], [LIVE * 16 * 4]),
        ("sparse", "soft logits", [], [SLOTS * 4 * (ROWS + 1)]),
    ],
)
def test_collectives_are_counted(kind, name, gathers, sums, outcomes):
    for made in of(outcomes, (kind, name)):
        calls = [call for call in made.calls if call[0] != "all_gather_object"]
        assert len(made.calls) == len(calls) + 1  # once, how the vocabulary is shared out
        assert calls == [("all_gather", size) for size in gathers] + [("all_reduce", size) for size in sums]


def test_collectives_of_own_tokens_are_counted(outcomes):
    """The tokens' and ids' numbers, what is said of them, hidden states and ids; a backward gathers what arrives as well."""
    tokens = ["all_gather"] * 4
    for made in of(outcomes, ("own tokens", "policies")):
        calls = [name for name, _ in made.calls if name != "all_gather_object"]
        assert calls == [*tokens, "all_gather", "all_reduce", *tokens, "all_gather", "reduce_scatter"]


SENT = {
    "`ForwardKL`, `ReverseKL`": [
        Spec(kind=kd.ForwardKL.code, asked=Asked.SOFT),
        Spec(kind=kd.ReverseKL.code, asked=Asked.SOFT),
    ],
    "`SkewKL`": [Spec(kind=kd.SkewKL.code, asked=Asked.SOFT)],
    "other divergences": [
        Spec(kind=d.kind, asked=Asked.SOFT) for d in DIVERGENCES[2:] if not isinstance(d, kd.SkewKL)
    ],
    "cross entropy": [Spec(asked=Asked.LABEL)],
    "`ForwardKL` and cross entropy at a temperature": [
        Spec(kind=kd.ForwardKL.code, asked=Asked.SOFT | Asked.LABEL, tempered=1)
    ],
}


def test_the_page_says_what_is_sent():
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    table = dict(re.findall(r"^\| (.*?) \| (\d \| [\d +]+) \|$", page, re.M))
    assert list(table) == list(SENT)
    for loss, specs in SENT.items():
        for spec in specs:
            first = 8 * len(row_state.first_pass(spec, torch.ones(1)).columns)
            second = " + 16" if spec.kind and spec.closed_form is None else ""
            assert table[loss] == f"{2 if second else 1} | {first}{second}"


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_says_what_is_wrong(name, outcomes):
    for said in of(outcomes, ("refused", name)):
        kind, message, pattern = said
        assert kind in ("ValueError", "RuntimeError", "TypeError")
        assert re.search(pattern, message), message
        assert "\n" not in message


@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_are_checked(name, outcomes):
    for kind, message, pattern in of(outcomes, ("different", name)):
        assert kind in ("ValueError", "TypeError", "AnotherRanksError")
        assert re.search(pattern, message), message
        assert "\n" not in message


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_ranks_with_tokens_of_their_own(case, outcomes):
    """As if the lm_head were whole on every rank, and its gradient averaged or summed over the ranks."""
    parts, problem = of(outcomes, ("own tokens", case.name)), case.made()
    options = case.meaning
    bounds, shards = shard_own_tokens.token_bounds(case.ranks), []
    for rank, outcome in enumerate(parts):
        here = slice(bounds[rank], bounds[rank + 1])
        leaves = [t.double().requires_grad_() for t in problem.student]
        student = problem.side([leaves[0][here], *leaves[1:]])
        if case.tail:
            teacher = shard_own_tokens.own_target(case, problem.target, here)
        else:
            teacher = problem.side(
                [problem.teacher[0][here].double(), *(t.double() for t in problem.teacher[1:])]
            )
        own = shard_own_tokens.of_tokens(dataclasses.replace(case, options=options), here)
        with kd.use_backend("reference"):
            (loss,), stats = shard_cases.call(own, student, teacher, problem.labels[here])
        assert torch.allclose(outcome.losses[0].double(), loss, rtol=1e-5, atol=2e-6)
        for mine, true in zip(outcome.stats or [], stats or [], strict=True):
            assert torch.allclose(mine.double(), true.double(), rtol=1e-5)
        hidden, *shard = torch.autograd.grad((loss * shard_own_tokens.arriving(loss)).sum(), leaves)
        mine = outcome.gradients[0][0]
        assert mine.shape == hidden[here].shape
        assert not mine.numel() or relative(mine, hidden[here]) < 4e-6
        shards.append(shard)
    divisor = 1 if case.shard.get("data_parallel") == "sum" else case.ranks
    for at, truth in enumerate(zip(*shards), 1):
        mine = torch.cat([outcome.gradients[0][at] for outcome in parts])
        assert relative(mine, sum(truth) / divisor) < 4e-6


def test_one_rank_alone_may_mask_its_own_tokens(outcomes):
    for some, all_of_them in of(outcomes, "masked on one rank"):
        assert all(torch.equal(one, other) for one, other in zip(some, all_of_them, strict=True))


def test_own_tokens_of_two_losses_and_of_a_frozen_head(outcomes):
    for first, truth, of_frozen, second in of(outcomes, "own tokens twice"):
        for mine, true in zip(first, truth, strict=True):
            assert true.norm() > 1e-3 or not true.numel()
            assert not true.numel() or relative(mine, true) < 4e-6
        assert all(map(torch.equal, first, second)) and torch.equal(of_frozen, first[0])


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2", "FSDP2 with tied embeddings"])
def test_body_and_head_agree_under_data_parallelism(wrapper, outcomes):
    for gradients, truth in of(outcomes, f"trained by {wrapper}"):
        for mine, oracle in zip(gradients, truth, strict=True):
            assert oracle.norm() > 1e-3 and relative(mine, oracle) < 1e-5


def test_dtensors_go_in_and_come_out(outcomes):
    for made in of(outcomes, "dtensors"):
        for loss, truth, gradients, true_gradients in made:
            assert torch.allclose(loss, truth, rtol=1e-6)
            for mine, true in zip(gradients, true_gradients, strict=True):
                assert true.norm() > 1e-3 and relative(mine, true) < 1e-6


def test_dtensors_of_own_tokens(outcomes):
    for loss, truth, gradients, true_gradients in of(outcomes, "dtensors of own tokens"):
        assert torch.allclose(loss, truth, rtol=1e-6)
        for mine, true in zip(gradients, true_gradients, strict=True):
            assert true.norm() > 1e-3 and relative(mine, true) < 1e-6


def test_only_tensor_parallel_ranks_have_the_same_hidden_states(outcomes):
    assert of(outcomes, "heads of meshes") == [[True, False]] * 3


def test_autocast_on_shards(outcomes):
    for loss, truth, gradients, true_gradients in of(outcomes, "autocast"):
        assert torch.allclose(loss.double(), truth.double(), rtol=1e-5)
        for mine, true in zip(gradients, true_gradients, strict=True):
            assert mine.dtype == torch.float32 and true.norm() > 1e-3 and relative(mine, true) < 0.01


def test_a_mesh_of_two_dimensions(outcomes):
    for loss, truth in of(outcomes, "two dimensions"):
        assert torch.allclose(loss, truth, rtol=1e-6)


def test_dtensors_that_are_no_shards(outcomes):
    for made in of(outcomes, "refused dtensors"):
        for kind, message, pattern in made:
            assert kind == "ValueError" and re.search(pattern, message) and "\n" not in message, message


def test_views_are_overwritten_in_place(outcomes):
    for made in of(outcomes, "inplace views"):
        for changed, plain, inplace in made:
            assert changed == [False] * 2 + [True] * 5 + [False] * 2
            assert torch.equal(plain, inplace) and plain.norm() > 1e-3


def test_a_compiled_loss_on_shards(outcomes):
    for plain, compiled, other_plain, other_compiled in of(outcomes, "compiled"):
        assert all(map(torch.equal, plain, compiled))
        assert all(map(torch.equal, other_plain, other_compiled))
    for (said,) in of(outcomes, "made while compiling"):
        assert "kd.Shard was made inside of compiled code" in said


def test_gradients_with_a_tolerance(outcomes):
    """Products leave out columns on every rank, and no gradient is further off than that."""
    parts, options = of(outcomes, ("loose", LOOSE.name)), dict(LOOSE.options)
    tolerance = options.pop("gradient_tolerance")
    truth, gradients = LOOSE.made().oracle(**options)
    (loss,) = same_on_all_ranks(parts)
    assert torch.allclose(loss.double(), truth, rtol=1e-5)
    errors = [relative(mine, true) for mine, true in zip(whole(parts), gradients, strict=True)]
    assert 1e-4 < max(errors) < 2 * tolerance, errors


def test_modelopts_losses_on_many_ranks(outcomes):
    for made in of(outcomes, "ModelOpt"):
        for loss, flags, gradient, truth, true_gradient in made:
            assert torch.allclose(loss, truth, rtol=1e-5, atol=1e-6) and flags == [False, False]
            assert true_gradient.norm() > 1e-3 and relative(gradient, true_gradient) < 1e-5


def test_megatrons_cross_entropy(outcomes):
    for made in of(outcomes, "Megatron"):
        for loss, gradient, truth, true_gradient in made:
            assert torch.allclose(loss, truth, rtol=1e-6)
            assert true_gradient.norm() > 1e-3 and relative(gradient, true_gradient) < 1e-6


def test_megatrons_output_layer(outcomes):
    for made in of(outcomes, "Megatron's output"):
        for loss, gradients, truth, true_gradients in made:
            assert torch.allclose(loss, truth, rtol=1e-5)
            for mine, true in zip(gradients, true_gradients, strict=True):
                assert true.norm() > 1e-3 and relative(mine, true) < 1e-6


def test_other_projects_losses_of_split_logits(outcomes):
    for made in of(outcomes, "split logits"):
        for name, loss, gradient, truth, true_gradient in made:
            assert torch.allclose(loss, truth, rtol=1e-5), name
            assert true_gradient.norm() > 1e-3 and relative(gradient, true_gradient) < 1e-5, name


@pytest.mark.slow
def test_a_rank_that_dies_is_an_error(tmp_path):
    ranks = [
        mp.get_context("spawn").Process(target=shard_processes.killed, args=(r, tmp_path)) for r in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    kind, *_ = torch.load(tmp_path / "said")
    assert kind in ("RuntimeError", "DistBackendError")


def test_no_group_outlives_its_end(tmp_path):
    """The threads of one that does can abort the process at its end."""
    mp.spawn(shard_processes.ended, (tmp_path,), 2)
    assert torch.load(tmp_path / "gone")


def test_a_head_moves_to_the_students_rows(outcomes):
    for moved, truth in of(outcomes, "reshard_head"):
        assert torch.equal(moved, truth)


def test_global_tokens(outcomes):
    assert of(outcomes, "global_tokens") == [0 + 1 + 2] * 3


def test_nan_reaches_every_rank(outcomes):
    for loss, others, row in of(outcomes, "nan"):
        assert loss.isnan().tolist() == [False, True, False]
        assert row.isnan().all() and others.isfinite().all()


def test_the_second_backward_is_the_first(outcomes):
    for first, second in of(outcomes, "twice"):
        assert torch.equal(first, second)


def test_dh_is_left_to_the_caller(outcomes):
    for mine, summed, calls in of(outcomes, "own dH"):
        assert torch.allclose(mine, summed, rtol=1e-5, atol=1e-7)
        assert "all_reduce" not in calls


@pytest.mark.parametrize("mistake", shard_mistakes.MISTAKES)
def test_a_mistake_is_seen(mistake, outcomes):
    """The comparison fails where the code is broken on purpose."""
    parts, case = of(outcomes, f"mistake: {mistake}"), shard_mistakes.BROKEN
    problem = case.made()
    oracle, plain = problem.oracle(**case.options), problem.plain(**case.options)
    with pytest.raises(AssertionError):
        (loss,) = same_on_all_ranks(parts)
        assert_exact((loss, whole(parts)), oracle, plain, dtype=problem.dtype, projected=problem.projected)


def test_a_mistake_in_sparse_targets_is_seen(outcomes):
    parts, case = of(outcomes, "mistake in sparse targets"), shard_mistakes.BROKEN_SPARSE
    truth, _ = case.made().oracle(**case.options)
    assert not torch.allclose(parts[0].losses[0].double(), truth, rtol=1e-2)


def test_the_broken_case_is_right_when_whole(outcomes):
    parts, problem = of(outcomes, "unbroken"), shard_mistakes.BROKEN.made()
    oracle, plain = (
        problem.oracle(**shard_mistakes.BROKEN.options),
        problem.plain(**shard_mistakes.BROKEN.options),
    )
    (loss,) = same_on_all_ranks(parts)
    assert_exact((loss, whole(parts)), oracle, plain, dtype=problem.dtype, projected=problem.projected)


def test_without_processes():
    assert_refused(
        lambda: kd.cross_entropy(kd.ShardedLogits(torch.randn(2, 3), kd.Shard()), torch.tensor([0, 1])),
        "init_process_group",
    )
    assert_refused(lambda: kd.Shard(start=-1), "start >= 0")
    assert_refused(lambda: kd.Shard(tokens="halved"), "replicated")
    assert_refused(lambda: kd.Shard(data_parallel="max"), "'mean' or 'sum'")
    assert_refused(lambda: kd.Shard(tokens="sharded", reduce_hidden=False), "cannot sum it")
    with pytest.raises(TypeError, match="reduce_dtype"):
        kd.Shard(reduce_dtype="fp32")
    with pytest.raises(TypeError, match=r"kd\.Shard"):
        kd.ShardedLogits(torch.randn(2, 3), None)
    assert_refused(
        lambda: kd.top_k_target(kd.ShardedLogits(torch.randn(2, 3), kd.Shard()), 2), "whole vocabulary"
    )
