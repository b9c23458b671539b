"""axolotl's chunked top-k loss: stored log-probabilities against the student rescaled over the same ids."""

from __future__ import annotations

import functools
import sys
from types import ModuleType

import torch

from benchmarks.peers import installed
from benchmarks.peers.installed import original_module

NAME = "axolotl"


def why_not(device: str) -> str | None:
    return installed.missing(NAME)


@functools.cache
def axolotl_module() -> ModuleType:
    """axolotl's loss, whose package imports a whole trainer."""
    folder = "axolotl/integrations/kd"
    for package in ("axolotl", "axolotl.integrations", "axolotl.integrations.kd"):
        sys.modules.setdefault(package, ModuleType(package))
    original_module("axolotl", f"{folder}/utils.py", "axolotl.integrations.kd.utils")
    return original_module("axolotl", f"{folder}/kernels/liger.py")


def _top_k(step):
    target, (hidden, weight) = step.inputs.target, step.student
    loss = axolotl_module().LigerFusedLinearKLTopKLogprobLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, compute_ce_loss=False
    )
    logprobs = target.logprobs.log_softmax(-1)
    given = hidden, target.ids, logprobs, torch.ones_like(logprobs), step.labels
    return loss(weight, *(tensor[None] for tensor in given)) / step.case.tokens  # it sums


def variants(case):
    if case.top_k and case.width:
        yield "axolotl top-k", "kl conditional", _top_k
