"""Laws that hold for any logits, found by hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BACKENDS

import kdkernels as kd
from kdkernels.commands.verify.scenario import DIVERGENCES
from kdkernels.core.schedule import plan

problems = st.tuples(st.integers(1, 6), st.integers(2, 300), st.integers(0, 10**6), st.floats(0.1, 8.0))
quick = settings(max_examples=15, deadline=None)


def logits(case):
    tokens, vocab, seed, scale = case
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, vocab, generator=generator) * scale for _ in range(2))


def loss(backend, divergence, s, t, **options):
    with kd.use_backend(backend):
        return kd.distillation_loss(s, t, divergence=divergence, reduction="none", **options)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(case=problems, shift=st.floats(-20, 20))
def test_divergences_are(backend, divergence, case, shift):
    """Non-negative, zero between equals (what they have in common is 1), blind to shifts and to the order of the
    vocabulary."""
    s, t = logits(case)
    value = loss(backend, divergence, s, t)
    close = dict(rtol=2e-4, atol=2e-5)
    assert (value >= -1e-5).all()
    equal = float(divergence == kd.Overlap())
    assert torch.allclose(loss(backend, divergence, s, s), torch.full_like(value, equal), atol=1e-6)
    assert torch.allclose(loss(backend, divergence, s + shift, t - shift), value, **close)
    order = torch.randperm(s.shape[1])
    assert torch.allclose(loss(backend, divergence, s[:, order], t[:, order]), value, **close)


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(case=problems, apart=st.floats(0, 60))
def test_what_is_in_common_is_what_total_variation_leaves(backend, case, apart):
    s, t = logits(case)
    s[:, 0] += apart
    tv, overlap = (loss(backend, divergence, s, t) for divergence in (kd.TotalVariation(), kd.Overlap()))
    assert torch.allclose(overlap, 1 - tv, atol=1e-6) and (overlap >= 0).all() and (overlap <= 1 + 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(case=problems, beta=st.floats(0.05, 0.95))
def test_jsd_is_symmetric(backend, case, beta):
    s, t = logits(case)
    one, other = loss(backend, kd.JSD(beta), s, t), loss(backend, kd.JSD(1 - beta), t, s)
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(case=problems, chunk_bytes=st.integers(300, 10**6), half=st.integers(0, 6))
def test_chunks_and_micro_batches_do_not_matter(backend, case, chunk_bytes, half):
    s, t = logits(case)
    w = torch.eye(s.shape[1])
    whole = loss(backend, kd.ForwardKL(), s, t)
    assert torch.allclose(
        loss(backend, kd.ForwardKL(), kd.LinearHead(s, w), t, chunk_bytes=chunk_bytes),
        whole,
        rtol=1e-4,
        atol=1e-5,
    )
    parts = [loss(backend, kd.ForwardKL(), a, b) for a, b in ((s[:half], t[:half]), (s[half:], t[half:]))]
    assert torch.equal(torch.cat(parts), whole) or backend == "eager"


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(0, 5000),
    vocab=st.integers(1, 300_000),
    each=st.integers(0, 64),
    budget=st.integers(1, 2**31),
)
def test_plans_fit_and_cover(tokens, vocab, each, budget):
    tiles = plan(tokens=tokens, vocab=vocab, bytes_per_logit=each, chunk_bytes=budget)
    assert each == 0 or tokens == 0 or tiles.rows * tiles.columns * each <= max(budget, each)
    for chunks, total in ((tiles.row_chunks(), tokens), (tiles.column_chunks(), vocab)):
        end = 0
        for chunk in chunks:
            assert chunk.start == end < chunk.stop
            end = chunk.stop
        assert end == total
