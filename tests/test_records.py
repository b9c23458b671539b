"""Targets of other programs: each in its own shape, and an error that names a record that is not."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdkernels import SparseTarget
from kdkernels.targets.records import distillkit_bytes

INF = math.inf


def rows(target: SparseTarget) -> list:
    """What a target says: per token {id: logprob}, empty slots left out."""
    ids, values = target.ids.flatten(0, -2).tolist(), target.logprobs.flatten(0, -2).tolist()
    return [
        {i: v for i, v in zip(*row, strict=True) if i >= 0 and v > -INF}
        for row in zip(ids, values, strict=True)
    ]


def approx(expected: list) -> list:
    return [pytest.approx(row, rel=1e-6) for row in expected]


# --- vLLM --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Logprob:
    """As vllm/logprobs.py has it."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PROMPT_LOGPROBS = [
    None,
    {7: Logprob(-0.25, 1, " a"), 3: Logprob(-2.0, 2, " b")},
    {3: Logprob(-0.5, 1, " b"), 1: Logprob(-1.5, 2, " c"), 90: Logprob(-9.0, 4711, " z")},  # the prompt's own
    {2: Logprob(-0.125, 1, " d"), 5: Logprob(-INF, 2, " e")},
]
VLLM_ROWS = [{7: -0.25, 3: -2.0}, {3: -0.5, 1: -1.5, 90: -9.0}, {2: -0.125}, {}]


def as_json(prompt_logprobs):
    return [e and {str(k): dataclasses.asdict(v) for k, v in e.items()} for e in prompt_logprobs]


class FlatLogprobs:
    """The part of vLLM's FlatLogprobs that its users see: a sequence of dicts, {} for None."""

    def __init__(self, entries):
        self.entries = entries

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, t):
        return self.entries[t] or {}


@pytest.mark.parametrize("form", [list, as_json, FlatLogprobs])
def test_vllm(form):
    target = SparseTarget.from_vllm(form(PROMPT_LOGPROBS))
    assert target.ids.shape == (4, 3) and target.tail == "bucket"
    assert rows(target) == approx(VLLM_ROWS)
    assert rows(SparseTarget.from_vllm(form(PROMPT_LOGPROBS), top_k=2))[1] == approx([{3: -0.5, 1: -1.5}])[0]


@pytest.mark.parametrize(
    "t, entry, says",
    [
        (0, {1: Logprob(-1.0, 1)}, r"prompt_logprobs\[0\] has log-probabilities, but nothing comes before"),
        (2, None, r"prompt_logprobs\[2\] is None; only the first may be empty"),
        (2, [(1, -1.0)], r"prompt_logprobs\[2\] is \[\(1, -1.0\)\], not a dict"),
        (2, np.array([1.0, 2.0]), r"prompt_logprobs\[2\] is array\(\[1., 2.\]\), not a dict"),
        (1, {1: -1.0}, r"prompt_logprobs\[1\]\[1\] is -1.0, not a Logprob"),
        (3, {"x": Logprob(-1.0, 1)}, r"prompt_logprobs\[3\] has 'x' for a token id"),
        (3, {-1: Logprob(-1.0, 1)}, r"prompt_logprobs\[3\] has -1 for a token id"),
        (1, {1: Logprob(math.nan, 1)}, r"prompt_logprobs\[1\] has nan for a log-probability"),
        (1, {1: Logprob(0.9, 1)}, r"prompt_logprobs\[1\] has 0.9 for a log-probability"),
    ],
)
def test_vllm_malformed(t, entry, says):
    broken = list(PROMPT_LOGPROBS)
    broken[t] = entry
    with pytest.raises(ValueError, match=says):
        SparseTarget.from_vllm(broken)


def test_vllm_without_ranks():
    with pytest.raises(ValueError, match=r"prompt_logprobs\[1\]\[7\] has no rank"):
        SparseTarget.from_vllm([None, {7: Logprob(-0.25)}], top_k=1)
    with pytest.raises(TypeError, match="top_k must be an int, got 1.5"):
        SparseTarget.from_vllm(PROMPT_LOGPROBS, top_k=1.5)
    with pytest.raises(ValueError, match="prompt_logprobs is None: ask for it"):
        SparseTarget.from_vllm(None)
    with pytest.raises(ValueError, match="top_k must be > 0, got 0"):
        SparseTarget.from_vllm(PROMPT_LOGPROBS, top_k=0)
    with pytest.raises(ValueError, match="prompt_logprobs is empty"):
        SparseTarget.from_vllm([])
    with pytest.raises(ValueError, match="prompt_logprobs is 5, not a list with an entry per token"):
        SparseTarget.from_vllm(5)


# --- DistillKit --------------------------------------------------------------------------------

RECOMMENDED = {
    "d": 128256,
    "k": 128,
    "exact_k": 16,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}
BUDGET = RECOMMENDED | {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}
SMALL = {
    "d": 1000,
    "k": 8,
    "exact_k": 2,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "delta_encoding": False,
    "normalize_t": False,
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 5, "num_elements": 3},
        {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
    ],
}


def packed(integers, bits) -> list[int]:
    text = "".join(f"{i:0{bits}b}" for i in integers)
    return [int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8)]


def distillkit_row():
    """Three tokens, each byte worked out by hand: bf16 is the upper half of an fp32, scales are powers of 2."""
    row, expected = {"input_ids": [1, 2, 3, 4], "compressed_logprobs": [], "bytepacked_indices": []}, []
    for t in range(3):
        ids = [(t * 131 + 77 * j) % 1000 for j in range(8)]
        exact, curve = [-0.25 - t, -0.5 - t], [-2.0 - t, -0.25, -0.5]
        codes, signs = [0, 16 + t, 31], [1, 0]
        row["compressed_logprobs"].append(
            [
                *np.array(exact, "<f4").view(np.uint8).reshape(2, 4)[:, 2:].ravel().tolist(),
                *np.array(curve, "<f4").tobytes(),
                *np.array(2.0**-6, "<f2").tobytes(),
                *packed(codes, 5),
                *np.array(2.0**-5, "<f4").tobytes(),
                *packed(signs, 1),
            ]
        )
        row["bytepacked_indices"].append(packed(ids, 10))
        residual = [(c - 16) * 2.0**-6 for c in codes] + [(2 * s - 1) * 2.0**-5 for s in signs] + [0.0]
        tail = [curve[0] + curve[1] * x + curve[2] * math.sqrt(x) + residual[x] for x in range(6)]
        expected.append(dict(zip(ids, exact + tail, strict=True)))
    return row, expected


def test_distillkit():
    row, expected = distillkit_row()
    target = SparseTarget.from_distillkit(row, SMALL, tail="renormalize")
    assert target.ids.shape == (4, 8) and target.tail == "renormalize"
    assert rows(target) == approx(expected + [{}])
    as_tensors = {k: torch.tensor(v) for k, v in row.items() if k != "input_ids"}
    assert rows(SparseTarget.from_distillkit(as_tensors, SMALL)) == approx(expected)


def test_distillkit_differences():
    config = {
        "d": 256,
        "k": 3,
        "exact_k": 3,
        "residual_bins": [],
    }  # delta_encoding and float32 are its defaults
    row = {
        "compressed_logprobs": [list(np.array([-0.5, -1.0, -0.25], "<f4").tobytes())],
        "bytepacked_indices": [[9, 8, 7]],
    }
    assert rows(SparseTarget.from_distillkit(row, config)) == approx([{9: -0.5, 8: -1.5, 7: -1.75}])


def test_distillkit_published_sizes():
    for config, published in ((RECOMMENDED, 328), (BUDGET, 121)):
        parts, ids = distillkit_bytes(config)
        assert sum(parts) + ids == published


@pytest.mark.parametrize(
    "change, says",
    [
        ({"compressed_logprobs": None}, "DistillKit's row has no compressed_logprobs"),
        ({"packed_indices": [[1]]}, "legacy format"),
        (
            {"bytepacked_indices": [[0] * 9] * 3},
            "bytepacked_indices has 9 bytes a token; this config gives 10",
        ),
        (
            {"compressed_logprobs": [[0] * 3] * 3},
            "compressed_logprobs has 3 bytes a token; this config gives 25",
        ),
        (
            {"bytepacked_indices": [[0] * 10, [255] * 10, [0] * 10]},
            r"bytepacked_indices\[1\] has an id beyond d=1000",
        ),
        ({"bytepacked_indices": [[0] * 10, [0] * 9]}, r"tokens of \[9, 10\] bytes in bytepacked_indices"),
        ({"bytepacked_indices": [[0] * 10]}, "3 tokens of compressed_logprobs but 1 of bytepacked_indices"),
        ({"bytepacked_indices": [["x"] * 10] * 3}, "something else than bytes in bytepacked_indices"),
        ({"bytepacked_indices": [[-1] * 10] * 3}, "something else than bytes in bytepacked_indices"),
        ({"bytepacked_indices": [[0.5] * 10] * 3}, "something else than bytes in bytepacked_indices"),
        ({"bytepacked_indices": torch.full((3, 10), 256)}, r"bytepacked_indices\[0, 0\] is 256, not a byte"),
        (
            {"compressed_logprobs": torch.full((3, 25), 0.5)},
            r"compressed_logprobs\[0, 0\] is 0.5, not a byte",
        ),
        ({"compressed_logprobs": [[255] * 25] * 3}, r"log-probabilities\[0, 0\] is nan, not a log-prob"),
        ({"input_ids": [1] * 9}, "9 input_ids but 3 tokens"),
    ],
)
def test_distillkit_malformed(change, says):
    row = {k: v for k, v in (distillkit_row()[0] | change).items() if v is not None}
    with pytest.raises(ValueError, match=says):
        SparseTarget.from_distillkit(row, SMALL)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"exact_k": None}, "config has no exact_k, only d, k"),
        ({"exact_k": 9}, "config has d=1000, k=8 and exact_k=9"),
        ({"d": 0}, "config has d=0"),
        ({"exact_dtype": "flt"}, "config has 'flt' for a dtype"),
        (
            {"residual_bins": [{"element_bits": 4}]},
            r"residual_bins\[0\] has no scale_dtype, only element_bits",
        ),
    ],
)
def test_distillkit_malformed_config(change, says):
    config = {name: value for name, value in (SMALL | change).items() if value is not None}
    with pytest.raises(ValueError, match=says):
        SparseTarget.from_distillkit(distillkit_row()[0], config)


def test_distillkit_with_another_term():
    config = SMALL | {"polynomial_terms": [*SMALL["polynomial_terms"][:-1], "cube"]}
    with pytest.raises(ValueError, match="config has 'cube' among its polynomial_terms"):
        SparseTarget.from_distillkit(distillkit_row()[0], config)


def test_distillkit_bytes_in_any_form():
    row = distillkit_row()[0]
    expected = rows(SparseTarget.from_distillkit(row, SMALL))
    as_numbers = lambda value: torch.tensor([list(token) for token in value], dtype=torch.uint8)  # noqa: E731
    for form in (
        lambda value: [bytes(token) for token in value],
        lambda value: as_numbers(value).numpy().astype(np.int64),
        lambda value: as_numbers(value).view(torch.int8),
        lambda value: as_numbers(value).to(torch.uint16),
    ):
        other = {name: form(row[name]) for name in ("bytepacked_indices", "compressed_logprobs")}
        assert rows(SparseTarget.from_distillkit(row | other, SMALL)) == expected


# --- axolotl -----------------------------------------------------------------------------------

DATASET_ROW = {  # chat_template.py: -inf, ids 0.. and mask 0 where there is nothing; masked prompts
    "input_ids": [5, 6, 7, 8],
    "labels": [-100, -100, 7, 8],
    "target_token_ids": [[0, 1], [4, 9], [7, 3], [8, 2]],
    "target_logprobs": [[-INF, -INF], [-0.5, -1.0], [-0.25, -1.75], [-0.125, -3.0]],
    "target_mask": [[0, 0], [0, 0], [1, 1], [1, 1]],
}
BATCH = {  # collator.py: K and the sequence are filled up with -1e9, id 0 and mask 0
    "target_token_ids": torch.tensor([[[7, 3], [8, 0]], [[4, 0], [0, 0]]]),
    "target_logprobs": torch.tensor([[[-0.25, -1.75], [-0.125, -1e9]], [[-0.5, -1e9], [-1e9, -1e9]]]),
    "target_mask": torch.tensor([[[1, 1], [1, 0]], [[1, 0], [0, 0]]], dtype=torch.int),
}


def test_axolotl_both_paddings():
    target = SparseTarget.from_axolotl(DATASET_ROW, tail="conditional")
    assert target.tail == "conditional"
    assert rows(target) == approx([{}, {}, {7: -0.25, 3: -1.75}, {8: -0.125, 2: -3.0}])
    assert rows(SparseTarget.from_axolotl(DATASET_ROW, shift=1)) == approx(
        [{}, {7: -0.25, 3: -1.75}, {8: -0.125, 2: -3.0}, {}]
    )
    batch = SparseTarget.from_axolotl(BATCH)
    assert batch.ids.shape == (2, 2, 2)
    assert rows(batch) == approx([{7: -0.25, 3: -1.75}, {8: -0.125}, {4: -0.5}, {}])
    unmasked = {name: torch.ones_like(c) if name == "target_mask" else c for name, c in BATCH.items()}
    assert rows(SparseTarget.from_axolotl(unmasked)) == rows(batch)  # -1e9 alone is empty too
    ragged = DATASET_ROW | {
        "target_token_ids": [[0], [4, 9], [7], [8, 2]],
        "target_logprobs": [[-INF], [-1.0, -2.0], [-1.0], [-1.0, -2.0]],
        "target_mask": [[0], [1, 1], [1], [1, 1]],
    }
    assert rows(SparseTarget.from_axolotl(ragged)) == [{}, {4: -1.0, 9: -2.0}, {7: -1.0}, {8: -1.0, 2: -2.0}]


RAGGED_BATCH = {  # lists of what BATCH has, without its empty slots at the end of a token
    "target_token_ids": [[[7, 3], [8]], [[4], []]],
    "target_logprobs": [[[-0.25, -1.75], [-0.125]], [[-0.5], []]],
    "target_mask": [[[1, 1], [1]], [[1], []]],
}


def test_axolotl_batch_of_ragged_tokens():
    assert rows(SparseTarget.from_axolotl(RAGGED_BATCH)) == rows(SparseTarget.from_axolotl(BATCH))
    whole = {name: column[:1] for name, column in RAGGED_BATCH.items()} | {
        "target_logprobs": [[[-1, -2], [-3]]]
    }
    assert rows(SparseTarget.from_axolotl(whole)) == [{7: -1.0, 3: -2.0}, {8: -3.0}]  # of integers too


@pytest.mark.parametrize(
    "change, says",
    [
        (
            {"target_token_ids": [[[7, 3], [8]], [[4]]]},
            r"target_token_ids has sequences of \[1, 2\] tokens; fill them up to one length, or read one after",
        ),
        ({"target_mask": [[[1, 1], [1, 0]], [[1], []]]}, r"target_mask\[0\]\[1\] has 2 slots, the ids 1"),
        (
            {"target_logprobs": [[[-1.0, -2.0], [-1.0]], [[-1.0], None]]},
            r"logprobs\[1\]\[1\] is None, not a list",
        ),
        ({"target_logprobs": [[[-1.0, -2.0], ["-1"]], [[-1.0], []]]}, "something else than numbers"),
        ({"target_mask": [[[1, 1]], [[1]]]}, r"shapes \(2, 2, 2\), \(2, 2, 2\) and \(2, 1, 2\)"),
        ({"target_mask": [[1, 1], [1, 1]]}, r"shapes \(2, 2, 2\), \(2, 2, 2\) and \(2, 2\)"),
    ],
)
def test_axolotl_malformed_batch(change, says):
    with pytest.raises(ValueError, match=says) as error:
        SparseTarget.from_axolotl(RAGGED_BATCH | change)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list")
def test_axolotl_arrays_in_lists():
    row = {name: list(np.array(DATASET_ROW[name])) for name in DATASET_ROW if name.startswith("target")}
    batch = {name: [column] for name, column in row.items()}
    assert rows(SparseTarget.from_axolotl(batch)) == rows(SparseTarget.from_axolotl(DATASET_ROW))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"target_token_ids": 7}, "target_token_ids is 7, not a list of lists"),
        (
            {"target_token_ids": [[2.0**24 + 1, 2**24 + 1.5]] * 4},
            r"ids\[2, 1\] is 16777217.5, not a token id",
        ),
        ({"target_mask": None}, "axolotl's row has no target_mask"),
        ({"target_mask": [[1, 1]] * 3}, r"shapes \(4, 2\), \(4, 2\) and \(3, 2\)"),
        (
            {"target_logprobs": [[-1.0, -2.0], None, [-1.0], [-1.0]]},
            r"target_logprobs\[1\] is None, not a list",
        ),
        (
            {"target_token_ids": [[0, 1], [4, 9], [7, 3], [8]]},
            r"target_logprobs\[3\] has 2 slots, the ids 1",
        ),
        ({"target_mask": [[0, 0], [0], [1, 1], [1, 1]]}, r"target_mask\[1\] has 1 slots, the ids 2"),
        (
            {"target_logprobs": [[-1.0, -2.0], [-1.0, math.nan], [-1.0, -2.0], [-1.0, -2.0]]},
            r"target_logprobs\[1, 1\] is nan, not a log-prob",
        ),
        (
            {"target_token_ids": [[0, 1], [4, 9], [7.5, 3], [8, 2]]},
            r"token_ids\[2, 0\] is 7.5, not a token id",
        ),
        ({"target_token_ids": [[0, 1], [4, 9], [7, -3], [8, 2]]}, r"token_ids\[2, 1\] is -3, not a token id"),
        ({"target_token_ids": [["0", "1"]] * 4}, "target_token_ids has something else than numbers"),
        ({"target_mask": [[0, 0], [0, 0.5], [1, 1], [1, 1]]}, r"target_mask\[1, 1\] is 0.5, not 0 or 1"),
    ],
)
def test_axolotl_malformed(change, says):
    row = {k: v for k, v in (DATASET_ROW | change).items() if v is not None}
    with pytest.raises(ValueError, match=says):
        SparseTarget.from_axolotl(row)


# --- TRL ---------------------------------------------------------------------------------------

SERVER = {  # VLLMClient.get_sequence_logprobs(top_logprobs=2): completions of 2 and 1 tokens
    "logprobs": [[[-0.25, -2.0], [-0.5, -INF]], [[-1.0, -1.5]]],
    "logprob_token_ids": [[[7, 3], [9, 0]], [[4, 0]]],
    "actual_logprobs": [[[-2.0], [-INF]], [[-1.0]]],
    "actual_token_ids": [[[3], [5]], [[4]]],
}


def test_trl_server():
    target = SparseTarget.from_trl_server(SERVER)
    assert target.ids.shape == (2, 2, 2)
    assert rows(target) == approx([{7: -0.25, 3: -2.0}, {9: -0.5}, {4: -1.0, 0: -1.5}, {}])
    placed = SparseTarget.from_trl_server(SERVER, prompt_lengths=[1, 3], length=5)
    first = [{7: -0.25, 3: -2.0}, {9: -0.5}, {}, {}, {}]
    assert rows(placed) == approx(first + [{}, {}, {4: -1.0, 0: -1.5}, {}, {}])
    assert SparseTarget.from_trl_server(SERVER, prompt_lengths=[1, 3]).ids.shape == (2, 4, 2)


@pytest.mark.parametrize(
    "change, options, says",
    [
        ({"logprob_token_ids": None}, {}, "TRL's result has no logprob_token_ids"),
        (
            {"logprobs": [[[-0.25], [-0.5, -INF]], [[-1.0, -1.5]]]},
            {},
            "sequence 0 has other slots in logprobs",
        ),
        ({"logprobs": SERVER["logprobs"][:1]}, {}, "2 sequences of ids, 1 of logprobs"),
        ({"logprob_token_ids": [[[7, 3], [9, 0]], [["?", 0]]]}, {}, "sequence 1 has '.' for a token id"),
        (
            {"logprob_token_ids": [[[7, 3], [2**63, 0]], [[4, 0]]]},
            {},
            "has 9223372036854775808 for a token id",
        ),
        ({"logprob_token_ids": [[7, 3], [4]]}, {}, r"ids is \[\[7, 3\], \[4\]\], not \[B, completion, K\]"),
        ({}, {"prompt_lengths": [1, 0]}, "sequence 1 has no prompt"),
        ({}, {"prompt_lengths": [1]}, "and 1 of prompt_lengths"),
        ({}, {"prompt_lengths": 2}, "prompt_lengths is 2, not one number per sequence"),
        ({}, {"prompt_lengths": torch.tensor(2)}, r"prompt_lengths is tensor\(2\), not one number per"),
        ({}, {"length": 1}, "2 tokens, more than length=1"),
    ],
)
def test_trl_server_malformed(change, options, says):
    result = {k: v for k, v in (SERVER | change).items() if v is not None}
    with pytest.raises(ValueError, match=says):
        SparseTarget.from_trl_server(result, **options)


def test_trl_server_with_half_a_token():
    with pytest.raises(TypeError, match="a prompt's length must be an int, got 1.5"):
        SparseTarget.from_trl_server(SERVER, prompt_lengths=[1, 1.5])


# --- tinker ------------------------------------------------------------------------------------

TOPK = [None, [(7, -0.25), (3, -2.0)], None, [(9, -0.5)]]
TOPK_NP = SimpleNamespace(  # TopkLogprobs: int32 and float32 [length, k], (0, -99999) where empty
    token_ids=np.array([[0, 0], [7, 3], [0, 0], [9, 0]], np.int32),
    logprobs=np.array([[-99999, -99999], [-0.25, -2], [-99999, -99999], [-0.5, -99999]], np.float32),
)


@pytest.mark.parametrize("form", [TOPK, TOPK_NP])
def test_tinker(form):
    assert rows(SparseTarget.from_tinker(form)) == approx([{7: -0.25, 3: -2.0}, {}, {9: -0.5}, {}])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"logprobs": [[-1.0, -2.0]] * 4}, "not empty in row 0, but nothing comes before"),
        ({"logprobs": [[-99999.0] * 2, [math.nan, -1.0]] * 2}, r"logprobs\[1, 0\] is nan, not a log-prob"),
        ({"logprobs": [[-99999.0] * 2, [-1.0, 5.0]] * 2}, r"logprobs\[1, 1\] is 5.0, not a log-prob"),
        ({"token_ids": [[0, 0], [7.5, 3], [0, 0], [9, 0]]}, r"token_ids\[1, 0\] is 7.5, not a token id"),
        ({"token_ids": [[0, 0], [7, 3], [0, 0], [-9, 0]]}, r"token_ids\[3, 0\] is -9, not a token id"),
    ],
)
def test_tinker_malformed_arrays(change, says):
    arrays = vars(TOPK_NP) | {name: np.array(values) for name, values in change.items()}
    with pytest.raises(ValueError, match=says):
        SparseTarget.from_tinker(SimpleNamespace(**arrays))


@pytest.mark.parametrize(
    "record, says",
    [
        (None, "is None: ask for it"),
        ([], "is empty: ask for it"),
        (5, "is 5, not a list with an entry per token"),
        (np.array([[[7.0, -0.25]]]), r"topk_prompt_logprobs\[0\] has log-probabilities, but nothing"),
        ([[(1, -1.0)]], r"topk_prompt_logprobs\[0\] has log-probabilities, but nothing"),
        ([None, [7, 3]], r"topk_prompt_logprobs\[1\] is \[7, 3\], not a list of"),
        ([None, [(7, -1.0, 0)]], "not a list of"),
        ([None, [(math.inf, -1.0)]], "has inf for a token id"),
        (
            SimpleNamespace(token_ids=None, logprobs=np.zeros((2, 2))),
            "tinker's token_ids has None, not an array",
        ),
        ([None, [(7, "x")]], r"topk_prompt_logprobs\[1\] has 'x' for a log-probability"),
        (
            SimpleNamespace(token_ids=np.zeros((2, 3)), logprobs=np.zeros((2, 2))),
            r"\(2, 3\) and logprobs \(2, 2\)",
        ),
    ],
)
def test_tinker_malformed(record, says):
    with pytest.raises(ValueError, match=says):
        SparseTarget.from_tinker(record)


# --- Megatron ----------------------------------------------------------------------------------


def megatron_batch(ids, values, dtype=torch.float16):
    """As LogitsSaverHooks packs them; -1 for an id that top-p dropped."""
    ids = torch.tensor(ids)
    low, high = (ids & 0xFFFF).to(torch.uint16), (ids >> 16).to(torch.bool)
    return {"values": torch.tensor(values, dtype=dtype), "indices_low": low, "bit_17": high}


# [S=2, B=2, K=2]: 131071 is the largest 17-bit id and, as -1 packs to it, also what an empty slot holds.
MEGATRON = megatron_batch(
    [[[70000, 5], [131071, 3]], [[1, -1], [65536, 65535]]],
    [[[-0.25, -2.0], [-0.5, -1.0]], [[-0.125, -1000.0], [-1.5, -2.5]]],
)
MEGATRON_ROWS = [{70000: -0.25, 5: -2.0}, {1: -0.125}, {131071: -0.5, 3: -1.0}, {65536: -1.5, 65535: -2.5}]


def test_megatron():
    target = SparseTarget.from_megatron(MEGATRON)
    assert target.ids.shape == (2, 2, 2) and target.tail == "bucket" and target.ids[0, 1, 1] == -1
    assert rows(target) == approx(MEGATRON_ROWS)
    other = megatron_batch([[[8]], [[-1]]], [[[-3.0]], [[-10000.0]]])
    lists = {name: [MEGATRON[name], other[name]] for name in MEGATRON}
    assert rows(SparseTarget.from_megatron(lists)) == approx(MEGATRON_ROWS + [{8: -3.0}, {}])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"bit_17": None}, "Megatron's payload has no bit_17"),
        ({"bit_17": torch.zeros(2, 2, 1, dtype=torch.bool)}, "micro-batch 0 has shapes"),
        ({"indices_low": torch.zeros(2, 2, 2, dtype=torch.int32)}, "micro-batch 0 has ids in torch.int32"),
        (
            {"values": torch.full((2, 2, 2), math.nan)},
            r"micro-batch 0: values\[0, 0, 0\] is nan, not a log-prob",
        ),
        ({"values": [MEGATRON["values"]]}, "lists of micro-batches beside single tensors"),
        ({"values": 5, "bit_17": [5], "indices_low": [5]}, "lists of micro-batches beside single tensors"),
        (
            {"values": [], "bit_17": [5], "indices_low": [5]},
            r"\[0, 1, 1\] micro-batches of values, indices_low and bit_17",
        ),
        ({name: [] for name in MEGATRON}, "payload has no micro-batch"),
        ({name: [None] for name in MEGATRON}, "micro-batch 0 has None, not an array of numbers"),
        (
            {name: [each, each[:1]] for name, each in MEGATRON.items()},
            "micro-batch 1 has 1 tokens a sequence, the first 2",
        ),
    ],
)
def test_megatron_malformed(change, says):
    payload = {k: v for k, v in (MEGATRON | change).items() if v is not None}
    with pytest.raises(ValueError, match=says):
        SparseTarget.from_megatron(payload)


# --- all ---------------------------------------------------------------------------------------


def test_arrays_of_any_integers():
    for dtype in (np.int32, np.uint16, np.uint32, np.uint64, np.float64):
        ids = np.array(DATASET_ROW["target_token_ids"]).astype(dtype)
        row = {name: np.array(DATASET_ROW[name]) for name in ("target_logprobs", "target_mask")}
        found = SparseTarget.from_axolotl(row | {"target_token_ids": ids})
        assert rows(found) == rows(SparseTarget.from_axolotl(DATASET_ROW))
        arrays = SimpleNamespace(token_ids=TOPK_NP.token_ids.astype(dtype), logprobs=TOPK_NP.logprobs)
        assert rows(SparseTarget.from_tinker(arrays)) == rows(SparseTarget.from_tinker(TOPK_NP))
    batch = {name: each.tolist() for name, each in BATCH.items()}
    assert rows(SparseTarget.from_axolotl(batch)) == rows(SparseTarget.from_axolotl(BATCH))
    arrays = {name: each.numpy() for name, each in MEGATRON.items()}
    assert rows(SparseTarget.from_megatron(arrays)) == approx(MEGATRON_ROWS)


# --- all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read, whose",
    [
        (SparseTarget.from_axolotl, "axolotl's row"),
        (SparseTarget.from_trl_server, "TRL's result"),
        (SparseTarget.from_megatron, "Megatron's payload"),
        (lambda row: SparseTarget.from_distillkit(row, RECOMMENDED), "DistillKit's row"),
        (lambda config: SparseTarget.from_distillkit({}, config), "DistillKit's config"),
    ],
)
def test_no_dict(read, whose):
    with pytest.raises(ValueError, match=f"{whose} is \\[5\\], not a dict"):
        read([5])
