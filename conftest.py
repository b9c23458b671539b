"""For all tests, the examples in docstrings too: what one leaves behind does not reach another."""

import logging
import os
import random

import numpy
import pytest
import torch

# DeepSpeed logs to the stdout of the moment in which somebody imports it: in an example, among its output.
logging.getLogger("DeepSpeed").addFilter(lambda record: False)


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment():
    """Libraries write to os.environ (transformers does when FSDP is asked for): no test inherits that."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
