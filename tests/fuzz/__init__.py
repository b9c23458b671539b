"""Random calls against formulas that share nothing with the package: seeded, short in the suite, long by hand.

``python -m tests.fuzz --help`` runs them for as long as one likes and prints the seed of each failure.
"""

import torch

_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
#: Backend -> the dtypes it serves; a call with others would be another backend's.
BACKENDS = {
    "native": _HALF_AND_SINGLE,
    "triton": _HALF_AND_SINGLE,
    "eager": (*_HALF_AND_SINGLE, torch.float64),
    "reference": (*_HALF_AND_SINGLE, torch.float64),
}
