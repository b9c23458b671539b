"""How the kernels are launched: the table of options, geometry, and the entry points of the waist.

Nothing here waits for the GPU: no value is read back, all memory is torch's, everything runs on the
current stream of the tensors' device. So calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from .. import row_state as rs
from ..outcomes import Outcomes
from ..protocol import Gradients, SparseGradient, Tile
from ..sparse_rows import in_two_passes
from ..spec import RESULTS, Asked, Spec
from ..spec import LogitMap as SpecMap
from . import kernels
from .divergences import ALPHA_BETA, FORWARD_KL, REVERSE_KL, SKEW_KL
from .rows import IDENTITY, SCALE, SOFTCAP, Flags, LogitMap, LogitMaps

_NONE = Gradients(None, None)
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


#: By architecture; the first that fits is taken. Chosen by registers and bytes in flight: wide rows want one program a
#: multiprocessor, for L2's sake, and so many loads in flight in each. On an H200 these run at the floor of their traffic for
#: the KL family over 128k columns; other candidates (``python -m benchmarks.tune_triton``) were not measured yet.
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

    def __init__(self, tile: Tile, spec: Spec, gradients: Gradients = _NONE, sparse: bool = False) -> None:
        self.student, self.teacher = tile.student, None
        if tile.teacher is not None and (_teacher_needed(spec) or gradients.teacher is not None):
            self.teacher = tile.teacher
        self.labels = None if tile.labels is None else tile.labels.contiguous()
        self.temperature, self.parameters = tile.temperature, tile.parameters
        self.gradients, self.offset, self.vocab = gradients, tile.offset, tile.vocab
        self.rows, self.columns = tile.student.shape
        self.chip = _chip(tile.student.device)
        tensors = [t for t in (self.student, self.teacher, *gradients) if t is not None]
        self.k = 16 // min(t.element_size() for t in tensors)
        aligned = self.columns % self.k == 0 and all(_aligned(t) for t in tensors)
        self.flags = _flags(self, spec, sparse, aligned)
        self.closed = self.flags.kind <= REVERSE_KL.value
        self.heavy = self.flags.kind == ALPHA_BETA.value or self.flags.teacher_label
        self.heavy |= SOFTCAP.value in (self.flags.student_map, self.flags.teacher_map)
        light = self.closed and aligned and not self.heavy
        self.options = options(self.chip.maker, self.columns, light)
        self.lanes = self.options.num_warps * self.chip.warp * self.options.lanes
        self.tile = self.lanes * self.k
        pair = [t for t in (self.student, self.teacher) if t is not None]
        self.pair_bytes = self.columns * sum(t.element_size() for t in pair)
        self.maps = LogitMaps(_map_numbers(spec.student_map), _map_numbers(spec.teacher_map))

    @property
    def compile(self) -> dict:
        """What a kernel over tiles is compiled with."""
        made = dict(F=self.flags, LANES=self.lanes, K=self.k, num_warps=self.options.num_warps, **_NO_FUSION)
        if self.chip.maker == "nvidia":
            # By itself ptxas stops at 64 or 128 and spills a few, for an occupancy that helps nobody here. With sixteen warps
            # 128 is all that a multiprocessor has.
            made["maxnreg"] = 184 if self.heavy else 128  # what AlphaBeta with every option takes on sm_100
        return made

    @property
    def at_temperature(self) -> dict:
        """One temperature for all rows has the stride 0."""
        stride = self.temperature.stride(0) if self.temperature.shape[0] > 1 else 0
        return dict(temperature=self.temperature, temperature_stride=stride)

    @property
    def inputs(self) -> dict:
        return dict(
            student=self.student,
            student_stride=self.student.stride(0),
            teacher=self.teacher,
            teacher_stride=_stride(self.teacher),
            parameters=self.parameters,
            maps=self.maps,
            columns=self.columns,
            **self.at_temperature,
        )

    @property
    def outputs(self) -> dict:
        return dict(
            grad=self.gradients.student,
            grad_stride=_stride(self.gradients.student),
            teacher_grad=self.gradients.teacher,
            teacher_grad_stride=_stride(self.gradients.teacher),
        )

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


def _stride(tile: Tensor | None) -> int:
    return 0 if tile is None else tile.stride(0)


def _aligned(tile: Tensor) -> bool:
    return tile.data_ptr() % 16 == 0 and tile.stride(0) * tile.element_size() % 16 == 0


def _map(logit_map: SpecMap) -> int:
    if logit_map.softcap:
        return SOFTCAP.value
    return IDENTITY.value if logit_map.scale == 1.0 else SCALE.value


def _map_numbers(logit_map: SpecMap) -> LogitMap:
    return LogitMap(gain=logit_map.scale / (logit_map.softcap or 1.0), cap=logit_map.softcap)


def _teacher_needed(spec: Spec) -> bool:
    return bool(spec.stats or spec.asked & (Asked.SOFT | Asked.TEACHER_LABEL))


def _flags(tiles: _Tiles, spec: Spec, sparse: bool, aligned: bool) -> Flags:
    kind = spec.kind if tiles.teacher is not None and spec.asked & Asked.SOFT else 0
    asked = spec.asked if tiles.labels is not None else spec.asked & Asked.SOFT
    return Flags(
        kind=kind,
        needs_cross_s=kind == REVERSE_KL.value,
        needs_cross_t=kind in (FORWARD_KL.value, SKEW_KL.value),  # its value; whether p and q disagree
        label=bool(asked & Asked.LABEL),
        smooth=bool(asked & Asked.SMOOTH),
        lse_squared=bool(asked & Asked.LSE_SQUARED),
        teacher_label=bool(asked & Asked.TEACHER_LABEL),
        hard=bool(asked & Asked.HARD),
        entropy=bool(spec.asked & Asked.ENTROPY),
        shifts=spec.sums_shifts,
        stats=bool(spec.stats),
        teacher=tiles.teacher is not None,
        labels=tiles.labels is not None,
        tempered=bool(spec.tempered),
        student_map=_map(spec.student_map),
        teacher_map=_map(spec.teacher_map),
        grad=tiles.gradients.student is not None,
        teacher_grad=tiles.gradients.teacher is not None,
        sparse=sparse,
        aligned=aligned,
    )


def _over_rows(rows: int) -> tuple[int]:
    return (-(-rows // _OVER_ROWS["ROWS"]),)


def fused(tile: Tile, weights: Tensor, spec: Spec, gradients: Gradients) -> Tensor:
    """Whole rows: one launch, or where rows are too few to fill the chip one a pass over parts of them."""
    tiles = _Tiles(tile, spec, gradients)
    results = tile.student.new_empty(tiles.rows, RESULTS, dtype=torch.float64)
    if tiles.rows == 0:
        return results
    with torch.cuda.device_of(tile.student):
        if tiles.few:
            _fused_in_parts(tiles, weights.contiguous(), results)
        else:
            kernels.fused[(tiles.programs,)](
                labels=tiles.labels,
                weights=weights.contiguous(),
                results=results,
                rows=tiles.rows,
                **tiles.inputs,
                **tiles.outputs,
                **tiles.compile,
            )
    return results


def _fused_in_parts(tiles: _Tiles, weights: Tensor, results: Tensor) -> None:
    state = rs.new_state(tiles.rows, results.device)
    _fold(tiles, state, None)
    if not tiles.closed:
        _value(tiles, state)
    kernels.finish[_over_rows(tiles.rows)](
        state, tiles.labels, results, tiles.rows, tiles.vocab, F=tiles.flags, **_OVER_ROWS
    )
    if tiles.gradients.asked:
        _gradient(tiles, weights, state, None)


def _fold(tiles: _Tiles, state: Tensor, skipped: Tensor | None) -> None:
    parts, part = tiles.parts
    partial = state.new_empty(parts, tiles.rows, rs.COLUMNS)
    kernels.fold[(tiles.rows, parts)](
        labels=tiles.labels,
        ids=None if skipped is None else skipped.contiguous(),
        slots=0 if skipped is None else skipped.shape[1],
        partial=partial,
        rows=tiles.rows,
        part=part,
        offset=tiles.offset,
        **tiles.inputs,
        **tiles.compile,
    )
    kernels.merge[_over_rows(tiles.rows)](
        partial,
        state,
        tiles.labels,
        rows=tiles.rows,
        parts=parts,
        F=tiles.flags,
        **tiles.at_temperature,
        **_OVER_ROWS,
    )


def _value(tiles: _Tiles, state: Tensor) -> None:
    parts, part = tiles.parts
    partial = state.new_empty(parts, tiles.rows, 2)
    kernels.value[(tiles.rows, parts)](
        state=state, partial=partial, rows=tiles.rows, part=part, **tiles.inputs, **tiles.compile
    )
    kernels.merge_value[_over_rows(tiles.rows)](partial, state, tiles.rows, parts, **_OVER_ROWS)


def _solved(sparse: SparseGradient | None) -> dict:
    """The solved outcomes of a sparse target."""
    if sparse is None:
        return dict(ids=None, slots=0, stored=None, stored_stride=0, rest=None, at_1=None, softmax=None)
    return dict(
        ids=sparse.ids.contiguous(),
        slots=sparse.ids.shape[1],
        stored=sparse.stored,
        stored_stride=sparse.stored.stride(0),
        rest=sparse.rest.contiguous(),
        at_1=sparse.at_1,
        softmax=sparse.softmax,
    )


def _gradient(tiles: _Tiles, weights: Tensor, state: Tensor, sparse: SparseGradient | None) -> None:
    parts, part = tiles.parts
    kernels.gradient[(tiles.rows, parts)](
        labels=tiles.labels,
        weights=weights,
        state=state,
        part=part,
        offset=tiles.offset,
        vocab=tiles.vocab,
        **tiles.inputs,
        **tiles.outputs,
        **_solved(sparse),
        **tiles.compile,
    )


def accumulate(tile: Tile, spec: Spec, state: Tensor, skipped: Tensor | None = None) -> None:
    """Fold one vocabulary chunk into ``state``, without the ids ``skipped``."""
    tiles = _Tiles(tile, spec, sparse=skipped is not None)
    if tiles.rows:
        with torch.cuda.device_of(tile.student):
            _fold(tiles, state, skipped)


def accumulate_value(tile: Tile, spec: Spec, state: Tensor) -> None:
    """The second pass of divergences without a closed form: value and sum_q_psi."""
    tiles = _Tiles(tile._replace(labels=None), spec)
    if tiles.rows:
        with torch.cuda.device_of(tile.student):
            _value(tiles, state)


def gradient(
    tile: Tile,
    weights: Tensor,
    spec: Spec,
    state: Tensor,
    gradients: Gradients,
    sparse: SparseGradient | None = None,
) -> None:
    """weights * d(outputs)/d(raw logits) of one chunk into ``gradients``, which may be the logits themselves."""
    tiles = _Tiles(tile, spec, gradients, sparse=sparse is not None)
    if tiles.rows and gradients.asked:
        with torch.cuda.device_of(tile.student):
            _gradient(tiles, weights.contiguous(), state, sparse)


def fused_sparse(tile: Tile, target: Outcomes, weights: Tensor, spec: Spec, gradients: Gradients) -> Tensor:
    """Whole rows with a sparse target: two reads and a write of the student's logits."""
    return in_two_passes(sys.modules[__name__], tile, target, weights, spec, gradients)


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """values *= factor (0-dim, on the same device), free where the factor is 1; ``values`` contiguous."""
    if values.numel():
        programs = min(-(-values.numel() // _SCALED), 8 * _chip(values.device).multiprocessors)
        with torch.cuda.device_of(values):
            kernels.scale[(programs,)](
                values, factor, values.numel(), TILE=_SCALED, num_warps=8, **_NO_FUSION
            )
    return values
