"""Each of cuda_host.MUTATIONS turns a check red; run by tests/test_cuda.py on a library that has them all."""

import cuda_host
import pytest
import torch
from problems import Problem, assert_exact

import kdkernels as kd


def check():
    """Rows over clusters with tails, in registers and not, several turns of the buffers, labels, masks, entropies, and a
    second pass."""
    both = dict(divergence=kd.ForwardKL(), hard_weight=0.5)
    for options in (
        both,
        dict(divergence=kd.JSD(0.5)),
        dict(divergence=kd.ReverseKL()),
        dict(both, label_smoothing=0.1),
        dict(both, entropy_weight=-0.7),
    ):
        for vocab in (37, 5001, 20001):
            problem = Problem(vocab=vocab, shape=(8,))
            assert_exact(
                problem.run("native", **options),
                problem.oracle(**options),
                problem.plain(**options),
                dtype=torch.float32,
            )


@pytest.mark.parametrize("number", range(len(cuda_host.MUTATIONS)), ids=list(cuda_host.MUTATIONS))
def test_mutation_is_seen(number):
    torch.ops.kdkernels_cuda_host.set_mutation(-1)
    check()
    torch.ops.kdkernels_cuda_host.set_mutation(number)
    with pytest.raises((AssertionError, RuntimeError)):
        check()
