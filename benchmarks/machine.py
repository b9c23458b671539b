"""Where a run took place: the machine, the versions, the commit, the time."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.utils import get_commit_info

#: Distributions whose versions go into a result, where they are installed.
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pyarrow",
    "trl",
    "transformers",
    "liger-kernel",
    "torchtune",
    "axolotl",
    "nvidia-modelopt",
    "speculators",
    "verl",
    "ms-swift",
    "unsloth_zoo",
    "cut-cross-entropy",
    "quack-kernels",
    "fla-core",
)
_CACHES = "/sys/devices/system/cpu/cpu0/cache"


def last_level_cache_bytes(device: str) -> int:
    """Size of the last-level cache; 64 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [_bytes(path.read_text()) for path in Path(_CACHES).glob("index*/size")]
    return max(sizes, default=64 * 2**20)


def _bytes(text: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    text = text.strip()
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__}


def describe(device: str) -> dict[str, Any]:
    """What every result file begins with; ``name`` is what a figure is labelled with."""
    import kdkernels as kd

    threads = torch.get_num_threads()
    cpu = f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    commit = get_commit_info()
    made = {
        "name": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "device": device,
        "cpu": cpu,
        "instruction_set": kd.backends()["native"] or kd.instruction_set(),
        "backends": kd.backends(),
        "last_level_cache_bytes": last_level_cache_bytes(device),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions(),
        "kdkernels": kd.__version__,
        "commit": commit["id"][:12] + (" and changes" if commit.get("dirty") else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        made["gpu_bytes"], made["cuda"] = properties.total_memory, torch.version.cuda
    return made
