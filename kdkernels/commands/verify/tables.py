"""Outcomes as lines of text."""

from __future__ import annotations

from ...testing import Check
from .outcome import Outcome

LEGEND = """\
loss      |ours - oracle| of the worst row, in nats
gradient  |ours - oracle| / |oracle|, norms of whole tensors; the worst of them
plain     the same of the PyTorch formula in the same dtypes; ours may be twice that and a few ulp
"""
ERRORS = f"{'loss':>9}{'plain':>9}{'gradient':>10}{'plain':>9}{'problems':>10}"


def _errors(group: list[Outcome]) -> str:
    """The worst of these outcomes beside the plain formula's worst there; "" if all were skipped."""
    checks = [check for outcome in group for check in outcome.checks]
    if not checks:
        return ""
    loss = _worst([c for c in checks if c.what == "loss"])
    gradient = _worst([c for c in checks if c.what != "loss"])
    broken = sum(bool(outcome.broken) for outcome in group)
    count = sum(not outcome.skipped for outcome in group)
    return f"{loss}{gradient}{count:>9}  {f'{broken} BROKEN' if broken else 'ok'}"


def show(outcomes: list[Outcome]) -> None:
    """A problem's row, one a backend, over all divergences; below it what is broken."""
    for backend in dict.fromkeys(outcome.backend for outcome in outcomes):
        group = [outcome for outcome in outcomes if outcome.backend == backend]
        s = group[0].scenario
        if errors := _errors(group):
            print(
                f"{backend:<10}{s.label:<14}{str(s.dtype)[6:]:<10}{' from '.join(s.form):<20}{errors}",
                flush=True,
            )
    for outcome in outcomes:
        s = outcome.scenario
        for rule in outcome.broken:
            print(
                f"BROKEN {outcome.backend}, {s.about}, {s.dtype}, {'-'.join(s.form)}, {s.label}, "
                f"{s.options}: {rule}",
                flush=True,
            )


def table(outcomes: list[Outcome]) -> str:
    """The worst of each backend, divergence and dtype beside the plain formula's worst there."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        s = outcome.scenario
        groups.setdefault((outcome.backend, s.about, str(s.dtype)[6:]), []).append(outcome)
    order = list(dict.fromkeys(divergence for _, divergence, _ in groups))
    width = max(map(len, order), default=0) + 2
    lines = [f"{'backend':<10}{'divergence':<{width}}{'dtype':<10}{ERRORS}"]
    for key in sorted(groups, key=lambda k: (k[0], order.index(k[1]))):
        (backend, divergence, dtype), group = key, groups[key]
        if errors := _errors(group):
            lines.append(f"{backend:<10}{divergence:<{width}}{dtype:<10}{errors}")
    return "\n".join(lines)


def _worst(checks: list[Check]) -> str:
    ours = max(c.error for c in checks)
    plain = max((c.plain_error for c in checks if c.plain_error < float("inf")), default=float("nan"))
    return f"{ours:>9.1e}{plain:>9.1e} "
