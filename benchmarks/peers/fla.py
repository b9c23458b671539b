"""flash-linear-attention: KL and cross entropy fused with the lm_head."""

from __future__ import annotations

from benchmarks.peers import installed

NAME = "fla"


def why_not(device: str) -> str | None:
    return installed.why_not("fla.modules.fused_kl_div", device, needs_cuda=True)


def _kl(step):
    from fla.modules.fused_kl_div import FusedKLDivLoss

    (h, w), (th, tw) = step.student, step.teacher
    return FusedKLDivLoss()(h, th, w, tw)


def _ce(step):
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

    hidden, weight = step.student
    return FusedLinearCrossEntropyLoss()(hidden, step.labels, weight)


def variants(case):
    if case.width:
        yield "fla", "ce", _ce
        if not case.masked and not case.teacher_width:  # it takes no mask, and one width
            yield "fla", "kl", _kl
