"""``python -m kdkernels verify``: every backend that is usable here against the fp64 oracle.

Every divergence, input form and dtype, on random and adversarial rows, vocabularies from 1 to
262144 and every schedule, with an entropy, several in one pass, and log-probabilities of tokens: what
is in most use first, and nothing begun after a minute unless --full says all. Prints the worst errors beside those of the plain PyTorch formula, a row as soon as it is
known, and exits with 1 when a rule of exactness is broken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import CHOICES, BackendName, backends, by_name, use_backend
from ..backends.spec import Spec
from ..divergences import (
    JSD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    Mixed,
    Overlap,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)
from ..log_probs import token_log_probs
from ..losses import distillation_loss
from ..testing import ROWS, Check, Problem, Result, compare, plain_loss

#: Every kind, and every branch of those that have several; the tests take theirs from here.
DIVERGENCES: tuple[Divergence, ...] = (
    ForwardKL(),
    ReverseKL(),
    JSD(0.5),
    JSD(0.1),
    SkewKL(0.1),
    SkewReverseKL(0.1),
    SkewReverseKL(0.3, detach_mixture=True),
    TotalVariation(),
    Overlap(),
    AlphaBeta(0.2, 0.7),
    AlphaBeta(0.5, 0.0),
    AlphaBeta(0.0, 0.5),
    AlphaBeta(0.5, -0.5),
    AlphaBeta(0.0, 0.0),
    Mixed(0.4),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMS = (("logits", "logits"), ("head", "head"), ("head", "logits"), ("logits", "head"))
VOCABS = (1, 2, 31, 128, 2049, 32768, 131072, 262144)
#: Budgets of the logit tiles that make token chunks and vocabulary chunks of the problem below.
CHUNKS = (16_000, 240_000)
_TERMS = dict(temperature=2.0, hard_weight=0.5)
_TEMPERED = dict(temperature=2.0)


#: Beside a divergence in one pass.
_OTHERS: tuple[Divergence, ...] = (ForwardKL(), Overlap())


def _several(
    student: Any, teacher: Any, labels: Tensor | None, *, divergence: Divergence, **options
) -> Tensor:
    """Token losses ``[D, ...]`` of a divergence and of others, from one pass."""
    each = divergence, *_OTHERS
    return torch.stack(
        distillation_loss(student, teacher, labels, divergence=each, reduction="none", **options)
    )


def _plain_several(s: Tensor, t: Tensor, labels: Tensor | None, divergence: Divergence, **options) -> Tensor:
    each = divergence, *_OTHERS
    return torch.stack([plain_loss(s, t, labels, one, reduction="none", **options) for one in each])


def _weighted(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """Each token's numbers, with other weights for each, so that each has a gradient of its own."""
    return torch.cat([-log_probs, 0.3 * entropy[..., None]], -1)


def _ids(labels: Tensor) -> Tensor:
    """Two ids a token, or none where it is masked."""
    return torch.stack([labels, torch.where(labels >= 0, labels // 2, labels)], -1)


def _log_probs(student: Any, teacher: Any, labels: Tensor, *, divergence: None, **options) -> Tensor:
    of = token_log_probs(student, _ids(labels), entropy=True, **options)
    assert of.entropy is not None
    return _weighted(of.log_probs, of.entropy)


def _plain_log_probs(
    s: Tensor, t: Tensor, labels: Tensor, divergence: None, *, temperature: float = 1.0
) -> Tensor:
    log_q, ids = (s / temperature).log_softmax(-1), _ids(labels)
    entropy = -(log_q.exp() * log_q.masked_fill(log_q.isneginf(), 0.0)).sum(-1)
    asked = log_q.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    return _weighted(asked, entropy.masked_fill(labels < 0, 0.0))


class Function(NamedTuple):
    """What is called with a problem's student, teacher and labels, and the plain formula of it."""

    ours: Callable[..., Any]
    plain: Callable[..., Tensor]


FUNCTIONS = {
    "distillation_loss": Function(distillation_loss, plain_loss),
    "several divergences": Function(_several, _plain_several),
    "token_log_probs": Function(_log_probs, _plain_log_probs),
}


@dataclass(frozen=True)
class Scenario:
    """One problem and the options of its loss; ``label`` says in the report what is special. ``divergence`` None: it
    is a function that has none."""

    label: str
    divergence: Divergence | None
    dtype: torch.dtype
    form: tuple[str, str] = ("logits", "logits")
    rows: str = "random"
    shape: tuple[int, ...] = (4, 16)
    vocab: int = 257
    options: dict[str, Any] = field(default_factory=dict)
    function: str = "distillation_loss"

    @property
    def about(self) -> str:
        """The divergence, or the function where it has none."""
        return self.function if self.divergence is None else str(self.divergence)

    def problem(self, device: str) -> Problem:
        torch.manual_seed(0)
        return Problem(
            student=self.form[0],
            teacher=self.form[1],
            dtype=self.dtype,
            rows=self.rows,
            shape=self.shape,
            vocab=self.vocab,
            device=device,
        )


def scenarios() -> Iterator[Scenario]:
    """Everything that is verified, as data. The problems in most use come first, each for every divergence."""
    yield from sorted(_all_scenarios(), key=_rank)


def _rank(scenario: Scenario) -> int:
    wide = 2 * (scenario.vocab > 10_000)
    return DTYPES.index(scenario.dtype) + FORMS.index(scenario.form) + wide


def _all_scenarios() -> Iterator[Scenario]:
    for rows, dtype, form in itertools.product(ROWS, DTYPES, FORMS):
        if rows != "equal" or form[0] == form[1]:
            yield from (Scenario(rows, d, dtype, form, rows, options=_terms(rows)) for d in DIVERGENCES)
    for chunk_bytes, dtype in itertools.product(CHUNKS, DTYPES):
        options = {**_TERMS, "chunk_bytes": chunk_bytes}
        for divergence in DIVERGENCES:
            yield Scenario("chunked", divergence, dtype, ("head", "head"), vocab=700, options=options)
    for vocab, dtype in itertools.product(VOCABS, (torch.float32, torch.bfloat16)):
        shape = (64 if vocab < 10_000 else 8,)
        yield from (Scenario(f"V={vocab}", d, dtype, shape=shape, vocab=vocab) for d in DIVERGENCES)
    for dtype, form in itertools.product(DTYPES, FORMS[:2]):
        options = dict(entropy_weight=-0.5, **_TERMS)
        yield from (Scenario("entropy", d, dtype, form, options=options) for d in DIVERGENCES)
        for d in DIVERGENCES:
            yield Scenario("several", d, dtype, form, options=_TEMPERED, function="several divergences")
    yield from _of_tokens()


def _of_tokens() -> Iterator[Scenario]:
    """Log-probabilities and entropies."""
    alone: dict[str, Any] = dict(divergence=None, function="token_log_probs")
    for rows, dtype, form in itertools.product(("random", "ties", "padding", "extreme"), DTYPES, FORMS[:2]):
        yield Scenario(f"ids: {rows}", dtype=dtype, form=form, rows=rows, options=_TEMPERED, **alone)
    for chunk_bytes, dtype in itertools.product(CHUNKS, DTYPES):
        options = {**_TEMPERED, "chunk_bytes": chunk_bytes}
        yield Scenario(
            "ids: chunked", dtype=dtype, form=("head", "head"), vocab=700, options=options, **alone
        )
    for vocab, dtype in itertools.product(VOCABS, (torch.float32, torch.bfloat16)):
        yield Scenario(f"ids: V={vocab}", dtype=dtype, shape=(8,), vocab=vocab, **alone)


def _terms(rows: str) -> dict[str, Any]:
    # Equal models must have gradient 0. A hard term would hide whether they do.
    return {} if rows == "equal" else dict(_TERMS)


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


def usable(wanted: list[str] | None) -> list[BackendName]:
    """The backends to verify: those asked for, or all that are usable here."""
    there = {name: why for name, why in backends().items() if name != "reference"}
    for name in wanted or []:
        if name not in there:
            raise ValueError(f"unknown backend {name!r}; there are {', '.join(there)}")
        if there[name]:
            raise ValueError(f"backend {name!r} is not usable here: {there[name]}")
    return [name for name in CHOICES if (name in wanted if wanted else name in there and there[name] is None)]


def verify(
    names: list[BackendName],
    device: str,
    *,
    only: str | None = None,
    large: bool = False,
    seconds: float = math.inf,
    tell: Callable[[list[Outcome]], None] = lambda row: None,
) -> tuple[list[Outcome], int]:
    """(all outcomes, how many scenarios ``seconds`` left no time for).

    ``only`` keeps the scenarios whose divergence has it in its name. ``tell`` is called with each
    problem's outcomes, of all divergences and backends.
    """
    made: list[Outcome] = []
    end, late = time.perf_counter() + seconds, 0
    chosen = (s for s in scenarios() if only is None or only.lower() in s.about.lower())
    with torch.random.fork_rng(devices=[]):
        if large:
            made += [beyond_32_bits(name, device) for name in names]
            tell(made)
        for _, group in itertools.groupby(chosen, lambda s: (s.label, s.dtype, s.form, str(s.options))):
            row: list[Outcome] = []
            for scenario in group:
                if time.perf_counter() > end:
                    late += 1
                else:
                    row += examine(scenario, names, device)
            if row:
                tell(row)
            made += row
    return made, late


LEGEND = """\
loss      |ours - oracle| of the worst row, in nats
gradient  |ours - oracle| / |oracle|, norms of whole tensors; the worst of them
plain     the same of the PyTorch formula in the same dtypes; ours may be twice that and a few ulp
"""
_ERRORS = f"{'loss':>9}{'plain':>9}{'gradient':>10}{'plain':>9}{'problems':>10}"


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
    lines = [f"{'backend':<10}{'divergence':<{width}}{'dtype':<10}{_ERRORS}"]
    for key in sorted(groups, key=lambda k: (k[0], order.index(k[1]))):
        (backend, divergence, dtype), group = key, groups[key]
        if errors := _errors(group):
            lines.append(f"{backend:<10}{divergence:<{width}}{dtype:<10}{errors}")
    return "\n".join(lines)


def _worst(checks: list[Check]) -> str:
    ours = max(c.error for c in checks)
    plain = max((c.plain_error for c in checks if c.plain_error < float("inf")), default=float("nan"))
    return f"{ours:>9.1e}{plain:>9.1e} "


def report(outcomes: list[Outcome], late: int, device: str, seconds: float) -> dict[str, Any]:
    where = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {
        "device": where,
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "verified": sum(not o.skipped for o in outcomes),
        "not_run": late,
        "broken": sum(bool(o.broken) for o in outcomes),
        "outcomes": [o.record() for o in outcomes],
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m kdkernels verify", description=__doc__)
    parser.add_argument("--device", default="cpu", help="where the tensors are: cpu (default), cuda")
    parser.add_argument("--backend", action="append", help="only this backend; may be repeated")
    parser.add_argument("--divergence", help="only divergences with this in their name")
    parser.add_argument("--large", action="store_true", help="also logits of more than 2^31 numbers: 9 GB")
    parser.add_argument("--minutes", type=float, default=1.0, help="begin nothing after these (default 1)")
    parser.add_argument("--full", action="store_true", help="everything, however long it takes")
    parser.add_argument("--json", metavar="FILE", help="write every outcome here")
    options = parser.parse_args(arguments)
    if options.json and (Path(options.json).is_dir() or not Path(options.json).parent.is_dir()):
        parser.error(f"--json {options.json}: give a file in a folder that is there")
    try:
        names = usable(options.backend)
        torch.empty(0, device=options.device)
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    print(f"{LEGEND}\n{'backend':<10}{'rows':<14}{'dtype':<10}{'student, teacher':<20}{_ERRORS}", flush=True)
    start = time.perf_counter()
    outcomes, late = verify(
        names,
        options.device,
        only=options.divergence,
        large=options.large,
        seconds=math.inf if options.full else options.minutes * 60,
        tell=show,
    )
    seconds = time.perf_counter() - start
    print(f"\n{table(outcomes)}\n")
    skipped: dict[tuple[str, str], int] = {}
    for outcome in outcomes:
        if outcome.skipped:
            key = outcome.backend, outcome.skipped
            skipped[key] = skipped.get(key, 0) + 1
    for (backend, reason), count in skipped.items():
        print(f"{backend}: {count} problem{'s' * (count > 1)} skipped: {reason}")
    if late:
        print(f"NOT RUN: {late} problems, the time was up; --minutes gives more, --full all")
    summary = report(outcomes, late, options.device, seconds)
    print(f"{summary['verified']} problems in {seconds:.0f} s, {summary['broken']} break a rule")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(summary, file, indent=1)
    if summary["broken"]:
        sys.exit(1)
    if not summary["verified"]:
        print("nothing was verified", file=sys.stderr)
        sys.exit(2)
