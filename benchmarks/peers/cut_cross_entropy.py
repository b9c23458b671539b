"""Apple's cut-cross-entropy: the exact gradient, and its default that filters small entries."""

from __future__ import annotations

from benchmarks.peers import installed

NAME = "cut-cross-entropy"


def why_not(device: str) -> str | None:
    return installed.why_not("cut_cross_entropy", device, needs_cuda=True)


def _forward(step, **options):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(*step.student, step.labels, **options)


def variants(case):
    if case.width:
        yield "CCE", "ce", _forward
        yield "CCE exact", "ce", lambda step: _forward(step, filter_eps=None)
