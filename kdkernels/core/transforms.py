"""What goes on around a call: compilers, torch.func, forward mode, backwards of backwards; and what of it is refused."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ..backends import reference_asked


def tracing(t: Tensor) -> bool:
    """Whether a compiler follows along: then nothing may depend on values or be overwritten."""
    return torch.compiler.is_compiling() or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def batched(t: Tensor) -> bool:
    """Whether ``t`` stands for many backwards at once, by is_grads_batched (torch's old vmap) or torch.func.vmap."""
    return torch._C._functorch.is_legacy_batchedtensor(t) or torch._C._functorch.is_functorch_wrapped_tensor(
        t
    )


def refuse_transforms(tensors: list[Tensor], *, has_reference: bool = True) -> None:
    """What cannot see through an operator; torch's own errors would not say whose operator it is."""
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record kdkernels; torch.export.export and torch.compile can"
        )
    if has_reference and reference_asked():
        return
    if any(unpack_dual(t).tangent is not None for t in tensors):
        has = "; kd.use_backend('reference') has" if has_reference else " here"
        raise RuntimeError(f"kdkernels has no forward-mode derivative{has}")
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        other = ", or kd.use_backend('reference')" if has_reference else ""
        raise RuntimeError(
            "torch.func (grad, vmap, jacrev, ...) cannot transform kdkernels' operators; use torch.autograd.grad, "
            f"which takes is_grads_batched=True, and leading dimensions for vmap's{other}"
        )


def refuse_double_backward(compiling: bool) -> None:
    if torch.is_grad_enabled() and not compiling:
        raise RuntimeError(
            "kdkernels' gradient is made in the forward and cannot be differentiated again "
            "(create_graph=True); a loss or token_log_probs under kd.use_backend('reference') can"
        )


def refuse_batched(arriving: Tensor) -> None:
    if batched(arriving):
        raise RuntimeError(
            "kdkernels takes gradients that are made in the backward one at a time; without is_grads_batched=True or "
            "vmap, or with kd.use_backend('reference')"
        )
