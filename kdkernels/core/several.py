"""Several divergences of the same two models from one pass: a tile is projected once and serves them all.

The gradient is made in the backward, from the weights that arrive for each token and divergence. The tile is projected
once more there, and the sum of the divergences' gradients goes on to dH and dW as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backends import CHOICES, chosen_backend, serving
from ..backends.protocol import Backend, Gradients, Tile
from ..backends.row_state import finish, new_state
from ..backends.spec import OUTPUTS, Asked, Output, Spec
from ..divergences import Divergence, simplified
from ..targets import SparseTarget
from . import tokens
from .autograd import new_gradient, refuse_batched, refuse_double_backward, save_tensors, saved_tensors
from .option_checks import checked
from .request import Call, Request, Terms, Tokens
from .scaling import tracing
from .schedule import plan
from .sides import Teacher
from .walk import PerRow, projected, sources


class _One(NamedTuple):
    """One of the divergences."""

    spec: Spec
    parameters: Tensor
    backend: Backend


class _Walk:
    """``weights`` ``[N, D]`` are what each token's divergences are multiplied by."""

    def __init__(
        self, request: Request, specs: list[Spec], parameters: list[Tensor], grads: Gradients
    ) -> None:
        student, teacher = sources(request, grads, None)
        assert teacher is not None
        self.request, self.student, self.teacher = request, student, teacher
        self.rows = PerRow(request.labels, request.temperature, request.weights, None, None)
        self.live: Tensor | None = None
        sides = [student, teacher]
        if any(side.is_head for side in sides):
            self.rows, self.live = projected(sides, self.rows)
        dtypes = [dtype for side in sides for dtype in side.dtypes]
        device = request.weights.device
        self.each = [
            _One(spec, own, serving(request.backend, device, dtypes, spec))
            for spec, own in zip(specs, parameters)
        ]
        beside = max(one.backend.bytes_per_logit(dtypes) for one in self.each)
        if student.needs_grad:  # the sum of those before, and the next
            beside += min(len(specs) - 1, 2) * max(dtype.itemsize for dtype in dtypes)
        self.tiles = plan(
            tokens=student.tokens,
            vocab=request.vocab,
            bytes_per_logit=sum(side.bytes_per_logit for side in sides) + beside,
            chunk_bytes=request.chunk_bytes,
            segment=min(side.segment for side in sides),
        )

    def run(self) -> list[Tensor]:
        """[values ``[N, D]``, *gradients that are needed]."""
        values = self.rows.weights.new_zeros(self.student.tokens, len(self.each))
        for rows in self.tiles.row_chunks():
            given = self.rows.at(rows)
            run = self._whole_rows if self.tiles.one_tile_per_row else self._by_vocabulary
            values[rows] = run(rows, given)
        if self.live is not None:
            everywhere = values.new_zeros(self.request.weights.shape)
            values = everywhere.index_copy_(0, self.live, values)
        return [values, *self.student.gradients()]

    def _tile(self, rows: slice, columns: slice, given: PerRow) -> Tile:
        student, teacher = self.student.tile(rows, columns), self.teacher.tile(rows, columns)
        none = self.each[0].parameters
        return Tile(
            student, teacher, given.labels, given.temperature, none, columns.start, self.request.vocab
        )

    def _whole_rows(self, rows: slice, given: PerRow) -> Tensor:
        columns, values = slice(0, self.request.vocab), []

        def fused(one: _One, tile: Tile, weights: Tensor, at: int, buffers: Gradients) -> None:
            values.append(one.backend.fused(tile, weights, one.spec, buffers)[:, Output.SOFT])

        self._backward(rows, columns, given, fused)
        return torch.stack(values, 1)

    def _by_vocabulary(self, rows: slice, given: PerRow) -> Tensor:
        states = [new_state(given.weights.shape[0], given.weights.device) for _ in self.each]
        folded = list(zip(self.each, states))
        for columns in self.tiles.column_chunks():
            tile = self._tile(rows, columns, given)
            for one, state in folded:
                one.backend.accumulate(tile._replace(parameters=one.parameters), one.spec, state)
        open_forms = [(one, state) for one, state in folded if one.spec.closed_form is None]
        for columns in self.tiles.column_chunks() if open_forms else ():
            tile = self._tile(rows, columns, given)
            for one, state in open_forms:
                one.backend.accumulate_value(tile._replace(parameters=one.parameters), one.spec, state)

        def gradient(one: _One, tile: Tile, weights: Tensor, at: int, buffers: Gradients) -> None:
            one.backend.gradient(tile, weights, one.spec, states[at], buffers)

        for columns in self.tiles.column_chunks() if self.student.needs_grad else ():
            self._backward(rows, columns, given, gradient)
        finished = [finish(state, one.spec, given.labels, self.request.vocab) for one, state in folded]
        return torch.stack([results[:, Output.SOFT] for results in finished], 1)

    def _backward(
        self,
        rows: slice,
        columns: slice,
        given: PerRow,
        run: Callable[[_One, Tile, Tensor, int, Gradients], None],
    ) -> None:
        """Let every divergence ``run`` on one tile. The last may write its gradient over the student's logits."""
        tile, last = self._tile(rows, columns, given), len(self.each) - 1
        mine = self.student.gradient_tile(tile.student, rows, columns)
        total: Tensor | None = None
        for at, one in enumerate(self.each):
            buffer = mine if mine is None or at == last else torch.empty_like(mine)
            weights = _only_soft(given.weights[:, at])
            run(one, tile._replace(parameters=one.parameters), weights, at, Gradients(buffer, None))
            if buffer is not None:
                total = buffer if total is None else buffer.add_(total)
        if total is not None:
            self.student.backward(total, rows, columns)


def _only_soft(weights: Tensor) -> Tensor:
    return torch.nn.functional.pad(weights[:, None], (Output.SOFT, OUTPUTS - Output.SOFT - 1))


def _first(specs: str) -> Spec:
    """The request of several divergences is that of the first, with the weights ``[N, D]`` of all."""
    return Spec.from_text(specs.split(";")[0])


def _compute(request: Request, specs: str, parameters: list[Tensor]) -> list[Tensor]:
    """[values ``[N, D]``, *gradients that are needed]."""
    each = [Spec.from_text(text) for text in specs.split(";")]
    if request.backend == "reference":
        weights = [_only_soft(column) for column in request.weights.unbind(1)]
        made = [
            reference.operator(replace(request, spec=spec, parameters=own, weights=w))
            for spec, own, w in zip(each, parameters, weights)
        ]
        values = torch.stack([results[:, Output.SOFT] for results, *_ in made], 1)
        return [values, *(torch.stack(grads).sum(0) for grads in zip(*(grads for _, *grads in made)))]
    buffers = Gradients(None, None)
    if not request.has_head and request.needs_grad[0]:
        buffers = Gradients(new_gradient(request.student[0], request.vocab), None)
    values, *gradients = _Walk(request, each, parameters, buffers).run()
    return [values, *(g.view(t.shape) for g, t in zip(gradients, request.wanted()))]


@torch.library.custom_op("kdkernels::several", mutates_args=())
def _several(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    temperature: Tensor,
    parameters: list[Tensor],
    weights: Tensor,
    specs: str,
    vocab: int,
    chunk_bytes: int,
    needs_grad: list[bool],
    gradient_tolerance: float,
    choice: Tensor | None = None,
) -> list[Tensor]:
    """[values ``[N, D]``, *gradients]; ``choice`` as in ``kdkernels::rows``."""
    backend = chosen_backend() if choice is None else CHOICES[int(choice)]
    given = student, teacher, labels, temperature, parameters[0], weights
    static = _first(specs), vocab, "", chunk_bytes
    request = Request(*given, *static, needs_grad, gradient_tolerance, backend)
    return _compute(request, specs, parameters)


@_several.register_fake
def _(
    student,
    teacher,
    labels,
    temperature,
    parameters,
    weights,
    specs,
    vocab,
    chunk_bytes,
    needs_grad,
    gradient_tolerance,
    choice=None,
):
    wanted = [t for t, needed in zip(student + teacher, needs_grad) if needed]
    return [torch.empty_like(weights)] + [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in wanted
    ]


@torch.library.custom_op("kdkernels::several_deferred", mutates_args=())
def _several_deferred(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    temperature: Tensor,
    parameters: list[Tensor],
    weights: Tensor,
    specs: str,
    vocab: int,
    chunk_bytes: int,
    needs_grad: list[bool],
    gradient_tolerance: float,
) -> tuple[Tensor, Tensor]:
    """(weights times divergences ``[N, D]`` fp64, the backend that served, as ``kdkernels::deferred`` tells it)."""
    backend = chosen_backend()
    given = student, teacher, labels, temperature, parameters[0], weights
    static = _first(specs), vocab, "", chunk_bytes
    request = Request(*given, *static, [False] * len(needs_grad), backend=backend)
    values = _compute(request, specs, parameters)[0]
    choice = torch.tensor(CHOICES.index(backend), dtype=torch.uint8, device="cpu")
    return torch.where(weights != 0, values * weights, 0.0), choice


@_several_deferred.register_fake
def _(
    student,
    teacher,
    labels,
    temperature,
    parameters,
    weights,
    specs,
    vocab,
    chunk_bytes,
    needs_grad,
    gradient_tolerance,
):
    return torch.empty_like(weights), torch.empty((), dtype=torch.uint8, device="cpu")


def _setup(ctx, inputs, output) -> None:
    student, teacher, labels, temperature, parameters, weights, *ctx.rest = inputs
    ctx.sizes = len(student), len(teacher), len(parameters)
    ctx.mark_non_differentiable(output[1])
    save_tensors(ctx, [output[1], labels, temperature, weights, *student, *teacher, *parameters])


def _backward(ctx, arriving, _):
    refuse_double_backward(tracing(arriving))
    refuse_batched(arriving)
    choice, labels, temperature, weights, *tensors = saved_tensors(ctx)
    n, m, d = ctx.sizes
    student, teacher, parameters = tensors[:n], tensors[n : n + m], tensors[n + m :]
    rest, needs_grad = ctx.rest, ctx.rest[-2]
    weights = torch.where(weights != 0, weights * arriving, 0.0)
    given = student, teacher, labels, temperature, parameters, weights
    made = iter(_several(*given, *rest, choice)[1:])
    grads = [next(made) if needed else None for needed in needs_grad]
    return (grads[:n], [None] * m, None, None, [None] * d) + (None,) * 6


_several_deferred.register_autograd(_backward, setup_context=_setup)


def checked_divergences(given: Any) -> tuple[Divergence, ...]:
    """One, or a tuple of them, each in its simplest form."""
    each = given if isinstance(given, tuple) else (given,)
    if not each:
        raise ValueError("divergence is an empty tuple; name one or more, such as (kd.ForwardKL(),)")
    return tuple(simplified(checked(divergence=divergence)["divergence"]) for divergence in each)


def check_several(terms: Terms, given: Tokens, teacher: Teacher, inplace: bool) -> None:
    """ValueError for what does not go with a tuple of divergences."""
    if given.reduction != "none":
        raise ValueError(
            f'a tuple of divergences is a tuple of token losses: reduction="none", not {given.reduction!r}'
        )
    names = {
        "hard_weight": terms.has_hard_term,
        "entropy_weight": bool(terms.asked & Asked.ENTROPY),
        "return_stats": terms.return_stats,
        "inplace": inplace,
    }
    if any(names.values()):
        raise ValueError(
            f"a tuple of divergences takes no {next(name for name in names if names[name])}; it is the soft term alone"
        )
    if not isinstance(terms.soft_weight, Tensor) and terms.soft_weight == 0:
        raise ValueError("a tuple of divergences is the soft term alone, but soft_weight=0")
    if isinstance(teacher, SparseTarget):
        raise ValueError(
            "a tuple of divergences needs a dense teacher, got a kd.SparseTarget; take one at a time"
        )


def losses(call: Call, divergences: tuple[Divergence, ...]) -> tuple[Tensor, ...]:
    """Each divergence of every token ``[...]``. ``call`` is that of one of them, with ``reduction="none"``."""
    request, reduction = call.request, call.reduction
    if request.shard:
        raise ValueError("a tuple of divergences of vocabulary shards is not built yet; take one at a time")
    specs = ";".join(request.spec._replace(kind=divergence.kind).text() for divergence in divergences)
    parameters = [tokens.constants(d.parameters, request.weights.device) for d in divergences]
    weights = request.weights[:, Output.SOFT, None].repeat(1, len(divergences))
    made, _ = _several_deferred(
        request.student,
        request.teacher,
        request.labels,
        request.temperature,
        parameters,
        weights,
        specs,
        request.vocab,
        request.chunk_bytes,
        request.needs_grad,
        request.gradient_tolerance,
    )
    return tuple(reduction.apply(values) for values in made.unbind(1))
