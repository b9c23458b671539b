"""quack: cross entropy from logits, and chunked over the lm_head's product."""

from __future__ import annotations

from benchmarks.peers import installed

NAME = "quack"


def why_not(device: str) -> str | None:
    return installed.why_not("quack.cross_entropy", device, needs_cuda=True)


def _logits(step):
    from quack.cross_entropy import cross_entropy

    return cross_entropy(step.student[0], step.labels)


def _hidden(step):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(*step.student, step.labels)


def variants(case):
    yield ("quack chunked", "ce", _hidden) if case.width else ("quack", "ce", _logits)
