"""What a user of the typed surface writes; ``mypy --strict`` must find nothing in it. It is not run."""

import torch
from torch import Tensor

import kdkernels as kd


def step(hidden: Tensor, lm_head: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    student = kd.LinearHead(hidden, lm_head, softcap=30.0)
    target = kd.top_k_target(teacher_logits, 64, tail="bucket")
    loss: Tensor = kd.distillation_loss(student, target, labels, divergence=kd.JSD(0.5), hard_weight=0.5)
    both, stats = kd.codistillation_loss(student, teacher_logits, labels, return_stats=True)
    divergence: Tensor = kd.kl_div(hidden, teacher_logits, reduction="batchmean", temperature=2.0)
    hard: Tensor = kd.linear_cross_entropy(hidden, lm_head, labels, num_items=labels.numel())
    measures = kd.ForwardKL(), kd.Overlap()
    kl, overlap = kd.distillation_loss(student, teacher_logits, divergence=measures, reduction="none")
    ids = torch.cat([kd.top_k_target(hidden, 8).ids, target.ids], -1)
    reverse: Tensor = kd.distillation_loss(
        student, kd.target_at(teacher_logits, ids), divergence=kd.ReverseKL()
    )
    drawn: Tensor = kd.sampled_kl(kl, overlap, estimator="k2", gradient="value")
    hard = hard + reverse + drawn.sum()
    with kd.use_backend("eager"):
        agreement: Tensor = kd.js_divergence(student, target, beta=0.3, return_stats=True)[1].agreement
    return loss + both.student + both.teacher + divergence + hard, torch.stack([agreement, stats.tokens])


def refused(student: Tensor, teacher: Tensor) -> None:
    """With an error each: --strict complains of an ignore that nothing needs."""
    kd.kl_div(student, teacher, reduction="average")  # type: ignore[call-overload]
    kd.kl_div(student, teacher, temprature=2.0)  # type: ignore[call-overload]
    kd.linear_cross_entropy(student, teacher, student, z_los=1e-4)  # type: ignore[call-arg]
    kd.sampled_kl(student, teacher, estimator="k4")  # type: ignore[arg-type]
    kd.use_backend("natvie")  # type: ignore[arg-type]
    kd.top_k_target(teacher, 8, tail="buckets")  # type: ignore[arg-type]
    print(kd.distillation_loss(student, teacher).soft)  # type: ignore[attr-defined]
    kd.distillation_loss(student, teacher, return_stats=True).backward()  # type: ignore[attr-defined]
