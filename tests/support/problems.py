"""Losses to compare, and how: the rule lives in the package, where users find it too."""

import pytest

import kdkernels as kd
from kdkernels.testing import Problem, assert_exact, relative

#: Those that are usable here.
BACKENDS = [name for name, problem in kd.backends().items() if problem is None and name != "reference"]

__all__ = ["BACKENDS", "Problem", "assert_exact", "assert_refused", "relative"]


def assert_refused(call, message):
    """``call`` raises a ValueError of one line that matches ``message``."""
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
