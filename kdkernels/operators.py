"""How operators are defined."""

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

    torch.library.custom_op would do. It imports torch's compiler at its first call, which takes seconds, and a call of an
    operator without a derivative takes 27 us more. ``torch.library.register_autograd`` gives it one, which exported and
    compiled graphs keep; a torch.autograd.Function would be lost in the former.
    """

    def define(function: Callable) -> Any:
        def run(*given: Any) -> Any:
            # The compiler follows what Python runs, and would follow it, beneath a dispatcher that it does not see.
            called = _untraced(function) if "torch._dynamo" in sys.modules else function
            with torch.no_grad():
                return called(*given)

        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        return getattr(torch.ops.kdkernels, name).default

    return define
