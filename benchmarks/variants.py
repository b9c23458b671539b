"""Who is measured on a case: kdkernels, plain PyTorch, the floors, and the peers.

A :class:`Variant` is one way to compute one loss; ``forward`` takes a :class:`~benchmarks.inputs.Step`
and returns the scalar mean over the unmasked tokens, whose backward gives the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from benchmarks import peers
from benchmarks.cases import LOSSES, POLICY, SOFT, Case
from benchmarks.inputs import Step
from kdkernels.backends import native
from kdkernels.backends.spec import Spec

OURS = "kdkernels"


@dataclass(frozen=True)
class Variant:
    """``floor`` is the label of the floor it is compared with. A floor itself has none, and no backward.
    ``one_shape``: it is compiled for every shape that it meets.
    """

    label: str
    loss: str
    forward: Callable[[Step], Any]
    package: str
    floor: str = ""
    inplace: bool = False
    one_shape: bool = False

    @property
    def is_floor(self) -> bool:
        return not self.floor

    @property
    def key(self) -> tuple[str, str]:
        return self.label, self.loss


def policy_ids(step: Step, loss: str) -> Tensor:
    if not loss.endswith("of 20"):
        return step.labels
    others = step.labels[:, None] + 37 * torch.arange(20, device=step.labels.device)
    return torch.where(step.labels[:, None] == -100, -100, others % step.case.vocab)


def policy_loss(step: Step, loss: str, **options) -> Tensor:
    """Of token log-probabilities, and an entropy where the loss has one."""
    entropy = loss.endswith("entropy")
    ids = policy_ids(step, loss)
    made = kd.token_log_probs(step.sides()[0], ids, entropy=entropy, **options)
    return -made.log_probs.mean() - (0.3 * made.entropy.mean() if made.entropy is not None else 0.0)


def plain_policy(step: Step, loss: str) -> Tensor:
    """The same from full log-probabilities."""
    log_q, ids = step.student_logits().log_softmax(-1), policy_ids(step, loss)
    live, asked = step.labels != -100, ids if ids.dim() > 1 else ids[:, None]
    found = log_q.gather(1, asked.clamp(min=0)).float() * live[:, None]
    if not loss.endswith("entropy"):
        return -found.mean()
    entropy = -(log_q.exp() * log_q).sum(-1).float() * live
    return -found.mean() - 0.3 * entropy.mean()


def our_loss(step: Step, loss: str, **options) -> Tensor:
    """The loss as kdkernels has it; under ``kd.use_backend("reference")`` also the oracle."""
    student, teacher = step.sides()
    if loss == "kl conditional":
        assert isinstance(teacher, kd.SparseTarget)
        teacher = replace(teacher, tail="conditional")
    if loss in POLICY:
        return policy_loss(step, loss, **options)
    divergence = LOSSES[loss]
    if divergence is None:
        return kd.cross_entropy(student, step.labels, **options)
    if loss == "codistill":
        both = kd.codistillation_loss(student, teacher, step.labels, divergence=divergence, **options)
        return both.student + both.teacher
    return kd.distillation_loss(student, teacher, step.mask, divergence=divergence, **options)


def two_losses(step: Step) -> Tensor:
    """Co-distillation without the one pass: each model's loss on its own."""
    student, teacher = step.sides()
    own = kd.distillation_loss(student, teacher, step.labels, hard_weight=1.0)
    return own + kd.cross_entropy(teacher, step.labels)


def plain_sparse(step: Step, loss: str) -> Tensor:
    """Forward KL to the stored entries and one bucket for the rest, gathered from full log-probabilities,
    or to the stored entries alone."""
    assert step.inputs.target is not None and step.inputs.target.logprobs is not None
    log_t = step.inputs.target.logprobs
    if loss == "kl conditional":
        return eager_kl(step.student_logits().gather(1, step.inputs.target.ids).float(), log_t)
    log_q = step.student_logits().log_softmax(-1).gather(1, step.inputs.target.ids).float()
    rest_t, rest_q = (1 - z.exp().sum(-1) for z in (log_t, log_q))
    return ((log_t.exp() * (log_t - log_q)).sum(-1) + rest_t * (rest_t.log() - rest_q.log())).mean()


def plain_loss(step: Step, loss: str) -> Tensor:
    """What a trainer writes in plain PyTorch, on full logits."""
    if loss in POLICY:
        return plain_policy(step, loss)
    if step.case.top_k:
        return plain_sparse(step, loss)
    return plain_from_logits(*step.logits(), step.labels if loss in ("ce", "codistill") else step.mask, loss)


def eager_kl(s: Tensor, t: Tensor) -> Tensor:
    """F.kl_div as it is meant to be called on logits: forward KL, mean over the tokens."""
    return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")


def plain_from_logits(s: Tensor, t: Tensor, labels: Tensor | None, loss: str) -> Tensor:
    if loss == "ce":
        return F.cross_entropy(s, labels)
    if loss == "codistill":
        return eager_kl(s, t.detach()) + F.cross_entropy(s, labels) + F.cross_entropy(t, labels)
    if labels is not None:
        s, t = s[labels != -100], t[labels != -100]
    if loss == "kl":
        return eager_kl(s, t)
    if loss == "rkl":
        return eager_kl(t, s)
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return sum(F.kl_div(log_m, x, log_target=True, reduction="batchmean") for x in (log_p, log_q)) / 2


def _names(case: Case, loss: str) -> str:
    if case.top_k or loss in POLICY:
        return "log_softmax, gather"
    return {
        "ce": "F.cross_entropy",
        "jsd": "F.kl_div to mixture",
        "codistill": "F.kl_div, F.cross_entropy",
    }.get(loss, "F.kl_div")


def _plain(case: Case) -> list[Variant]:
    made = [
        Variant(_names(case, loss), loss, lambda step, loss=loss: plain_loss(step, loss), "torch")
        for loss in case.losses
        if case.plain is None or loss in case.plain
    ]
    for loss in case.compiled:
        compiled = torch.compile(plain_from_logits, dynamic=False)

        def forward(step: Step, loss: str = loss, compiled=compiled) -> Tensor:
            return compiled(*step.logits(), step.labels if loss == "ce" else step.mask, loss)

        made.append(Variant(f"{_names(case, loss)} compiled", loss, forward, "torch", one_shape=True))
    return made


def _ours(case: Case) -> list[Variant]:
    made = [Variant(OURS, loss, lambda step, loss=loss: our_loss(step, loss), OURS) for loss in case.losses]
    if not case.width:
        made += [
            Variant(
                f"{OURS} in place",
                loss,
                lambda step, loss=loss: our_loss(step, loss, inplace=True),
                OURS,
                inplace=True,
            )
            for loss in case.losses
        ]
    if case.spectrum != "random":
        made += [
            Variant(
                f"{OURS}, tolerance 2^-8",
                loss,
                lambda step, loss=loss: our_loss(step, loss, gradient_tolerance=2.0**-8),
                OURS,
            )
            for loss in case.losses
        ]
    if "codistill" in case.losses:
        made.append(Variant(f"{OURS}, two losses", "codistill", two_losses, OURS))
    return made


def _by_triton(case: Case) -> list[Variant]:
    """The other backend of a GPU, where the C++ kernels are built: the same calls."""

    def forward(step: Step, loss: str, **options) -> Tensor:
        with kd.use_backend("triton"):
            return our_loss(step, loss, **options)

    forms = [(f"{OURS} triton", False)] + ([] if case.width else [(f"{OURS} triton in place", True)])
    return [
        Variant(
            label,
            loss,
            partial(forward, loss=loss, **({"inplace": True} if inplace else {})),
            OURS,
            inplace=inplace,
        )
        for label, inplace in forms
        for loss in case.losses
    ]


def _needs_teacher(case: Case, loss: str) -> bool:
    return loss in SOFT and not case.top_k


def _gemm_count(case: Case, loss: str) -> int:
    if loss == "codistill":
        return 6
    if loss in POLICY:  # its gradient is made in the backward, from another projection or a saved product
        return 2 + loss.endswith("entropy") if case.frozen_head else 4
    return 2 + _needs_teacher(case, loss) + (not case.frozen_head)


def _gemms(case: Case, loss: str) -> Callable[[Step], Any]:
    """The projections and gradients that no schedule can avoid, over the unmasked tokens."""
    cache: dict[str, Tensor] = {}

    def forward(step: Step) -> Any:
        n = case.live_tokens
        h, w = step.inputs.student
        h = h[:n]
        if "g" not in cache:
            cache["g"] = torch.ones(n, case.vocab, dtype=h.dtype, device=h.device)
        g = cache["g"]
        made = [h @ w.t(), g @ w]
        if _needs_teacher(case, loss) or loss == "codistill":
            th, tw = step.inputs.teacher
            th = th[:n]
            made.append(th @ tw.t())
        if not case.frozen_head:
            made.append(g.t() @ h)
        if loss == "codistill":
            made += [g @ tw, g.t() @ th]
        if loss in POLICY and not case.frozen_head:
            made.append(h @ w.t())
        elif loss in POLICY and loss.endswith("entropy"):
            made.append(g @ w)
        return made

    return forward


def floor_of(case: Case, loss: str, inplace: bool) -> str:
    if case.width:
        return f"{_gemm_count(case, loss)} GEMMs"
    if not _needs_teacher(case, loss):
        return "copy(out=g)" if inplace else "clone"
    return "add(out=g)" if inplace else "add"


def _floors(case: Case, loss: str) -> list[Variant]:
    """What the hardware needs for ``loss``: DESIGN's section on floors."""
    if case.width:
        return [Variant(floor_of(case, loss, False), "floor", _gemms(case, loss), "torch")]
    cache: dict[str, Tensor] = {}

    alone = not _needs_teacher(case, loss)

    def into(step: Step) -> Tensor:
        s = step.inputs.student[0]
        if "g" not in cache:
            cache["g"] = torch.empty_like(s)
        return cache["g"].copy_(s) if alone else torch.add(s, step.inputs.teacher[0], out=cache["g"])

    def fresh(step: Step) -> Tensor:
        s = step.inputs.student[0]
        return s.clone() if alone else torch.add(s, step.inputs.teacher[0])

    names = floor_of(case, loss, True), floor_of(case, loss, False)
    return [Variant(name, "floor", run, "torch") for name, run in zip(names, (into, fresh))]


def variants_of(case: Case, device: str) -> tuple[list[Variant], dict[str, str]]:
    """(floors first, then everyone who can compute the case's losses; who cannot, and why)."""
    floors = {f.label: f for loss in case.losses for f in _floors(case, loss)}
    made = _ours(case) + _plain(case)
    if device == "cuda" and native.cannot(torch.device(device), [case.torch_dtype], Spec()) is None:
        made += _by_triton(case)
    skipped = {}
    families = peers.SPARSE_FAMILIES if case.top_k else peers.FAMILIES
    for family in families if case.peers else ():
        reason = family.why_not(device)
        if reason:
            skipped[family.NAME] = reason
            continue
        for label, loss, forward in family.variants(case):
            if loss in case.losses:
                made.append(Variant(label, loss, forward, family.NAME, one_shape="compiled" in label))
    held = [replace(v, floor=floor_of(case, v.loss, v.inplace)) for v in made]
    return [*floors.values(), *held], skipped
