"""What a call says of its tokens: labels, masks, weights, and numbers that may differ by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_constant, check_plain
from ..divergences import Divergence
from .checked import checked_ids, checked_labels, checked_numbers
from .option_checks import Number
from .sides import Side


def _check_per_token(name: str, given: Any, student: Side) -> None:
    check_plain(name, given)
    if given.shape != student.leading:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}, the student's tokens {tuple(student.leading)}"
        )
    if given.device != student.device:
        raise ValueError(f"{name} is on {given.device}, student on {student.device}")


def _check_labels(labels: Any, student: Side) -> None:
    check_plain("labels", labels)
    if labels.is_floating_point() and labels.dim() > len(student.leading):
        raise ValueError(
            f"labels must be int64 class ids, got {labels.dtype} {tuple(labels.shape)}; "
            "probabilities are a teacher: kd.kl_div(student, probabilities.log())"
        )
    if labels.dtype == torch.bool:
        raise ValueError("labels must be int64 class ids, got torch.bool; a mask of tokens goes in mask=")
    _check_per_token("labels", labels, student)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")


def _check_mask(mask: Any, student: Side) -> None:
    _check_per_token("mask", mask, student)
    check_constant("mask", mask)
    if mask.is_complex():
        raise ValueError(f"mask must be bool or hold 0 and 1, got {mask.dtype}")


def live_labels(labels: Any, mask: Any, student: Side, vocab: int, ignore_index: int) -> Tensor | None:
    """int64 ``[N]``, -1 where a token takes no part; None where all do and nobody gave a label."""
    if labels is not None:
        _check_labels(labels, student)
    if mask is not None:
        _check_mask(mask, student)
    if labels is None and mask is None:
        return None
    return checked_labels(labels, mask, vocab, ignore_index)


def live_ids(ids: Any, student: Side, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(int64 ``[N, K]``, -1: none; labels ``[N]`` that are -1 where a token is masked) of ids ``[...]`` or ``[..., K]``."""
    check_plain("ids", ids)
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64, got {ids.dtype}")
    leading = tuple(student.leading)
    slots = (1,) if tuple(ids.shape) == leading else tuple(ids.shape[len(leading) :])
    if tuple(ids.shape[: len(leading)]) != leading or len(slots) != 1 or slots[0] == 0:
        raise ValueError(
            f"ids must be {leading} or {(*leading, 'K')} with K >= 1, as the student's tokens, got {tuple(ids.shape)}"
        )
    if ids.device != student.device:
        raise ValueError(f"ids are on {ids.device}, student on {student.device}")
    return checked_ids(ids.reshape(-1, slots[0]).contiguous(), vocab, ignore_index)


def token_weights(given: Any, student: Side, labels: Tensor | None, part: Tensor | None) -> Tensor | float:
    """fp64 ``[N]``, 0 where a token takes no part; 1.0 for all where nobody gave a weight or a label."""
    if given is None:
        return 1.0 if part is None else part.double()
    _check_per_token("token_weights", given, student)
    check_constant("token_weights", given)
    if given.is_complex():
        raise ValueError(f"token_weights must be real numbers, got {given.dtype}")
    weights = checked_numbers(given.reshape(-1), labels, "token_weights")
    return weights if part is None else torch.where(part, weights, 0.0)


def class_weights(given: Any, labels: Tensor, label_smoothing: float, vocab: int) -> Tensor:
    """The weight of each token's class, fp64 ``[N]``; 0 where it is masked."""
    check_plain("class_weights", given)
    check_constant("class_weights", given)
    if given.shape != (vocab,) or not given.is_floating_point():
        raise ValueError(
            f"class_weights must be floating [V] = ({vocab},), got {given.dtype} {tuple(given.shape)}"
        )
    if given.device != labels.device:
        raise ValueError(f"class_weights is on {given.device}, student on {labels.device}")
    if label_smoothing:
        raise ValueError(
            f"class_weights with label_smoothing={label_smoothing} weight every class of every token, "
            "which one pass does not; use torch.nn.functional.cross_entropy"
        )
    weights = checked_numbers(given.double()[labels.clamp(min=0)], labels, "class_weights")
    return torch.where(labels >= 0, weights, 0.0)


def constants(values: list[float] | tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers as fp64 ``[len(values)]``. Compiled code holds none of them: added to a zero, one stays a symbol
    that changes without another compilation. On an accelerator nothing is copied there and waited for."""
    if torch.compiler.is_compiling():
        return torch.stack([torch.zeros((), dtype=torch.float64, device=device) + value for value in values])
    made = torch.full((len(values),), float(values[0]), dtype=torch.float64, device=device)
    for i, value in enumerate(values):
        if value != values[0]:
            made[i].fill_(float(value))
    return made


def parameters(divergences: tuple[Divergence, ...], device: torch.device) -> Tensor:
    """fp64 ``[D, P]``: each divergence's numbers, with zeros behind those of the ones that have fewer."""
    own = [constants(divergence.parameters, device) for divergence in divergences]
    if len(own) == 1:
        return own[0][None]
    most = max(len(numbers) for numbers in own)
    return torch.stack([torch.nn.functional.pad(numbers, (0, most - len(numbers))) for numbers in own])


def factor(name: str, given: Number, student: Side, labels: Tensor | None) -> Number:
    """What fp64 weights are multiplied by: a Python float as it is, a tensor as in :func:`per_row`."""
    return per_row(name, given, student, labels) if isinstance(given, Tensor) else 1.0 * given


def per_row(name: str, given: Number, student: Side, labels: Tensor | None) -> Tensor:
    """A number as fp64 ``[1]``, or ``[N]`` where it differs by token. Out of range is an error as in
    :func:`checked_labels`."""
    if not isinstance(given, Tensor):
        return constants([given], student.device)
    if given.numel() != 1 or given.shape == student.leading:
        _check_per_token(name, given, student)
        return checked_numbers(given.reshape(-1), labels, name)
    if given.device != student.device and given.device.type != "cpu":
        raise ValueError(f"{name} is on {given.device}, student on {student.device}")
    return checked_numbers(given.reshape(1), None, name).to(student.device, non_blocking=True)
