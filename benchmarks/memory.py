"""Peak resident memory of a block of code, from Linux's own account of this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Peak:
    bytes: int = 0


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@contextlib.contextmanager
def resident_peak() -> Iterator[Peak]:
    """``.bytes`` is, after the block, how far resident memory rose above its value at the start.

    OSError where the system does not let a process reset its high-water mark (not Linux, say).
    """
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before, peak = _status("VmRSS"), Peak()
    yield peak
    peak.bytes = max(_status("VmHWM") - before, 0)
