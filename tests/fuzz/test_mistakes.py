"""Every argument of every public loss, given everything that it cannot be: one line that names it, at that call."""

import itertools
import math

import pytest
import torch

import kdkernels as kd

N, V, H = 4, 9, 5
NOT_A_NUMBER = [None, "2", [1.0], 1j, object(), torch.ones(2, 3), torch.tensor(1j)]
#: Argument -> what it cannot be, beside what no number can be.
NUMBERS = {
    "temperature": [0.0, -1.0, math.nan, math.inf],
    "soft_weight": [math.nan, math.inf],
    "hard_weight": [math.nan, math.inf],
    "entropy_weight": [math.nan, math.inf],
    "label_smoothing": [-0.1, 1.5, math.nan],
    "z_loss": [math.nan, math.inf],
    "chunk_bytes": [0, -5, 1.5, math.nan],
    "gradient_tolerance": [-0.1, 1.0, math.nan],
    "vocab_size": [0, -1, V + 1, 2.5, 2**70],
    "ignore_index": [1.5, 2**70],
    "num_items": [0, -3, math.nan, torch.tensor(1.0, requires_grad=True)],
}
OPTIONAL = {"chunk_bytes", "vocab_size", "num_items"}
OTHERS = {
    "divergence": [None, "jsd", kd.JSD, 0.5],
    "reduction": [None, "avg", 3, torch.ones(())],
    "labels": [
        [1, 2, 3, 4],
        torch.zeros(N),
        torch.zeros(N, dtype=torch.int32),
        torch.zeros(N + 1, dtype=torch.int64),
        torch.full((N,), V),
        torch.full((N,), -7),
        torch.ones(N, dtype=torch.bool),
        "labels",
        3,
        torch.zeros(N, dtype=torch.int64, device="meta"),
    ],
    "token_weights": [
        [1.0] * N,
        torch.ones(N + 1),
        torch.ones(N, dtype=torch.complex64),
        2.0,
        "w",
        torch.ones(N, device="meta"),
    ],
    "ids": [
        None,
        [1, 2, 3, 4],
        torch.zeros(N),
        torch.zeros(N, dtype=torch.int32),
        torch.zeros(N + 1, dtype=torch.int64),
        torch.zeros(N, 2, 2, dtype=torch.int64),
        torch.zeros(N, 0, dtype=torch.int64),
        torch.full((N,), V),
        torch.full((N, 2), -7),
        torch.tensor([[0, -100]] * N),
        torch.zeros(N, dtype=torch.int64, device="meta"),
    ],
    "entropy": [None, "yes", 2, torch.tensor(True)],
    "mask": [[True] * N, torch.ones(N + 1, dtype=torch.bool), "m", torch.full((N,), 2), torch.rand(N)],
}
STUDENTS = [
    None,
    3,
    "s",
    [1.0],
    torch.tensor(1.0),
    torch.randn(N, V, dtype=torch.complex64),
    torch.zeros(N, V, dtype=torch.int64),
    torch.zeros(N, 0),
    torch.randn(N, V).to_sparse(),
]
TEACHERS = [
    *STUDENTS,
    torch.randn(N + 1, V),
    torch.randn(N, V + 1),
    torch.randn(N, V, device="meta"),
    kd.SparseTarget(torch.zeros(N + 1, 2, dtype=torch.int64), weights=torch.ones(N + 1, 2) / 2),
    kd.SparseTarget(torch.full((N, 2), V), weights=torch.ones(N, 2) / 2),
]
LOSSES = {
    "distillation_loss": (kd.distillation_loss, True, {"divergence", *NUMBERS, *OTHERS}),
    "codistillation_loss": (
        kd.codistillation_loss,
        True,
        {"divergence", *NUMBERS, *OTHERS} - {"entropy_weight"},
    ),
    "cross_entropy": (
        kd.cross_entropy,
        False,
        {*NUMBERS, *OTHERS} - {"temperature", "soft_weight", "hard_weight", "entropy_weight", "divergence"},
    ),
    "token_log_probs": (
        kd.token_log_probs,
        False,
        {"ids", "entropy", "temperature", "chunk_bytes", "vocab_size", "ignore_index", "gradient_tolerance"},
    ),
}
for name in LOSSES.keys() - {"token_log_probs"}:
    LOSSES[name][2].difference_update({"ids", "entropy"})


def call(name, **changed):
    function, with_teacher, _ = LOSSES[name]
    names = "ids" if name == "token_log_probs" else "labels"
    given = {"student": torch.randn(N, V), names: torch.tensor([1, 2, -100, 3])}
    if with_teacher:
        given |= {"teacher": torch.randn(N, V), "hard_weight": 0.5}
    return function(**{**given, **changed})


def cases():
    for name, (_, with_teacher, takes) in LOSSES.items():
        for argument, values in itertools.chain(NUMBERS.items(), OTHERS.items()):
            wrong = (
                [v for v in NOT_A_NUMBER if argument not in OPTIONAL or v is not None]
                if argument in NUMBERS
                else []
            )
            for value in [*wrong, *values] if argument in takes else []:
                yield name, argument, value
        yield from ((name, "student", value) for value in STUDENTS)
        yield from ((name, "teacher", value) for value in TEACHERS if with_teacher)


def numbered(cases):
    """Cases with names that are the same in each process: a tensor's or an object's own text is not."""
    return [
        pytest.param(*case, id="-".join(str(getattr(c, "__name__", c)) for c in case[:-1]) + f"-{i}")
        for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize("name, argument, value", numbered(cases()))
def test_a_mistake_is_one_line(name, argument, value):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(name, **{argument: value})
    said = str(caught.value)
    assert "\n" not in said, said
    named = {"teacher": ("teacher", "SparseTarget"), "vocab_size": ("vocab_size", "vocabulary")}.get(
        argument, (argument,)
    )
    assert any(word in said for word in named), said


HEADS = {
    "hidden": [
        None,
        [1.0],
        torch.randn(N, H + 1),
        torch.zeros(N, H, dtype=torch.int64),
        torch.tensor(1.0),
        torch.randn(N, H).half(),
    ],
    "weight": [None, torch.randn(V), torch.randn(V, H + 1), torch.randn(V, H, device="meta")],
    "bias": [torch.randn(V + 1), torch.randn(1, V), 0.5],
    "logit_scale": [
        0.0,
        math.nan,
        math.inf,
        None,
        "1",
        1j,
        torch.ones((), requires_grad=True),
        torch.ones(3),
    ],
    "softcap": [0.0, -1.0, math.nan, math.inf, "30", 1j, torch.full((), 30.0, requires_grad=True)],
}


@pytest.mark.parametrize("argument, value", numbered((a, v) for a, values in HEADS.items() for v in values))
def test_a_head_that_is_none(argument, value):
    given = {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "bias": torch.randn(V)}
    with pytest.raises((TypeError, ValueError)) as caught:
        kd.LinearHead(**{**given, argument: value})
    named = (argument, "devices" if argument == "weight" else argument)
    assert "\n" not in str(caught.value) and any(word in str(caught.value) for word in named)


IDS = torch.zeros(N, 2, dtype=torch.int64)
PRODUCERS = {
    kd.top_k_target: {"k": [0, -1, V + 1, 2.0, None, "3"]},
    kd.top_p_target: {"p": [0.0, -0.1, 1.5, math.nan, None, "0.9"]},
    kd.sample_target: {"samples": [0, -2, 1.5, None, "8"]},
    kd.target_at: {
        "ids": [None, "3", torch.tensor(3), torch.zeros(N, 2), IDS[:1], IDS[:, :0], IDS + V, IDS - 2]
    },
}


def wrong_producers():
    for function, options in PRODUCERS.items():
        for name, values in options.items():
            yield from ((function, name, value) for value in values)
        yield from ((function, "teacher", value) for value in STUDENTS)
        yield from ((function, "chunk_bytes", value) for value in (0, -1, "1"))


@pytest.mark.parametrize("function, argument, value", numbered(wrong_producers()))
def test_a_producer_says_so(function, argument, value):
    first = {kd.top_k_target: 3, kd.top_p_target: 0.9, kd.sample_target: 8, kd.target_at: IDS}[function]
    teacher, number, options = torch.randn(N, V), first, {}
    if argument == "teacher":
        teacher = value
    elif argument == "chunk_bytes":
        options["chunk_bytes"] = value
    else:
        number = value
    with pytest.raises((TypeError, ValueError)) as caught:
        function(teacher, number, **options)
    assert "\n" not in str(caught.value)
