"""Losses to compare, and how: the rule lives in the package, where users find it too."""

import pytest
import torch

import kdkernels as kd
from kdkernels.core.make import Given, make
from kdkernels.core.request import Terms, Tokens
from kdkernels.testing import Problem, assert_exact, relative

#: Those that are usable here.
BACKENDS = [name for name, problem in kd.backends().items() if problem is None and name != "reference"]

__all__ = ["BACKENDS", "Problem", "arguments", "assert_exact", "assert_refused", "relative"]


def assert_refused(call, message):
    """``call`` raises a ValueError of one line that matches ``message``."""
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def arguments(student, teacher, **options):
    """Those of ``kdkernels::rows``, for a mix of both terms and a masked token."""
    side = student[0] if len(student) == 1 else kd.LinearHead(*student)
    terms = Terms((kd.ForwardKL(),), 1.5, soft_weight=0.7, hard_weight=0.5, **options)
    tokens = Tokens(torch.tensor([1, -100, 2, 3]), token_weights=torch.rand(4))
    return make(side, teacher, lambda: Given(terms, tokens)).request.arguments()
