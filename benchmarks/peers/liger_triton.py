"""Liger's Triton kernels: KL and JSD from logits; JSD, KL and cross entropy fused with the lm_head."""

from __future__ import annotations

from benchmarks.peers import installed

NAME = "liger triton"


def why_not(device: str) -> str | None:
    return installed.why_not("liger_kernel.transformers", device, needs_cuda=True)


def _kl(step):
    from liger_kernel.transformers import LigerKLDIVLoss

    s, t = (z.log_softmax(-1) for z in step.logits())
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(s, t)


def _jsd(step):
    from liger_kernel.transformers import LigerJSD

    s, t = (z.log_softmax(-1) for z in step.logits())
    return LigerJSD(beta=0.5)(s, t, step.mask)


def _linear_jsd(step):
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.5)(*step.student, *step.teacher, step.mask)


def _linear_kl(step):
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    teacher = step.logits()[1].softmax(-1)  # it takes probabilities: the teacher's are made in full
    return LigerFusedLinearKLDivLoss()(*step.student, teacher, step.mask)


def _linear_ce(step):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden, weight = step.student
    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, step.labels)


def variants(case):
    if case.width:
        yield "Liger fused linear JSD", "jsd", _linear_jsd
        yield "Liger fused linear KL", "kl", _linear_kl
        yield "Liger FLCE", "ce", _linear_ce
    else:
        yield "Liger JSD", "jsd", _jsd
        if not case.masked:  # it takes no mask
            yield "Liger KLDiv", "kl", _kl
