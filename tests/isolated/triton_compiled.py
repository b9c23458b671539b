"""Triton's kernels compiled for GPUs that are not here: registers, vector loads, and no variant too many.

``tests/test_triton.py`` runs this file in a process of its own. ``python -m benchmarks.compile_triton``
compiles the full product of kernels, divergences, dtypes and options; this is what stands for it here.
"""

import pytest
import torch

import kdkernels as kd
from benchmarks.compile_triton import (
    BF16,
    EVERYTHING,
    F32,
    OPTIONS,
    TARGETS,
    call,
    call_sparse,
    offline,
    usages,
)
from kdkernels.backends.spec import Spec
from kdkernels.backends.triton import kernels, launch
from kdkernels.divergences import NoDivergence

REPRESENTATIVES = [
    (kd.ForwardKL(), BF16, BF16, dict(OPTIONS[1])),
    (kd.ForwardKL(), F32, F32, dict(chunked=True)),
    (kd.ReverseKL(), F32, BF16, dict()),
    (kd.JSD(0.5), F32, BF16, dict(OPTIONS[3])),
    (kd.JSD(0.5), BF16, BF16, dict(OPTIONS[2], chunked=True)),
    (kd.AlphaBeta(0.2, 0.7), BF16, BF16, dict(OPTIONS[3])),
    (NoDivergence(), BF16, BF16, dict(OPTIONS[1])),
]


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target):
    names = set()
    for divergence, tile, gradient, options in REPRESENTATIVES:
        with offline(target) as compiled:
            call(divergence, tile, gradient, **options)
        for used in usages(compiled, target):
            names.add(used.kernel)
            assert used.shared <= 48 * 1024 and used.registers > 0
            assert target.startswith("gfx") or used.spilled == 0, (used, divergence, tile, options)
    assert names == {"fused", "fold", "merge", "value", "merge_value", "gradient"}


def test_few_rows_and_scale_compile():
    with offline("sm_90") as compiled:
        call(kd.JSD(0.5), BF16, BF16, rows=64, columns=256_000)
        launch.scale_(torch.ones(64, dtype=BF16), torch.ones(()))
    found = {used.kernel: used for used in usages(compiled, "sm_90")}
    assert {"fold", "merge", "value", "merge_value", "finish", "gradient", "scale"} == set(found)
    assert all(used.spilled == 0 for used in found.values())


@pytest.mark.parametrize("target", TARGETS)
def test_sparse_targets_compile_without_spills(target):
    with offline(target) as compiled:
        call_sparse(F32, BF16, **EVERYTHING)
    assert target.startswith("gfx") or all(used.spilled == 0 for used in usages(compiled, target))
    for kernel in compiled:
        if "ptx" in kernel.asm and kernel.metadata.name != "merge":
            assert any("ld.global" in line and "v4.b32" in line for line in kernel.asm["ptx"].splitlines())


@pytest.mark.parametrize("chunked", [False, True])
def test_aligned_rows_are_read_and_written_in_vectors(chunked):
    with offline("sm_90") as compiled:
        call(kd.ForwardKL(), BF16, BF16, chunked=chunked)
    for kernel in compiled:
        if kernel.metadata.name in ("fused", "fold", "gradient"):
            lines = kernel.asm["ptx"].splitlines()
            tiles = [line for line in lines if "global" in line and "v4.b32" in line]
            assert any("ld.global" in line for line in tiles), kernel.metadata.name
            # What is left in 16 bits are the label's and the two top logits.
            assert sum("ld.global" in line and ".b16" in line for line in lines) <= 4
            if kernel.metadata.name != "fold":
                assert any("st.global" in line for line in tiles)


def variants():
    """How many binaries each kernel has been compiled to."""
    return {
        name: len(kernel.device_caches[0][0])
        for name, kernel in vars(kernels).items()
        if hasattr(kernel, "device_caches") and kernel.device_caches
    }


def test_numbers_and_shapes_compile_nothing_anew():
    options = [
        dict(temperature=t, soft_weight=w, hard_weight=h)
        for t, w, h in [(2.0, 1.0, 0.5), (3.5, 0.0, 1.0), (0.7, 2.0, 1e-3)]
    ]
    with offline("sm_90"):
        for i, numbers in enumerate(options):
            for rows, columns in [(400, 100_000), (401, 128_256), (4_096, 40_000)]:
                for chunked in (False, True):
                    call(
                        kd.JSD(0.1 + 0.2 * i),
                        BF16,
                        BF16,
                        rows=rows,
                        columns=columns,
                        chunked=chunked,
                        **numbers,
                    )
        assert variants() == {"fused": 1, "fold": 1, "merge": 1, "value": 1, "merge_value": 1, "gradient": 1}
        call(kd.JSD(0.5), BF16, BF16, temperature=2.0, hard_weight=0.5, rows=400, columns=100_001)
        assert variants()["fused"] == 2  # rows that do not end on 16 bytes


def test_strides_and_addresses_compile_nothing_anew():
    store = torch.empty(300 * 60_000, dtype=BF16)
    with offline("sm_90"):
        for start, stride in [(0, 50_000), (8, 50_000), (16, 50_008), (64, 59_992)]:
            s = store[start:].as_strided((200, 50_000), (stride, 1))
            launch.fused(s, s, None, torch.ones(200), spec=Spec(kd.ForwardKL()), grad=s, teacher_grad=None)
        assert variants()["fused"] == 1
