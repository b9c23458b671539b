"""The suite can fail: each mutation of the code turns a conformance check red."""

import pytest
import torch
from problems import Problem, assert_exact

import kdkernels as kd
from kdkernels import heads, ops
from kdkernels.backends import eager
from kdkernels.backends import row_state as rs

OPTIONS = dict(divergence=kd.JSD(0.3), temperature=1.5, hard_weight=0.5)


def check(**options):
    problem = Problem(student="head", vocab=300)
    assert_exact(problem.run("eager", **OPTIONS, **options), problem.oracle(**OPTIONS),
                 problem.plain(**OPTIONS), dtype=torch.float32)  # fmt: skip


def zeroed(method):
    return lambda *args: [g * 0 for g in method(*args)]


MUTATIONS = {
    "zero gradient": (heads.HeadRows, "gradients", zeroed(heads.HeadRows.gradients)),
    "gradient scaled twice": (ops, "_scaled", lambda g, factor, reuse: g * 2),
    "no label": (eager, "_fold_label", lambda *args: None),
    "no rescale": (eager, "_fold_z1", lambda state, *args: state[:, rs.Z1_S].add_(1)),
    "no slope": (eager, "_soft_gradient", lambda s, t, spec, state: eager._distributions(s, t, spec, state)[0]),
    "no temperature": (eager, "_through_map", lambda grad, logits, logit_map: grad * 1.5),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 20_000])
def test_mutation_is_seen(monkeypatch, name, chunk_bytes):
    check(chunk_bytes=chunk_bytes)
    monkeypatch.setattr(*MUTATIONS[name])
    with pytest.raises(AssertionError):
        check(chunk_bytes=chunk_bytes)


def test_dropped_mask_is_seen(monkeypatch):
    monkeypatch.setattr(ops.torch, "where", lambda condition, a, b: a + 0 * condition)
    with pytest.raises(AssertionError):
        check()
