"""A short run of the random calls; ``python -m tests.fuzz`` makes a long one."""

import pytest
from problems import BACKENDS

from . import BACKENDS as DTYPES
from . import judge

CALLS = 40


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_calls(backend, part):
    for seed in range(part * CALLS, (part + 1) * CALLS):
        judge.check(seed, backend, DTYPES[backend])
