"""Each variant's loss and gradient beside the fp64 oracle's, on a few of the case's tokens."""

from __future__ import annotations

import torch

import kdkernels as kd
from benchmarks.cases import Case
from benchmarks.inputs import Inputs, Step
from benchmarks.measure import what_went_wrong
from benchmarks.variants import Variant, our_loss
from kdkernels.testing import relative

#: Rows do not know of each other, so a few at the full vocabulary and width show the error of all.
TOKENS = 16
#: Beyond this a variant computes something else, and its time says nothing about this loss.
ANOTHER_LOSS = 0.5


def errors(case: Case, variants: list[Variant], device: str) -> list[dict]:
    """{"loss_error", "gradient_error"} of each variant (relative; the worst gradient), {} for floors."""
    torch.manual_seed(1)
    inputs = Inputs(case.shrunk(tokens=TOKENS), device)
    truths: dict[str, tuple] = {}
    made = []
    for variant in variants:
        if variant.is_floor:
            made.append({})
            continue
        if variant.loss not in truths:
            truths[variant.loss] = _oracle(inputs, variant.loss)
        try:
            made.append(_compare(variant, inputs, *truths[variant.loss]))
        except Exception as error:  # a peer's failure is a result, not the end of the run
            made.append({"problem": what_went_wrong(error)})
    return made


def _oracle(inputs: Inputs, loss: str) -> tuple[torch.Tensor, list]:
    step = Step(inputs.double())
    with kd.use_backend("reference"):
        value = our_loss(step, loss)
    value.backward()
    return value.detach(), step.gradients()


def _compare(variant: Variant, inputs: Inputs, truth: torch.Tensor, gradients: list) -> dict:
    step = Step(inputs, inplace=variant.inplace)
    value = variant.forward(step)
    value.backward()
    worst = 0.0
    for mine, true in zip(step.gradients(), gradients, strict=True):
        worst = max(worst, 1.0 if mine is None else relative(mine, true))
    inputs.restore()
    return {"loss_error": relative(value.detach(), truth), "gradient_error": worst}
