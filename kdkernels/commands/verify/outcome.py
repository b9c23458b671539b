"""What a backend makes of a scenario, beside the oracle and the plain PyTorch formula."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...backends import BackendName, by_name, use_backend
from ...backends.spec import Spec
from ...divergences import ForwardKL
from ...losses import distillation_loss
from ...testing import Check, Problem, Result, compare
from .scenario import FUNCTIONS, Scenario


@dataclass(frozen=True)
class Outcome:
    """What one backend made of one scenario; ``broken`` says which rule it breaks, if any."""

    backend: str
    scenario: Scenario
    checks: list[Check]
    broken: list[str]
    skipped: str | None = None

    def record(self) -> dict[str, Any]:
        s = self.scenario
        options = {k: str(v) if isinstance(v, Tensor) else v for k, v in s.options.items()}
        return {
            "backend": self.backend,
            "case": s.label,
            "divergence": s.about,
            "dtype": str(s.dtype)[6:],
            "student": s.form[0],
            "teacher": s.form[1],
            "shape": list(s.shape),
            "vocab": s.vocab,
            "options": options,
            "checks": [asdict(c) for c in self.checks],
            "broken": self.broken,
            "skipped": self.skipped,
        }


def examine(scenario: Scenario, names: list[BackendName], device: str) -> list[Outcome]:
    """The scenario on every backend of ``names`` that serves its dtypes; the oracle answers once."""
    problem, function = scenario.problem(device), FUNCTIONS[scenario.function]
    meaning = {k: v for k, v in scenario.options.items() if k != "chunk_bytes"}
    oracle = problem.oracle(loss=function.ours, divergence=scenario.divergence, **meaning)
    if unfit := _unfit(oracle, problem):
        return [Outcome(name, scenario, [], [], unfit) for name in names]
    plain = problem.plain(scenario.divergence, loss=function.plain, **meaning)
    made = []
    for name in names:
        why_not = by_name(name).cannot(torch.device(device), [problem.dtype], Spec())
        if why_not:
            made.append(Outcome(name, scenario, [], [], why_not))
            continue
        ours = _run(scenario, problem, name)
        checks = compare(ours, oracle, plain, dtype=problem.dtype, projected=problem.projected)
        broken = [str(check) for check in checks if not check.ok]
        broken += _exact_rules(scenario, name, problem, ours)
        made.append(Outcome(name, scenario, checks, broken))
    return made


def _run(scenario: Scenario, problem: Problem, name: BackendName) -> Result:
    loss = FUNCTIONS[scenario.function].ours
    return problem.run(name, loss=loss, divergence=scenario.divergence, **scenario.options)


def beyond_32_bits(name: BackendName, device: str, *, tokens: int = 2**14 + 8, vocab: int = 2**17) -> Outcome:
    """Logits with more than 2^31 numbers: the last rows are right only if no offset wrapped around.

    Needs 9 GB: bf16 logits that repeat eight rows, and their gradient; the teacher is one row.
    """
    scenario = Scenario(
        "N*V > 2^31", ForwardKL(), torch.bfloat16, shape=(tokens,), vocab=vocab, options=dict(reduction="sum")
    )
    few = replace(scenario, shape=(8,)).problem(device)
    few.teacher = [few.teacher[0][:1].expand(8, vocab)]
    oracle, plain = (run(labels=False, **scenario.options) for run in (few.oracle, few.plain))
    parts = tokens // 8
    leaf = few.student[0].repeat(parts, 1).requires_grad_()
    with use_backend(name):
        value = distillation_loss(leaf, few.teacher[0][:1].expand(tokens, vocab), **scenario.options)
    assert isinstance(value, Tensor)
    value.backward()
    assert leaf.grad is not None
    checks = compare((value / parts, [leaf.grad[-8:]]), oracle, plain, dtype=few.dtype)
    return Outcome(name, scenario, checks, [str(check) for check in checks if not check.ok])


def _unfit(oracle: Result, problem: Problem) -> str | None:
    """Why the oracle's result does not fit into the problem's dtypes; None if it fits."""
    value, grads = oracle
    largest = max(float(g.abs().max()) for g in grads)
    if not (largest < math.inf and value.abs().max() < torch.finfo(torch.float32).max):
        return "the oracle is infinite here"
    # fp16 gradients are made per token, before the mean's divisor, so that GradScaler's factor comes first.
    if problem.dtype == torch.float16 and largest * problem.labels.numel() > torch.finfo(torch.float16).max:
        return "the gradient of one token does not fit fp16"
    return None


def _exact_rules(scenario: Scenario, backend: BackendName, problem: Problem, ours: Result) -> list[str]:
    """Rules that allow no error at all."""
    broken = []
    value, grads = ours
    none = scenario.rows == "equal" or (scenario.vocab == 1 and not scenario.options)
    if none and any(g.any() for g in grads):
        broken.append("a gradient between equal distributions is not exactly 0")
    if scenario.rows == "random":
        again = _run(scenario, problem, backend)
        if not all(torch.equal(a, b) for a, b in zip((value, *grads), (again[0], *again[1]))):
            broken.append("the same inputs gave other bits the second time")
    return broken
