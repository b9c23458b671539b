"""Peak resident memory of a step, where the system can tell."""

import contextlib
import ctypes
import gc
import platform

import pytest

from benchmarks.memory import give_back_free_memory, resident_peak

#: mallopt's name for the size from which on a block is mapped by itself, and given back when it is freed.
_MMAP_THRESHOLD = -3
_MAPPED_FROM = 2**18


def peak_of(run):
    """Bytes above what is there before, what ``run`` returns included; its second run counts."""
    run()  # whatever is loaded and cached once
    gc.collect()  # other tests' garbage, which would be given back meanwhile
    try:
        with _nothing_free(), resident_peak() as peak:
            kept = run()
    except OSError as error:
        pytest.skip(f"resident memory cannot be measured here: {error}")
    del kept
    return peak.bytes


@contextlib.contextmanager
def _nothing_free():
    """Large blocks are mapped by themselves. Free memory that other tests have left would hide a peak, and is given back.
    Its addresses are taken: a step writes to one hole of the heap and then to another, and each would stay resident."""
    give_back_free_memory()
    libc, taken = _libc(), []
    if glibc := platform.libc_ver()[0] == "glibc":
        libc.mallopt(_MMAP_THRESHOLD, _MAPPED_FROM)
        while not (taken and _is_mapped(taken[-1])):
            taken.append(libc.malloc(_MAPPED_FROM))
    try:
        yield
    finally:
        for block in taken:
            libc.free(block)
        if glibc:
            libc.mallopt(_MMAP_THRESHOLD, 2**25)  # where malloc itself takes it to


def _is_mapped(block):
    """By itself, not from the heap: the second bit of the size that glibc writes before a block."""
    return bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2)


def _libc():
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    return libc
