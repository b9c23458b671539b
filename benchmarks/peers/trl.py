"""TRL: the distillation trainer's chunked divergence, and GKD's loss on full logits."""

from __future__ import annotations

import functools

from benchmarks.peers import installed

NAME = "trl"
BETAS = {"kl": 0.0, "rkl": 1.0, "jsd": 0.5}


def why_not(device: str) -> str | None:
    return installed.why_not("trl.trainer.distillation_trainer", device) or installed.why_not(
        "trl.experimental.gkd.gkd_trainer", device
    )


def _chunked(step, beta: float):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    (h, w), (th, tw) = step.student, step.teacher
    mask = step.labels[None] != -100
    loss, _, _ = _chunked_divergence_loss(h[None], th[None], w, tw, mask, beta)
    return loss


def _gkd(step, beta: float):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    s, t = step.logits()
    labels = None if step.mask is None else step.mask[None]
    # Without labels its batchmean divides by size(0): the tokens, given [N, V].
    if labels is None:
        return GKDTrainer.generalized_jsd_loss(s, t, beta=beta)
    return GKDTrainer.generalized_jsd_loss(s[None], t[None], labels, beta=beta)


def _chunked_log_probs(step, outputs: tuple[str, ...]):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    h, w = step.student
    masked = step.labels == -100
    given = h, w, None, step.labels.clamp(min=0), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
    log_probs, entropy, *_ = ChunkedLogProbFunction.apply(*given)
    loss = -log_probs.masked_fill(masked, 0.0).mean()
    return loss - 0.3 * entropy.masked_fill(masked, 0.0).mean() if outputs else loss


def variants(case):
    if case.width:
        yield "TRL chunked", "log-probs", functools.partial(_chunked_log_probs, outputs=())
        yield (
            "TRL chunked",
            "log-probs + entropy",
            functools.partial(_chunked_log_probs, outputs=("entropy",)),
        )
    for loss, beta in BETAS.items():
        yield "TRL GKD", loss, functools.partial(_gkd, beta=beta)
        if case.width:
            yield "TRL chunked", loss, functools.partial(_chunked, beta=beta)
