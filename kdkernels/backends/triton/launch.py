"""How the kernels are launched: the table of options, geometry, and the entry points of the waist.

Nothing here waits for the GPU: no value is read back, all memory is torch's, everything runs on the
current stream of the tensors' device. So calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ...divergences import AlphaBeta, SkewReverseKL
from .. import row_state as rs
from ..outcomes import Outcomes
from ..sparse_rows import Emission, in_two_passes
from ..spec import LogitMap, Spec
from . import kernels
from .divergences import TINY
from .rows import IDENTITY, SCALE, SOFTCAP, Flags, Numbers
from .state import LOG2E

#: Contraction would fuse e.g. q - p into a product: p == q must give exactly 0.
_NO_FUSION = dict(enable_fp_fusion=False)
#: The kernels over vectors of rows: one row a thread.
_OVER_ROWS = dict(ROWS=128, num_warps=4, **_NO_FUSION)
#: Numbers that a turn of the scaling kernel takes.
_SCALED = 4096


class Options(NamedTuple):
    columns: int  # for rows up to this wide
    num_warps: int
    lanes: int  # of a tile, per thread
    programs: int  # per multiprocessor, at most
    light: bool = False  # only for the KL family and cross entropy over aligned rows: few registers


#: By architecture; the first that fits is taken. ``python -m benchmarks.tune_triton`` measures
#: candidates on a card. These were chosen by registers and bytes in flight, and not measured yet: wide
#: rows want one program a multiprocessor, for L2's sake, and so many loads in flight in each.
_TABLE = {
    "nvidia": (
        Options(columns=1024, num_warps=4, lanes=1, programs=6),
        Options(columns=32768, num_warps=8, lanes=1, programs=3),
        Options(columns=2**31, num_warps=16, lanes=2, programs=1, light=True),
        Options(columns=2**31, num_warps=8, lanes=1, programs=2),
    ),
    "amd": (
        Options(columns=1024, num_warps=4, lanes=1, programs=4),
        Options(columns=2**31, num_warps=8, lanes=1, programs=2),
    ),
}


def options(maker: str, columns: int, light: bool) -> Options:
    """The table's row for rows of ``columns``."""
    return next(o for o in _TABLE[maker] if columns <= o.columns and light >= o.light)


class Chip(NamedTuple):
    maker: str
    multiprocessors: int
    l2_bytes: int
    warp: int


@functools.cache
def _chip(device: torch.device) -> Chip:
    if device.type == "cpu":  # the interpreter: few programs, so that each has several rows
        return Chip("nvidia", 4, 2**25, 32)
    found = torch.cuda.get_device_properties(device)
    maker = "amd" if torch.version.hip else "nvidia"
    return Chip(maker, found.multi_processor_count, found.L2_cache_size, found.warp_size)


class _Tiles:
    """The tensors of a call and what follows from their shapes: tiles, programs, arguments."""

    def __init__(
        self,
        student: Tensor,
        teacher: Optional[Tensor],
        labels: Optional[Tensor],
        spec: Spec,
        grad: Optional[Tensor] = None,
        teacher_grad: Optional[Tensor] = None,
        sparse: bool = False,
    ) -> None:
        self.student, self.teacher = _adjacent(student), None if teacher is None else _adjacent(teacher)
        self.labels = None if labels is None else labels.contiguous()
        self.grad, self.teacher_grad, self.spec = grad, teacher_grad, spec
        self.rows, self.columns = student.shape
        self.chip = _chip(student.device)
        tensors = [t for t in (self.student, self.teacher, grad, teacher_grad) if t is not None]
        narrowest = min(t.element_size() for t in tensors)
        self.k = 16 // narrowest
        aligned = self.columns % self.k == 0 and all(_aligned(t) for t in tensors)
        self.closed = teacher is None or spec.divergence.closed_form is not None
        self.options = options(self.chip.maker, self.columns, self.closed and aligned)
        self.lanes = self.options.num_warps * self.chip.warp * self.options.lanes
        self.tile = self.lanes * self.k
        pair = [t for t in (self.student, self.teacher) if t is not None]
        self.pair_bytes = self.columns * sum(t.element_size() for t in pair)
        self.flags = _flags(
            spec,
            teacher is not None,
            labels is not None,
            grad is not None,
            teacher_grad is not None,
            sparse,
            aligned,
        )
        self.numbers = _numbers(spec)
        self.block = dict(F=self.flags, LANES=self.lanes, K=self.k)
        self.compile = dict(num_warps=self.options.num_warps, **_NO_FUSION)
        if self.chip.maker == "nvidia":
            # By itself ptxas stops at 64 or 128 and spills a few, for an occupancy that helps nobody here.
            heavy = isinstance(spec.divergence, AlphaBeta) or self.flags.teacher_hard
            heavy |= SOFTCAP.value in (self.flags.student_map, self.flags.teacher_map)
            self.compile["maxnreg"] = 168 if heavy else 128

    @property
    def inputs(self) -> tuple:
        return (self.student, self.student.stride(0), self.teacher, _stride(self.teacher))

    @property
    def gradients(self) -> tuple:
        return (self.grad, _stride(self.grad), self.teacher_grad, _stride(self.teacher_grad))

    @property
    def programs(self) -> int:
        """How many rows are in flight: what the chip holds, or what L2 does where rows are wide."""
        fit = self.chip.l2_bytes * 3 // 4 // (self.chip.multiprocessors * self.pair_bytes)
        if not self.closed:  # they wait for arithmetic rather than for memory
            fit = self.options.programs
        return min(self.chip.multiprocessors * max(1, min(self.options.programs, fit)), self.rows)

    @property
    def few(self) -> bool:
        """Fewer rows than multiprocessors: each row is cut into parts."""
        return self.rows < self.chip.multiprocessors and self.columns > self.tile

    @property
    def parts(self) -> tuple[int, int]:
        """How many parts a row is cut into to fill the chip, and the columns of one."""
        tiles = -(-self.columns // self.tile)
        wanted = -(-self.chip.multiprocessors * self.options.programs // self.rows)
        part = -(-tiles // min(tiles, wanted))
        return -(-tiles // part), part * self.tile


def _adjacent(tile: Tensor) -> Tensor:
    return tile if tile.stride(-1) == 1 or tile.shape[-1] == 1 else tile.contiguous()


def _stride(tile: Optional[Tensor]) -> int:
    return 0 if tile is None else tile.stride(0)


def _aligned(tile: Tensor) -> bool:
    return tile.data_ptr() % 16 == 0 and tile.stride(0) * tile.element_size() % 16 == 0


def _map(logit_map: LogitMap) -> int:
    if logit_map.softcap:
        return SOFTCAP.value
    return IDENTITY.value if logit_map.scale == 1.0 else SCALE.value


def _variant(spec: Spec) -> int:
    """What of the divergence's parameters changes its formula."""
    found = spec.divergence
    if isinstance(found, SkewReverseKL):
        return int(found.detach_mixture)
    if isinstance(found, AlphaBeta):
        corners = 0.0, found.alpha, found.alpha + found.beta
        low, _, high = sorted(range(3), key=corners.__getitem__)
        return 3 * low + high
    return 0


def _flags(
    spec: Spec, teacher: bool, labels: bool, grad: bool, teacher_grad: bool, sparse: bool, aligned: bool
) -> Flags:
    hard, teacher_hard = labels and spec.hard_weight != 0, labels and spec.teacher_hard_weight != 0
    return Flags(
        kind=spec.divergence.code if teacher else 0,
        variant=_variant(spec),
        labels=labels,
        hard=hard,
        smooth=hard and spec.label_smoothing != 0,
        teacher_hard=teacher_hard,
        tempered=(hard or teacher_hard) and spec.temperature != 1.0,
        student_map=_map(spec.student_map),
        teacher_map=_map(spec.teacher_map),
        grad=grad,
        teacher_grad=teacher_grad,
        sparse=sparse,
        aligned=aligned,
    )


def _numbers(spec: Spec) -> Numbers:
    first, second, both = (
        number if abs(number) > TINY.value else 0.0  # which changes nothing of what is finite
        for number in (*spec.divergence.parameters, sum(spec.divergence.parameters))
    )
    s, t = spec.student_map, spec.teacher_map
    return Numbers(
        factor=LOG2E.value / spec.temperature,
        first=first,
        second=second,
        sum=both,
        soft=spec.soft_weight / spec.temperature,
        hard=spec.hard_weight,
        smoothing=spec.label_smoothing,
        z_loss=spec.z_loss,
        teacher_hard=spec.teacher_hard_weight,
        student_gain=s.scale / (s.softcap or 1.0),
        student_cap=s.softcap,
        teacher_gain=t.scale / (t.softcap or 1.0),
        teacher_cap=t.softcap,
    )


def _slots(ids: Optional[Tensor]) -> tuple[Optional[Tensor], int]:
    return (None, 0) if ids is None else (ids.contiguous(), ids.shape[1])


def _over_rows(rows: int) -> tuple[int]:
    return (-(-rows // _OVER_ROWS["ROWS"]),)


def fused(
    student: Tensor,
    teacher: Optional[Tensor],
    labels: Optional[Tensor],
    weights: Tensor,
    *,
    spec: Spec,
    grad: Optional[Tensor],
    teacher_grad: Optional[Tensor],
) -> Tensor:
    """Whole rows: one launch, or where rows are too few to fill the chip one a pass over parts of them."""
    tiles = _Tiles(student, teacher, labels, spec, grad, teacher_grad)
    results = student.new_empty(tiles.rows, rs.RESULTS, dtype=torch.float64)
    if tiles.rows == 0:
        return results
    with torch.cuda.device_of(student):
        if tiles.few:
            _fused_in_parts(tiles, weights.contiguous(), results)
        else:
            kernels.fused[(tiles.programs,)](
                *tiles.inputs,
                tiles.labels,
                weights.contiguous(),
                *tiles.gradients,
                results,
                tiles.rows,
                tiles.columns,
                tiles.numbers,
                **tiles.block,
                **tiles.compile,
            )
    return results


def _fused_in_parts(tiles: _Tiles, weights: Tensor, results: Tensor) -> None:
    state = rs.new_state(tiles.rows, results.device)
    _fold(tiles, 0, state, None)
    if not tiles.closed:
        _value(tiles, state)
    kernels.finish[_over_rows(tiles.rows)](
        state,
        tiles.labels,
        results,
        tiles.rows,
        tiles.columns,
        tiles.numbers,
        F=tiles.flags,
        **_OVER_ROWS,
    )
    if tiles.grad is not None or tiles.teacher_grad is not None:
        _gradient(tiles, weights, 0, tiles.columns, state, None)


def _fold(tiles: _Tiles, offset: int, state: Tensor, skipped: Optional[Tensor]) -> None:
    parts, part = tiles.parts
    partial = state.new_empty(parts, tiles.rows, rs.COLUMNS)
    kernels.fold[(tiles.rows, parts)](
        *tiles.inputs,
        tiles.labels,
        *_slots(skipped),
        partial,
        tiles.rows,
        tiles.columns,
        part,
        offset,
        tiles.numbers,
        **tiles.block,
        **tiles.compile,
    )
    kernels.merge[_over_rows(tiles.rows)](
        partial,
        state,
        tiles.labels,
        tiles.rows,
        parts,
        tiles.spec.temperature,
        F=tiles.flags,
        **_OVER_ROWS,
    )


def _value(tiles: _Tiles, state: Tensor) -> None:
    parts, part = tiles.parts
    partial = state.new_empty(parts, tiles.rows, 2)
    kernels.value[(tiles.rows, parts)](
        *tiles.inputs,
        state,
        partial,
        tiles.rows,
        tiles.columns,
        part,
        tiles.numbers,
        **tiles.block,
        **tiles.compile,
    )
    kernels.merge_value[_over_rows(tiles.rows)](partial, state, tiles.rows, parts, **_OVER_ROWS)


def _gradient(
    tiles: _Tiles, weights: Tensor, offset: int, vocab: int, state: Tensor, emission: Optional[Emission]
) -> None:
    parts, part = tiles.parts
    emitted: tuple = (None, 0, None, 0, None, None)
    if emission is not None:
        kept = _adjacent(emission.kept)
        emitted = (
            *_slots(emission.ids),
            kept,
            kept.stride(0),
            emission.rest.contiguous(),
            emission.lse1.contiguous(),
        )
    kernels.gradient[(tiles.rows, parts)](
        *tiles.inputs,
        tiles.labels,
        weights,
        *tiles.gradients,
        *emitted,
        state,
        tiles.columns,
        part,
        offset,
        vocab,
        tiles.numbers,
        **tiles.block,
        **tiles.compile,
    )


def accumulate(
    student: Tensor,
    teacher: Optional[Tensor],
    labels: Optional[Tensor],
    *,
    offset: int,
    spec: Spec,
    state: Tensor,
    skipped: Optional[Tensor] = None,
) -> None:
    """Fold the vocabulary chunk that begins at ``offset`` into ``state``, without the ids ``skipped``."""
    tiles = _Tiles(student, teacher, labels, spec, sparse=skipped is not None)
    if tiles.rows:
        with torch.cuda.device_of(student):
            _fold(tiles, offset, state, skipped)


def accumulate_value(student: Tensor, teacher: Tensor, *, spec: Spec, state: Tensor) -> None:
    """The second pass of divergences without a closed form: value and slope."""
    tiles = _Tiles(student, teacher, None, spec)
    if tiles.rows:
        with torch.cuda.device_of(student):
            _value(tiles, state)


def gradient(
    student: Tensor,
    teacher: Optional[Tensor],
    labels: Optional[Tensor],
    weights: Tensor,
    *,
    offset: int,
    vocab: int,
    spec: Spec,
    state: Tensor,
    grad: Optional[Tensor],
    teacher_grad: Optional[Tensor],
    emission: Optional[Emission] = None,
) -> None:
    """weights * d(loss)/d(raw logits) of one chunk into ``grad`` (may be ``student`` itself)."""
    tiles = _Tiles(student, teacher, labels, spec, grad, teacher_grad, sparse=emission is not None)
    if tiles.rows and (grad is not None or teacher_grad is not None):
        with torch.cuda.device_of(student):
            _gradient(tiles, weights.contiguous(), offset, vocab, state, emission)


def fused_sparse(
    student: Tensor,
    target: Outcomes,
    labels: Optional[Tensor],
    weights: Tensor,
    *,
    spec: Spec,
    grad: Optional[Tensor],
) -> Tensor:
    """Whole rows with a sparse target: two reads and a write of the student's logits."""
    return in_two_passes(
        student,
        target,
        labels,
        weights,
        spec=spec,
        grad=grad,
        accumulate=accumulate,
        fused=fused,
        gradient=gradient,
    )


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """values *= factor (0-dim, on the same device), free where the factor is 1; ``values`` contiguous."""
    if values.numel():
        programs = min(-(-values.numel() // _SCALED), 8 * _chip(values.device).multiprocessors)
        with torch.cuda.device_of(values):
            kernels.scale[(programs,)](
                values, factor, values.numel(), TILE=_SCALED, num_warps=8, **_NO_FUSION
            )
    return values
