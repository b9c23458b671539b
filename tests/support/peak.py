"""Peak resident memory of a step, where the system can tell."""

import contextlib
import ctypes
import gc

import pytest

from benchmarks.memory import give_back_free_memory, resident_peak

#: mallopt's name for the size from which on a block is mapped by itself, and given back when it is freed.
_MMAP_THRESHOLD = -3


def peak_of(run, *, from_nothing=False):
    """Bytes above what is there before, what ``run`` returns included; its second run counts. ``from_nothing``: without the
    free memory that other tests have left, in which all of a step might find room."""
    with _large_blocks_apart() if from_nothing else contextlib.nullcontext():
        run()  # whatever is loaded and cached once
        gc.collect()  # other tests' garbage, which would be given back meanwhile
        if from_nothing:
            give_back_free_memory()
        try:
            with resident_peak() as peak:
                kept = run()
        except OSError as error:
            pytest.skip(f"resident memory cannot be measured here: {error}")
        del kept
    return peak.bytes


@contextlib.contextmanager
def _large_blocks_apart():
    """No holes between them, which would count as well. Afterwards the threshold is where malloc itself takes it to."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # glibc's
    mallopt(_MMAP_THRESHOLD, 2**18)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 2**25)
