"""How operators are defined."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("kdkernels", "FRAGMENT")
_untraced = functools.cache(torch.compiler.disable)


def _own_dtypes(given: tuple) -> contextlib.AbstractContextManager:
    """Autocast off: callers have already cast an operator's tensors as it asks, and a backward that runs inside of autocast
    must multiply in the dtypes that its forward had."""
    device = next(
        t for one in given for t in (one if isinstance(one, list) else [one]) if isinstance(t, Tensor)
    ).device
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def operator(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """Makes ``kdkernels::name`` of a function, for tensors on any device.

    torch.library.custom_op does this too, but imports torch's compiler at its first call, which takes seconds, and each call
    costs more. ``torch.library.register_autograd`` gives an operator a derivative. A torch.autograd.Function around it
    would be shorter, but exported programs lose that.
    """

    def define(function: Callable) -> Any:
        def run(*given: Any) -> Any:
            # Where torch's compiler is at work it traces all Python that runs. This is beneath an operator, which is what
            # its graphs hold.
            called = _untraced(function) if "torch._dynamo" in sys.modules else function
            with torch.no_grad(), _own_dtypes(given):
                return called(*given)

        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        op = getattr(torch.ops.kdkernels, name).default
        if mutates_args:
            _library.impl(name, _marking(op, mutates_args), "ADInplaceOrView", with_keyset=True)
        return op

    return define


def _marking(op: Any, mutates_args: tuple[str, ...]) -> Callable[..., Any]:
    """Counts a write to each argument that ``op`` overwrites, so that autograd refuses a backward that needs what was
    there. Kernels write through pointers, which nobody counts."""
    places = [at for at, argument in enumerate(op._schema.arguments) if argument.name in mutates_args]

    def mark(keyset: Any, *given: Any) -> Any:
        for at in places:
            torch.autograd.graph.increment_version(given[at])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *given)

    return mark
