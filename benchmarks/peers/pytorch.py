"""``torch.nn.functional.linear_cross_entropy``, PyTorch's own chunked cross entropy (torch >= 2.13)."""

from __future__ import annotations

import torch.nn.functional as F

NAME = "torch linear_cross_entropy"
POLICIES = ("accurate", "compact")  # beside "auto", which picks one of three by device and dtype
MANY_TOKENS = 1024  # for fewer its documentation advises against chunking: one variant will do


def why_not(device: str) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else "this torch has no linear_cross_entropy"


def variants(case):
    if not case.width:
        return

    def forward(step, **options):
        from torch.nn import LinearCrossEntropyOptions

        given = LinearCrossEntropyOptions(**options)
        return F.linear_cross_entropy(*step.student, step.labels, options=given)

    yield "F.linear_cross_entropy", "ce", forward
    for policy in POLICIES if case.tokens >= MANY_TOKENS else ():
        run = lambda step, policy=policy: forward(step, acc_policy=policy)  # noqa: E731
        yield f"F.linear_cross_entropy {policy}", "ce", run
