"""The runs of :mod:`benchmarks.demo_sweep`: for each demo its parts, the most telling first."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

#: In a value: the demo's folder.
DEMO = "DEMO"
TEXT, TARGETS = f"{DEMO}/sweep/cache/text.jsonl", f"{DEMO}/sweep/cache/targets"

#: Students whose first weights are not scaled by their width -> their size.
NARROW_FOLDER = f"{DEMO}/sweep/sizes"
NARROW = {f"{NARROW_FOLDER}/{size}-with-0.02": size for size in ("tiny", "small")}


@dataclass(frozen=True)
class Run:
    """A stage of the demo with a few options changed; with none it is the demo's own."""

    way: str
    changed: dict[str, Any] = field(default_factory=dict)
    title: str = ""  #: in the table; without one the options stand there

    @property
    def name(self) -> str:
        """Of its folder and its row."""
        changed = self.title or "-".join(f"{name}-{value}" for name, value in self.changed.items())
        return re.sub(r"[^\w.]+", "-", f"{self.way}-{changed}").strip("-")


@dataclass(frozen=True)
class Part:
    """A table: what its first column is headed by, its runs, and what is shown of them (``report.COLUMNS``)."""

    title: str
    runs: list[Run]
    columns: tuple[str, ...] = ("validation loss",)

    @property
    def judged(self) -> bool:
        return "KL to teacher" in self.columns

    @property
    def options(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs if not run.title for name in run.changed))


WRITTEN = "teacher's loss on what it writes (greedy)"
JUDGED = ("validation loss", "KL to teacher", WRITTEN)
COST = ("tokens", "time", "peak memory")


def seeds(ways: tuple[str, ...]) -> Part:
    runs = [Run(way, {"seed": seed}) for seed in (42, 43, 44) for way in ways]
    return Part("mean ± standard deviation", runs, JUDGED)


FROM_SCRATCH = {
    "seeds": seeds(("plain", "soft", "longer", "hard", "co")),
    # Why a larger model can be behind at equal tokens: its first weights, learning rate, batch, or too few tokens.
    "sizes": Part(
        "students without a teacher",
        [
            Run(
                "plain",
                {
                    "student": student,
                    "learning_rate": rate,
                    "per_device_train_batch_size": batch,
                    "max_steps": steps,
                },
            )
            for student, rate, batch, steps in (
                ("tiny", 2e-3, 4, 200),
                ("small", 2e-3, 4, 200),
                (f"{NARROW_FOLDER}/tiny-with-0.02", 2e-3, 4, 200),
                (f"{NARROW_FOLDER}/small-with-0.02", 2e-3, 4, 200),
                ("small", 1e-3, 4, 200),
                ("small", 2e-3, 8, 100),
                ("tiny", 2e-3, 4, 400),
                ("small", 2e-3, 4, 400),
            )
        ],
        ("validation loss", "tokens", "time"),
    ),
    "schedules": Part(
        "soft weight",
        [
            Run("co", {"soft_schedule": name})
            for name in ("constant", "linear", "warmup_stable_decay", "teacher_loss")
        ],
    ),
    "rates": Part(
        "learning rate",
        [
            Run(way, {"learning_rate": rate, "warmup_steps": warmup})
            for way in ("plain", "soft", "hard", "co")
            for rate, warmup in ((1e-3, 0.1), (2e-3, 0.1), (3e-3, 0.1), (2e-3, 0))
        ],
    ),
}

#: Reverse KL on what the student writes. Its own text is not there to be imitated, so no cross entropy.
ON_POLICY = {"divergence": "reverse_kl", "hard_weight": 0.0}
#: Half as many steps again for a student that soft distillation has healed.
GOES_ON = {"student": f"{DEMO}/soft/model", "max_steps": 20, "learning_rate": 1e-4}

PRETRAINED = {
    "cache": Part(
        "soft",
        [
            Run("soft", {"data": [TEXT]}, "live teacher"),
            Run("soft", {"data": [TEXT], "teacher": None, "targets": TARGETS}, "from the cache"),
        ],
        ("validation loss", "KL to teacher", *COST),
    ),
    "co": Part("way", [Run("plain"), Run("soft"), Run("co")], (*JUDGED, *COST)),
    "on_policy": Part(
        "student",
        [
            Run("soft", title="soft"),
            Run(
                "on_policy", {**ON_POLICY, "student_share": 0.5}, "on-policy: it writes half of what it reads"
            ),
            Run("soft", GOES_ON, "20 more steps of soft after soft (their cost alone)"),
            Run(
                "on_policy", {**ON_POLICY, **GOES_ON}, "20 more steps on-policy after soft (their cost alone)"
            ),
            Run("on_policy", ON_POLICY, "on-policy: it writes all of it"),
        ],
        (*JUDGED, *COST),
    ),
    "rates": Part(
        "learning rate and mix",
        [
            Run(way, {"learning_rate": rate, **({} if weight is None else {"hard_weight": weight})})
            for way, rate, weight in (
                ("plain", 3e-4, None),
                ("soft", 3e-4, 1.0),
                ("soft", 3e-4, 0.0),
                ("plain", 1e-3, None),
                ("soft", 1e-3, 1.0),
                ("plain", 1e-4, None),
                ("soft", 1e-4, 1.0),
                ("soft", 1e-3, 0.0),
            )
        ],
        ("validation loss", "KL to teacher", WRITTEN),
    ),
    "seeds": seeds(("plain", "soft", "hard")),
}

PARTS = {"demo": FROM_SCRATCH, "demo-real": PRETRAINED}
