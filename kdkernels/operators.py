"""How operators are defined. None has a derivative of its own: what has one is a torch.autograd.Function of operators."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("kdkernels", "FRAGMENT")
_untraced = functools.cache(torch.compiler.disable)


def operator(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """Makes ``kdkernels::name`` of a function, for tensors on any device.

    torch.library.custom_op would do. It has room for a derivative and imports torch's compiler at its first call: 27 us
    for each call, and seconds for the first.
    """

    def define(function: Callable) -> Any:
        def run(*given: Any) -> Any:
            # The compiler follows what Python runs, and would follow this, beneath a dispatcher that it does not see.
            called = _untraced(function) if "torch._dynamo" in sys.modules else function
            with torch.no_grad():
                return called(*given)

        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        return getattr(torch.ops.kdkernels, name).default

    return define
