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
from kdkernels.backends.protocol import Gradients, Tile
from kdkernels.backends.spec import OUTPUTS, Asked, Spec
from kdkernels.backends.triton import kernels, launch
from kdkernels.divergences import NoDivergence

REPRESENTATIVES = [
    (kd.ForwardKL(), BF16, BF16, dict(OPTIONS[1])),
    (kd.ForwardKL(), F32, F32, dict(chunked=True)),
    (kd.ReverseKL(), F32, BF16, dict()),
    (kd.JSD(0.5), F32, BF16, dict(OPTIONS[3])),
    (kd.JSD(0.5), BF16, BF16, dict(OPTIONS[2], chunked=True)),
    (kd.AlphaBeta(0.2, 0.7), BF16, BF16, dict(OPTIONS[3])),
    (kd.ReverseKL(), BF16, BF16, dict(OPTIONS[3])),
    (kd.ReverseKL(), BF16, BF16, dict(OPTIONS[3], chunked=True)),
    (NoDivergence(), BF16, BF16, dict(OPTIONS[1])),
]


#: sm_90 here, the others in the slow part.
targets = pytest.mark.parametrize(
    "target", [pytest.param(t, marks=[] if t == "sm_90" else pytest.mark.slow) for t in TARGETS]
)


@targets
def test_kernels_compile_without_spills_and_fit(target):
    names = set()
    for divergence, tile, gradient, options in REPRESENTATIVES:
        with offline(target) as compiled:
            call(divergence, tile, gradient, **options)
        for used in usages(compiled, target):
            names.add(used.kernel)
            assert used.shared <= 48 * 1024 and used.registers > 0
            assert used.good, (used, divergence, tile, options)
    assert names == {"fused", "fold", "merge", "value", "merge_value", "gradient"}


def test_few_rows_and_scale_compile():
    with offline("sm_90") as compiled:
        call(kd.JSD(0.5), BF16, BF16, rows=64, columns=256_000)
        launch.scale_(torch.ones(64, dtype=BF16), torch.ones(()))
    found = {used.kernel: used for used in usages(compiled, "sm_90")}
    assert {"fold", "merge", "value", "merge_value", "finish", "gradient", "scale"} == set(found)
    assert all(used.good for used in found.values())


@targets
def test_sparse_targets_compile_without_spills(target):
    with offline(target) as compiled:
        call_sparse(F32, BF16, **EVERYTHING)
    assert all(used.good for used in usages(compiled, target))
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
    with offline("sm_90"):
        for beta in (0.1, 0.3, 0.5):
            for rows, columns in [(400, 100_000), (401, 128_256), (4_096, 40_000)]:
                for chunked in (False, True):
                    shape = dict(rows=rows, columns=columns, chunked=chunked)
                    call(kd.JSD(beta), BF16, BF16, **shape, **EVERYTHING)
        assert variants() == {"fused": 1, "fold": 1, "merge": 1, "value": 1, "merge_value": 1, "gradient": 1}
        call(kd.JSD(0.5), BF16, BF16, rows=400, columns=100_001, **EVERYTHING)
        assert variants()["fused"] == 2  # rows that do not end on 16 bytes


def test_annealed_alpha_beta_compiles_nothing_anew():
    """Where its corners lie is a number too."""
    with offline("sm_90"):
        for numbers in [(0.2, 0.7), (0.5, -0.5), (0.0, 0.5), (-0.3, 1.0)]:
            call(kd.AlphaBeta(*numbers), BF16, BF16)
        assert variants() == {"fused": 1}


@pytest.mark.parametrize("per_row", [False, True])
def test_strides_and_addresses_compile_nothing_anew(per_row):
    """One temperature for all rows or one for each is a stride as well."""
    store = torch.empty(300 * 60_000, dtype=BF16)
    temperature = torch.ones(200 if per_row else 1, dtype=torch.float64)
    numbers, weights = torch.zeros(2, dtype=torch.float64), torch.ones(200, OUTPUTS, dtype=torch.float64)
    spec = Spec(kind=kd.ForwardKL().kind, asked=Asked.SOFT, tempered=1)
    with offline("sm_90"):
        for start, stride in [(0, 50_000), (8, 50_000), (16, 50_008), (64, 59_992)]:
            s = store[start:].as_strided((200, 50_000), (stride, 1))
            for given in (temperature, torch.ones(1, dtype=torch.float64)):
                launch.fused(Tile(s, s, None, given, numbers, 0, 50_000), weights, spec, Gradients(s, None))
        assert variants()["fused"] == 1


def test_statistics_that_nobody_asked_for_are_not_computed():
    """Two sums of products and two top columns fewer: seen in the loads and the products of the first pass."""
    instructions = []
    for stats in (0, 1):
        with offline("sm_90") as compiled:
            call(kd.ForwardKL(), BF16, BF16, chunked=True, asked=Asked.SOFT, stats=stats)
        fold = next(kernel for kernel in compiled if kernel.metadata.name == "fold")
        lines = fold.asm["ptx"].splitlines()
        instructions.append([sum(word in line for line in lines) for word in ("ld.global", "max.f32")])
    assert all(few < many for few, many in zip(*instructions))
