"""Liger's losses that need no GPU: fused linear JSD with beta 0, 1 and 1/2 in chunks of PyTorch, and log-probabilities."""

from __future__ import annotations

import functools

from benchmarks.peers import installed

NAME = "liger chunked"
BETAS = {"kl": 0.0, "rkl": 1.0, "jsd": 0.5}


def why_not(device: str) -> str | None:
    return installed.why_not("liger_kernel.chunked_loss", device)


def _chunked(step, beta: float, compiled: bool):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
    return loss(*step.student, *step.teacher, step.labels)


@functools.cache
def _scaled():
    path = "liger_kernel/ops/fused_linear_scaled_cross_entropy.py"
    return installed.original_module("liger-kernel", path)


def _log_probs(step, entropy: bool):
    function = _scaled().LigerFusedLinearScaledCrossEntropyFunction
    made = function.apply(*step.student, step.labels, return_entropy=entropy)
    return made[0].mean() - 0.3 * made[1].mean() if entropy else made.mean()


def variants(case):
    if not case.width:
        return
    yield "Liger scaled CE", "log-probs", functools.partial(_log_probs, entropy=False)
    yield "Liger scaled CE", "log-probs + entropy", functools.partial(_log_probs, entropy=True)
    for loss, beta in BETAS.items():
        yield "Liger chunked", loss, functools.partial(_chunked, beta=beta, compiled=False)
        if loss in case.compiled:
            yield "Liger chunked compiled", loss, functools.partial(_chunked, beta=beta, compiled=True)
