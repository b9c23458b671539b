"""torchtune's losses on chunks of logits, loaded file by file: its package wants a torchao that peft refuses."""

from __future__ import annotations

import functools

import torch.nn.functional as F

from benchmarks.peers import installed
from benchmarks.peers.installed import original_module

NAME = "torchtune"
CHUNKS = 8


def why_not(device: str) -> str | None:
    return installed.missing(NAME)


@functools.cache
def _losses(file: str):
    return original_module(NAME, f"torchtune/modules/loss/{file}.py")


def _chunks(tensors):
    """[1, N / CHUNKS, V] each: given logits are cut, hidden states are cut and projected."""
    parts = tensors[0][None].chunk(CHUNKS, dim=1)
    return list(parts) if len(tensors) == 1 else [F.linear(part, tensors[1]) for part in parts]


def _soft(name: str):
    def forward(step):
        made = getattr(_losses("kd_losses"), name)(num_output_chunks=CHUNKS)
        return made(_chunks(step.student), _chunks(step.teacher), step.labels[None])

    return forward


def _hard(step):
    made = _losses("ce_chunked_output_loss").CEWithChunkedOutputLoss(num_output_chunks=CHUNKS)
    return made(_chunks(step.student), step.labels[None])


def variants(case):
    if case.tokens < CHUNKS:
        return
    yield "torchtune chunked", "kl", _soft("ForwardKLWithChunkedOutputLoss")
    yield "torchtune chunked", "rkl", _soft("ReverseKLWithChunkedOutputLoss")
    yield "torchtune chunked", "ce", _hard
