"""Single options: each is checked by its name, wherever it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from torch import Tensor

from ..checks import check_number_tensor, check_one_number, flag, integer, number, positive_integer, shown
from ..divergences import JSD, Divergence, simplified
from ..options import Reduction

REDUCTIONS = get_args(Reduction)
#: A number that may change while training: Python's, or a tensor with one entry or one for each token.
Number = float | Tensor


#: Beyond them fp32 has no room for the square of a logit that is divided by the temperature, or for T^2.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-12, 1e12
TEMPERATURES = f"[{LEAST_TEMPERATURE:g}, {MOST_TEMPERATURE:g}]"


def _divergence(name: str, given: Any) -> Divergence:
    """The divergence, checked, in its simplest form."""
    if isinstance(given, type) and issubclass(given, Divergence):
        raise TypeError(f"{name} must be a divergence, not its class; write kd.{given.__name__}(...)")
    if not isinstance(given, Divergence):
        raise TypeError(f"{name} must be a kd.Divergence such as kd.ForwardKL(), got {shown(given)}")
    given.check()
    return simplified(given)


def _number_or_tensor(name: str, given: Any) -> Number:
    if isinstance(given, Tensor):
        check_number_tensor(name, given)  # checked_numbers looks at its values
        return given
    return number(name, given)


def _temperature(name: str, given: Any) -> Number:
    given = _number_or_tensor(name, given)
    if not isinstance(given, Tensor) and not given > 0:
        raise ValueError(f"{name} must be > 0 and finite, got {given}")
    if not isinstance(given, Tensor) and not LEAST_TEMPERATURE <= given <= MOST_TEMPERATURE:
        raise ValueError(f"{name} must be in {TEMPERATURES}, got {float(given)}")
    return given


def _label_smoothing(name: str, given: Any) -> float:
    given = number(name, given)
    if not 0.0 <= given <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {given}")
    return given


def _gradient_tolerance(name: str, given: Any) -> float:
    given = number(name, given)
    if not 0.0 <= given < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {given}; 0 is exact")
    return given


def _reduction(name: str, given: Any) -> str:
    if given not in REDUCTIONS:
        raise ValueError(f"unknown {name} {shown(given)}; there are {', '.join(REDUCTIONS)}")
    return given


def _num_items(name: str, given: Any) -> int | float | Tensor | None:
    if isinstance(given, Tensor):
        check_one_number(name, given)
        return given  # checked_items looks at its value
    if given is None:
        return None
    given = number(name, given)
    if not given > 0:
        raise ValueError(f"{name} must be > 0, got {given}")
    return given


def _optional(check: Callable[[str, Any], int]) -> Callable[[str, Any], int | None]:
    return lambda name, given: None if given is None else check(name, given)


_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "divergence": _divergence,
    "beta": lambda name, given: JSD(given),
    "temperature": _temperature,
    "temperature_squared": flag,
    "entropy": flag,
    "soft_weight": _number_or_tensor,
    "hard_weight": _number_or_tensor,
    "entropy_weight": _number_or_tensor,
    "label_smoothing": _label_smoothing,
    "z_loss": number,
    "reduction": _reduction,
    "num_items": _num_items,
    "ignore_index": integer,
    "vocab_size": _optional(positive_integer),
    "inplace": flag,
    "return_stats": flag,
    "chunk_bytes": _optional(positive_integer),
    "gradient_tolerance": _gradient_tolerance,
}


def checked(**options) -> dict[str, Any]:
    """The same options, each checked by what its name stands for."""
    return {name: _OPTIONS[name](name, given) for name, given in options.items()}


def checked_divergence(given: Any) -> Divergence:
    """The divergence, checked, in its simplest form."""
    return _divergence("divergence", given)


def check_options(options: dict[str, Any]) -> None:
    """Checks the options that do not depend on the call's tensors."""
    checked(**{name: given for name, given in options.items() if name in _OPTIONS})
