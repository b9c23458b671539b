"""``pytest benchmarks``: the harness's cases under pytest-benchmark, with its options and its table."""

import pytest
import torch

from benchmarks.cases import SUITES
from benchmarks.inputs import Step
from benchmarks.measure import input_sets
from benchmarks.variants import variants_of


def device_of(config):
    return "cuda" if config.getoption("--suite") == "gpu" else "cpu"


def pytest_generate_tests(metafunc):
    device = device_of(metafunc.config)
    cases = [case for case in SUITES[metafunc.config.getoption("--suite")] if case.can_run(device)]
    pairs = [(case, variant) for case in cases for variant in variants_of(case, device)[0]]
    names = [f"{case.name}-{variant.loss}-{variant.label}" for case, variant in pairs]
    metafunc.parametrize("case, variant", pairs, ids=names)


@pytest.fixture(scope="module")
def sets_of(request):
    """The input sets of the case at hand; the last case's are dropped."""
    kept = {}

    def sets(case):
        if case not in kept:
            kept.clear()
            kept[case] = input_sets(case, device_of(request.config))
        return kept[case]

    return sets


def test_forward_and_backward(benchmark, case, variant, sets_of, request):
    sets, turn = sets_of(case), 0
    cuda = device_of(request.config) == "cuda"
    benchmark.group = case.name

    def fresh():
        nonlocal turn
        turn += 1
        inputs = sets[turn % len(sets)]
        inputs.restore()
        return (Step(inputs, inplace=variant.inplace),), {}

    def step(given):
        kept = variant.forward(given)
        if not variant.is_floor:
            kept.backward()
        if cuda:
            torch.cuda.synchronize()

    benchmark.pedantic(step, setup=fresh, rounds=5, warmup_rounds=1)
