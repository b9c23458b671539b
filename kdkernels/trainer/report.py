"""What a comparison looks like: the table, the picture, report.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Stage of ``compare`` -> what the student is called.
STUDENTS = {
    "plain": "no teacher",
    "longer": "no teacher, soft's time",
    "soft": "soft",
    "hard": "hard",
    "co": "co",
    "on_policy": "on-policy",
}
PICTURE = "curves.png"
Row = dict[str, Any]

#: Title -> a cell of a model's row. What a model writes is judged by the teacher's own loss on it.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "validation loss": lambda row: f"{row['validation_loss']:.3f}",
    "KL to teacher": lambda row: f"{row['kl_to_teacher']:.3f}",
    "top-1 agreement": lambda row: f"{row['agreement']:.1%}",
    "entropy": lambda row: f"{row['entropy']:.3f}",
    "calibration error": lambda row: f"{row['calibration_error']:.3f}",
    "teacher's loss on what it writes (greedy)": lambda row: _written(row["writes"]),
    "tokens": lambda row: f"{row['tokens']:,}",
    "time": lambda row: f"{row['writing_seconds'] + training_seconds(row):,.0f} s",
    "peak memory": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
}


def training_seconds(row: Row) -> float:
    """The seconds of training alone, without evaluations and checkpoints, and without what the teacher wrote."""
    return row["tokens"] / row["tokens_per_second"]


def _written(said: dict[str, float]) -> str:
    return f"{said['sampled']:.3f} ({said['greedy']:.3f})" if said else ""


def table(comparison: Row) -> str:
    """The teacher and every student; no cell where nothing was measured."""
    students = {STUDENTS[name]: row for name, row in comparison["students"].items()}
    columns = {
        title: cell for title, cell in COLUMNS.items() if any(cell_of(cell, row) for row in students.values())
    }
    lines = [f"| student | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in {"*the teacher*": comparison["teacher"], **students}.items():
        lines.append(f"| {name} | {' | '.join(cell_of(cell, row) for cell in columns.values())} |")
    return "\n".join(lines)


def cell_of(cell: Callable[[Row], str], row: Row) -> str:
    try:
        return cell(row)
    except KeyError:  # the teacher has no budget of its own; a way may not have been measured in all respects
        return ""


# -- what it says ------------------------------------------------------------------------------------


def sentences(comparison: Row) -> list[str]:
    """What was done, what it shows and what it does not."""
    students = comparison["students"]
    each = [done(comparison), soft_sentence(comparison), carried(comparison)]
    if all(row["writes"] for row in students.values()):
        each.append(written(students))
    if "co" in students:
        each.append(along(comparison))
    return each


def done(comparison: Row) -> str:
    settings, students = comparison["settings"], comparison["students"]
    tokens = f"{students['plain']['tokens']:,}"
    return (
        f"Students of {comparison['student_parameters'] / 1e6:.2f} M parameters, alike in everything but the loss, were "
        f"trained on {tokens} tokens each and measured on {comparison['validation_tokens']:,} others beside a teacher of "
        f"{comparison['teacher']['parameters'] / 1e6:.2f} M parameters ({', '.join(settings['data'])}, sequences of "
        f"{settings['max_length']} tokens); it is one seed, one pair of models and one text: measure yours before you choose."
    )


def soft_sentence(comparison: Row) -> str:
    """Whether soft distillation beat the student without a teacher, at equal tokens and in equal time."""
    students, teacher = comparison["students"], comparison["teacher"]
    plain, soft = students["plain"], students["soft"]
    text = (
        f"Soft distillation {_outcome(soft, plain)} the student without a teacher at equal tokens: validation loss "
        f"{soft['validation_loss']:.3f} against {plain['validation_loss']:.3f} (the teacher: "
        f"{teacher['validation_loss']:.3f}), in {training_seconds(soft) / training_seconds(plain):.1f} times the time."
    )
    if "longer" not in students:
        return text
    longer = students["longer"]
    return (
        f"{text} It {_outcome(soft, longer)} the one without a teacher that is given that time, on "
        f"{longer['tokens']:,} tokens: {longer['validation_loss']:.3f}."
    )


def carried(comparison: Row) -> str:
    plain, soft = comparison["students"]["plain"], comparison["students"]["soft"]
    return (
        f"What the teacher's distribution carries beside the text: the soft student's KL to the teacher is {soft['kl_to_teacher']:.3f} "
        f"against {plain['kl_to_teacher']:.3f}, its first choice is the teacher's in {soft['agreement']:.0%} against "
        f"{plain['agreement']:.0%}, its entropy {soft['entropy']:.2f} against {plain['entropy']:.2f} (the teacher's "
        f"{comparison['teacher']['entropy']:.2f}), its calibration error {soft['calibration_error']:.3f} against "
        f"{plain['calibration_error']:.3f}."
    )


def written(students: Row) -> str:
    ranked = sorted(students, key=lambda name: students[name]["writes"]["sampled"])
    said = [f"{STUDENTS[name]} {students[name]['writes']['sampled']:.3f}" for name in ranked]
    return f"Of what they write, sampled after held-out beginnings, the teacher itself would lose, in nats per token: {', '.join(said)}."


def along(comparison: Row) -> str:
    """Where co-distillation helped and where not."""
    students = comparison["students"]
    plain, co = students["plain"], students["co"]
    return (
        f"Co-distillation {_outcome(co, plain)} the student without a teacher: {co['validation_loss']:.3f} against "
        f"{plain['validation_loss']:.3f}, in {training_seconds(co) / training_seconds(plain):.1f} times the time; "
        f"the teacher that was trained along came to {comparison['co_teacher']['validation_loss']:.3f}."
    )


def _outcome(one: Row, other: Row) -> str:
    return "beats" if one["validation_loss"] < other["validation_loss"] else "does not beat"


def text(comparison: Row) -> str:
    settings, where = comparison["settings"], comparison["environment"]
    notes = f"""
Loss, entropy and KL(teacher || student) are nats per token at temperature 1; the calibration error is of the first
choice's probability. All are against the same teacher. Time is that of training, with what the teacher wrote and
without evaluations.

* Student: {settings["student"]}. Teacher: {settings["teacher"]}.
* Soft: {settings["divergence"]} at temperature {settings["temperature"]:g}, {settings["soft_weight"]:g} x soft + {settings["hard_weight"]:g} x hard.
* Hard: {settings["prompts"]:,} completions by the teacher, repeated to the budget.
* Co: {_co_teacher(settings)}soft weight {settings["soft_schedule"]} from {settings["soft_weight_start"]:g} to {settings["soft_weight"]:g}, {comparison.get("co_hard_weight", 1):g} x hard; the teacher learns at {settings["teacher_learning_rate"]:g}.
"""
    return "\n".join(
        [
            "# Soft, hard, co- and on-policy distillation at one token budget\n",
            *(f"{sentence}\n" for sentence in sentences(comparison)),
            table(comparison),
            notes,
            f"![validation loss over tokens and over time, and what the students write]({PICTURE})\n",
            f"Measured on {machine(comparison)}, transformers {where['transformers']}, Python {where['python']}.\n",
        ]
    )


def _co_teacher(settings: Row) -> str:
    share = settings.get("co_teacher_at")
    return f"with the teacher as it was after {share:.0%} of its training; " if share else ""


def machine(comparison: Row) -> str:
    """Where it was measured; that other programs ran beside it, if they did, since times are then longer than need be."""
    where, seconds = comparison["environment"], comparison["seconds"]
    load, cores = where.get("load_average") or 0, where.get("cores") or 0
    whole = (
        "" if seconds is None else f", {seconds:.0f} s in all after the setup"
    )  # None: some stages had been run before
    busy = f", beside other programs (load {load:g} on {cores} cores)" if load > cores + 1 else ""
    threads = f"{where['threads']} thread" + ("" if where["threads"] == 1 else "s")
    return f"{where['machine']}, {threads}, torch {where['torch']}, {where['date']}{whole}{busy}"


# -- the picture -------------------------------------------------------------------------------------


def draw(path: Path, curves: dict[str, list[Row]], comparison: Row) -> None:
    """Validation loss over tokens and over time, from every student's metrics; bars of what the students write."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    students, teacher = comparison["students"], comparison["teacher"]
    figure, (tokens, seconds, bars) = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    colors = {name: f"C{index}" for index, name in enumerate(students)}
    for name, row in students.items():
        lines = [line for line in curves[name] if "eval_hard" in line]
        seen = [line["num_input_tokens_seen"] for line in lines]
        losses = [line["eval_hard"] for line in lines]
        style = {"marker": "o", "markersize": 3, "color": colors[name], "label": STUDENTS[name]}
        tokens.plot(seen, losses, **style)
        rate, begin = row["tokens_per_second"], row["writing_seconds"]
        seconds.plot([begin + count / rate for count in seen], losses, **style)
    for axes in (tokens, seconds):
        axes.axhline(teacher["validation_loss"], color="gray", linestyle="--", label="the teacher")
    tokens.set(xlabel="tokens that the student was trained on", ylabel="validation loss (nats per token)")
    tokens.xaxis.set_major_formatter(lambda count, _: f"{count / 1000:g}k")
    seconds.set(xlabel="seconds of training")
    figure.legend(*tokens.get_legend_handles_labels(), loc="outside lower center", ncols=len(students) + 1)
    for name, row in students.items() if all(row["writes"] for row in students.values()) else ():
        bars.barh(STUDENTS[name], row["writes"]["sampled"], color=colors[name])
    if teacher["writes"]:
        bars.axvline(teacher["writes"]["sampled"], color="gray", linestyle="--")
    bars.invert_yaxis()
    bars.set(title="the teacher's loss on what they write", xlabel="nats per token (dashed: its own text)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
