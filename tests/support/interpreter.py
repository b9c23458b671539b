"""Triton's interpreter, made fast enough for a suite. Import it before the first kernel runs."""

import numpy as np
from triton.language import standard
from triton.runtime import interpreter


def _call(self, *args, **kwargs):
    """A device function's call without replacing triton.language anew each time: 2 ms for nothing."""
    return self.rewrite()(*args, **kwargs)


interpreter._patch_lang(standard.zeros.fn)  # what the library's own functions see, once and for all
interpreter.InterpretedFunction.__call__ = _call
np.seterr(all="ignore")  # inf - inf in lanes that nobody reads
