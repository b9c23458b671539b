"""verl: log-probabilities and entropies from hidden states, in chunks of tokens. It computes both whatever is asked for."""

from __future__ import annotations

import functools

from benchmarks.peers import installed

NAME = "verl"


def why_not(device: str) -> str | None:
    return installed.missing("verl")


@functools.cache
def _module():
    return installed.original_module("verl", "verl/utils/experimental/torch_functional.py")


def _fused(step, entropy: bool):
    masked = step.labels == -100
    log_probs, entropies = _module().FusedLinearForPPO()(*step.student, step.labels.clamp(min=0))
    loss = -log_probs.masked_fill(masked, 0.0).mean()
    return loss - 0.3 * entropies.masked_fill(masked, 0.0).mean() if entropy else loss


def variants(case):
    if case.width:
        yield "verl chunked", "log-probs", functools.partial(_fused, entropy=False)
        yield "verl chunked", "log-probs + entropy", functools.partial(_fused, entropy=True)
