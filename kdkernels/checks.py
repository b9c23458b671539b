"""Checks of single arguments: one line that names the argument, what was given, and the way out.

TypeError where the kind of thing is wrong, ValueError where its value, shape, dtype or device is.
"""

from __future__ import annotations

import numbers
import operator
import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: What rows may be made of.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Numbers that a compiler does not know yet.
_UNKNOWN = (torch.SymInt, torch.SymFloat)
_LARGEST = sys.float_info.max


def shown(given: Any) -> str:
    """``given`` in a message: in full where that is short, else its type."""
    short = given is None or isinstance(given, (str, numbers.Number))
    return repr(given) if short else str(type(given))


def check_tensor(name: str, given: Any) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {shown(given)}")
    if given.is_nested:
        raise ValueError(
            f"{name} must be a dense Tensor, got a nested one; call .to_padded_tensor(0.0) and mask what is padding"
        )
    if given.layout != torch.strided:
        raise ValueError(f"{name} must be a dense Tensor, got layout {given.layout}; call .to_dense()")


def check_plain(name: str, given: Any) -> None:
    """A tensor that goes into an operator as it is."""
    check_tensor(name, given)
    if not torch.compiler.is_compiling() and hasattr(given, "to_local"):
        raise ValueError(
            f"{name} must be a plain Tensor, got a {type(given).__name__}; give {name}.to_local()"
        )
    _refuse_batched(name, given)


def is_wrapped(t: Tensor) -> bool:
    """Whether ``t`` is a tensor around others (quantized, perhaps), which computes its own products: none of
    torch.distributed's, of which a DTensor is one."""
    return is_traceable_wrapper_subclass(t) and not type(t).__module__.startswith("torch.distributed.")


def _refuse_batched(name: str, given: Tensor) -> None:
    if not torch.compiler.is_compiling() and _is_batched(given):
        raise RuntimeError(
            f"torch.func.vmap over {name} cannot see through kdkernels' operators; use leading dimensions"
        )


def _is_batched(t: Tensor) -> bool:
    """By torch.func.vmap, at any level of torch.func's."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def check_constant(name: str, given: Tensor) -> None:
    _refuse_batched(name, given)
    if given.requires_grad:
        raise ValueError(f"{name} requires grad, but it is a constant here and would get none; detach it")
    if not torch.compiler.is_compiling() and unpack_dual(given).tangent is not None:
        raise ValueError(
            f"{name} has a forward-mode tangent, but it is a constant here; give its primal alone"
        )


def check_number_tensor(name: str, given: Tensor) -> None:
    """A tensor of real numbers that are constants."""
    check_tensor(name, given)
    check_constant(name, given)
    if given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"{name} must be real numbers, got {given.dtype}")


def check_one_number(name: str, given: Tensor) -> None:
    """A tensor that stands for one real number."""
    check_constant(name, given)
    if given.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor {tuple(given.shape)}")
    if given.is_complex():
        raise ValueError(f"{name} must be a real number, got {given.dtype}")


def number(name: str, given: Any) -> Any:
    """``given`` as a finite Python number."""
    if isinstance(given, Tensor):
        check_one_number(name, given)
        given = given.item()
    if not isinstance(given, (numbers.Real, *_UNKNOWN)):
        raise TypeError(f"{name} must be a number, got {shown(given)}")
    if not isinstance(given, (int, float, *_UNKNOWN)):
        given = float(given)  # numpy would compare in the number's own dtype
    if not -_LARGEST <= given <= _LARGEST:
        raise ValueError(f"{name} must be a finite number, got {given}")
    return given


def integer(name: str, given: Any) -> int:
    """``given`` as an int of 64 bits."""
    if not isinstance(given, (int, torch.SymInt)):
        try:
            given = operator.index(given)
        except (TypeError, RuntimeError):
            raise TypeError(f"{name} must be an int, got {shown(given)}") from None
    if not -(2**63) <= given < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {given}")
    return given


def positive_integer(name: str, given: Any) -> int:
    given = integer(name, given)
    if not given > 0:
        raise ValueError(f"{name} must be > 0, got {given}")
    return given


def flag(name: str, given: Any) -> bool:
    if not isinstance(given, bool):
        raise TypeError(f"{name} must be True or False, got {shown(given)}")
    return given


def require(bad: Tensor, found: Tensor, message: str) -> None:
    """Where ``bad`` is true anywhere: on the CPU a ValueError, whose ``message`` is given the first such value of
    ``found`` and its token; on an accelerator a device-side assertion, because looking would stop the stream."""
    if bad.device.type != "cpu":
        torch._assert_async(~bad.any())
    elif bool(bad.any()):
        where = bad.nonzero()[0]
        value = found[tuple(where)].item()
        token = int(where[0]) if bad.dim() else 0
        raise ValueError(message.format(value if isinstance(value, int) else f"{value:.6g}", token))


def warn(message: str) -> None:
    """Once per line of the caller, which is the first frame outside this package and torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("kdkernels.", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
