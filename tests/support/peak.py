"""Peak resident memory of a step, where the system can tell."""

import gc

import pytest

from benchmarks.memory import give_back_free_memory, resident_peak


def peak_of(run):
    """Bytes above what is there before, what ``run`` returns included; its second run counts."""
    run()  # whatever is loaded and cached once
    gc.collect()  # other tests' garbage, which would be given back meanwhile
    give_back_free_memory()
    try:
        with resident_peak() as peak:
            kept = run()
    except OSError as error:
        pytest.skip(f"resident memory cannot be measured here: {error}")
    del kept
    return peak.bytes
