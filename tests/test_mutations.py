"""The suite can fail: each mutation of the code turns a conformance check red."""

import pytest
import torch
from problems import Problem, assert_exact

import kdkernels as kd
from kdkernels.backends import eager
from kdkernels.backends.spec import LogitMap
from kdkernels.core import autograd, rows, tokens

OPTIONS = dict(divergence=kd.JSD(0.3), temperature=1.5, hard_weight=0.5)


def check(mutate=lambda: None, **options):
    """The oracle and the plain formula answer first, so that a mutation reaches only our side."""
    problem = Problem(student="head", vocab=300)
    oracle, plain = problem.oracle(**OPTIONS), problem.plain(**OPTIONS)
    mutate()
    ours = problem.run("eager", **OPTIONS, **options)
    assert_exact(ours, oracle, plain, dtype=torch.float32)


def zeroed(method):
    return lambda *args: [g * 0 for g in method(*args)]


FOLD = eager._fold_side


def no_rescale(side, *args, **options):
    folded = FOLD(side, *args, **options)
    side.sum_exp_t1.add_(1)
    return folded


MUTATIONS = {
    "zero gradient": (rows.HeadRows, "gradients", zeroed(rows.HeadRows.gradients)),
    "gradient scaled twice": (autograd, "scaled", lambda g, factor, reuse: g * 2),
    "no label": (eager, "_fold_label", lambda *args: None),
    "no rescale": (eager, "_fold_side", no_rescale),
    "no mask": (tokens, "checked_labels", lambda labels, *args: labels.flatten().clamp(min=0)),
    "no slope": (
        eager,
        "_soft_gradient",
        lambda tile, spec, row: eager._distributions(tile, spec, row).p,
    ),
    "gradient too large": (LogitMap, "backward", lambda logit_map, grad, logits: grad * 1.5),
}


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 20_000])
def test_mutation_is_seen(monkeypatch, name, chunk_bytes):
    check(chunk_bytes=chunk_bytes)
    with pytest.raises(AssertionError):
        check(lambda: monkeypatch.setattr(*MUTATIONS[name]), chunk_bytes=chunk_bytes)
