"""torchtune's losses on chunks of logits."""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.peers import installed

NAME = "torchtune"
CHUNKS = 8


def why_not(device: str) -> str | None:
    return installed.why_not("torchtune.modules.loss", device)


def _chunks(tensors):
    """[1, N / CHUNKS, V] each: given logits are cut, hidden states are cut and projected."""
    parts = tensors[0][None].chunk(CHUNKS, dim=1)
    return list(parts) if len(tensors) == 1 else [F.linear(part, tensors[1]) for part in parts]


def _soft(name: str):
    def forward(step):
        from torchtune.modules import loss

        made = getattr(loss, name)(num_output_chunks=CHUNKS)
        return made(_chunks(step.student), _chunks(step.teacher), step.labels[None])

    return forward


def _hard(step):
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    return CEWithChunkedOutputLoss(num_output_chunks=CHUNKS)(_chunks(step.student), step.labels[None])


def variants(case):
    if case.tokens < CHUNKS:
        return
    yield "torchtune chunked", "kl", _soft("ForwardKLWithChunkedOutputLoss")
    yield "torchtune chunked", "rkl", _soft("ReverseKLWithChunkedOutputLoss")
    yield "torchtune chunked", "ce", _hard
