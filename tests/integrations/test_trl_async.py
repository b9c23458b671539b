"""The loss of TRL's asynchronous distillation beside its own."""

import warnings

import pytest
import torch
from compare import assert_same, outcome

from kdkernels.integrations import trl as dropin

pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "experimental"
    from trl.experimental.async_distillation import async_distillation_trainer as trainer

N, H, V, K = 11, 12, 47, 5


def batch():
    """(leaves, what a server told, which candidates are real): some tokens have fewer, all have one."""
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    told = (torch.randn(N, V) * 2).log_softmax(-1).topk(K, -1)
    real = torch.arange(K) < torch.randint(1, K + 1, (N, 1))
    return [hidden, weight, torch.randn(V)], told.indices, told.values, real


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("softcap, scale, temperature", [(None, 1.0, 1.0), (6.0, 0.8, 1.3)])
def test_every_sum(beta, add_tail, softcap, scale, temperature):
    leaves, ids, told, real = batch()
    teachers = torch.randint(0, 2, (N,))
    results = []
    for loss in (dropin.async_chunked_jsd_loss, trainer._chunked_jsd_loss):

        def call(h, w, b, loss=loss):
            return loss(h, w, b, scale, softcap, ids, told, real, beta, temperature, add_tail, teachers, 3, 4)

        results.append(outcome(call, leaves))
    assert_same(*results, 5e-5)
    assert results[0][0][4].view(3, 3)[:, 0].tolist() == teachers.bincount(minlength=3).tolist()


def test_one_teacher_and_no_bias():
    (hidden, weight, _), ids, told, real = batch()
    results = [
        outcome(
            lambda h, w, f=f: f(h, w, None, 1.0, None, ids, told, real, 0.0, 1.0, True, None, 1, 256),
            [hidden, weight],
        )
        for f in (dropin.async_chunked_jsd_loss, trainer._chunked_jsd_loss)
    ]
    assert_same(*results, 5e-5)


def test_patch_reaches_it():
    theirs = trainer._chunked_jsd_loss
    with dropin.patch():
        assert trainer._chunked_jsd_loss is dropin.async_chunked_jsd_loss
    assert trainer._chunked_jsd_loss is theirs
