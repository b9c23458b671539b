"""Tensors laid out in memory in every way that a caller's may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A view ``of`` a larger tensor of the shape ``around(shape)`` that has ``shape``."""

    around: Callable[[Shape], Shape]
    of: Callable[[Tensor, Shape], Tensor]


def _reversed(shape: Shape) -> Shape:
    return tuple(reversed(shape))


def _offset(memory: Tensor, shape: Shape) -> Tensor:
    return memory[3 : 3 + math.prod(shape)].view(shape)


LAYOUTS = {
    "contiguous": Layout(lambda shape: shape, lambda t, shape: t),
    "offset": Layout(lambda shape: (math.prod(shape) + 3,), _offset),
    "strided": Layout(lambda shape: (*shape[:-1], 2 * shape[-1]), lambda t, shape: t[..., ::2]),
    "every other row": Layout(lambda shape: (2 * shape[0], *shape[1:]), lambda t, shape: t[::2]),
    "cut": Layout(lambda shape: (*shape[:-1], shape[-1] + 3), lambda t, shape: t[..., 1 : shape[-1] + 1]),
    "transposed": Layout(_reversed, lambda t, shape: t.permute(*reversed(range(t.dim())))),
}


@dataclass
class Laid:
    """Values in a layout: ``memory`` is what holds them, ``view`` (of it or of a copy) what a call is given."""

    memory: Tensor
    layout: str
    shape: Shape

    @classmethod
    def out(cls, values: Tensor, layout: str, unused: float) -> Laid:
        """``values`` laid out, with ``unused`` wherever the memory holds nothing of them."""
        layout = layout if values.dim() else "contiguous"
        shape = tuple(values.shape)
        memory = torch.full(LAYOUTS[layout].around(shape), unused, dtype=values.dtype)
        laid = cls(memory, layout, shape)
        laid.view(memory).copy_(values)
        return laid

    def view(self, memory: Tensor) -> Tensor:
        return LAYOUTS[self.layout].of(memory, self.shape)


def expanded(values: Tensor, dim: int) -> Tensor:
    """The first slice along ``dim`` everywhere, in the memory of one."""
    return values.narrow(dim, 0, 1).expand(values.shape) if values.numel() else values
