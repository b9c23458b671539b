"""What test_shards has its processes make: the cases, by kind, and what is no case."""

import functools

import shard_cases
import shard_dtensors
import shard_mistakes
import shard_own_tokens
import shard_projects
import shard_properties
import shard_refusals
import shard_training
import torch
from shard_cases import Case
from sparse_problems import TAILS

import kdkernels as kd

HEADS = dict(student="head", teacher="head")
DIVERGENCES = [
    kd.ForwardKL(),
    kd.ReverseKL(),
    kd.JSD(0.3),
    kd.SkewKL(0.1),
    kd.SkewReverseKL(0.1, detach_mixture=True),
    kd.TotalVariation(),
    kd.AlphaBeta(0.3, 0.4),
    kd.Mixed(0.4),
]
MIX = dict(temperature=1.7, soft_weight=0.7, hard_weight=0.4, temperature_squared=True)
THREE = dict(divergence=(kd.JSD(0.3), kd.ForwardKL(), kd.Overlap()), reduction="none", temperature=1.7)
HARD = dict(soft_weight=0.0, hard_weight=1.0, label_smoothing=0.2, z_loss=1e-2)


def per_token(low):
    torch.manual_seed(7)
    return low + torch.rand(3, 5)


CASES = [
    *(Case(f"{d!r} of logits", {}, dict(divergence=d), ranks=2 + i % 3) for i, d in enumerate(DIVERGENCES)),
    *(
        Case(f"{d!r} of heads", HEADS, dict(divergence=d, **MIX), ranks=2 + (i + 1) % 3)
        for i, d in enumerate(DIVERGENCES)
    ),
    *(
        Case(
            f"{rows} rows in {dtype}",
            dict(rows=rows, dtype=dtype),
            dict(divergence=d, **MIX),
            ranks=3,
            split="even",
        )
        for rows, dtype, d in [
            ("ties", torch.bfloat16, kd.TotalVariation()),
            ("padding", torch.float32, kd.JSD()),
            ("padding", torch.bfloat16, kd.ForwardKL()),
            ("one-hot", torch.float32, kd.ReverseKL()),
            ("extreme", torch.float32, kd.ForwardKL()),
        ]
    ),
    Case("hard term of logits", {}, HARD, ranks=4, split="empty"),
    Case("hard term of heads", HEADS, dict(**HARD, reduction="sum"), ranks=3, split="empty"),
    Case(
        "everything at once",
        HEADS,
        dict(**MIX, label_smoothing=0.1, z_loss=1e-3, divergence=kd.JSD()),
        ranks=4,
    ),
    Case("cross entropy", {}, dict(label_smoothing=0.1), loss="cross_entropy", ranks=3),
    Case("the entropy of logits", {}, dict(entropy_weight=-0.7, **MIX), ranks=3, split="empty"),
    Case("the entropy of heads", HEADS, dict(entropy_weight=-0.7, chunk_bytes=3000, **MIX), ranks=2),
    Case("empty shards", HEADS, MIX, ranks=4, split="empty"),
    Case(
        "vocab_size inside a shard",
        HEADS,
        dict(vocab_size=50, label_smoothing=0.1, **MIX),
        ranks=3,
        split="even",
    ),
    Case("vocab_size leaves a rank nothing", {}, dict(vocab_size=40), ranks=4, split="even"),
    Case("bf16 heads", dict(dtype=torch.bfloat16, **HEADS), MIX, ranks=2),
    Case("fp16 heads", dict(dtype=torch.float16, scale=1.0, **HEADS), MIX, ranks=3),
    Case("fp64 heads", dict(dtype=torch.float64, **HEADS), dict(divergence=kd.SkewKL(0.2), **MIX), ranks=3),
    Case("softcap", dict(softcap=5.0, logit_scale=0.7, **HEADS), MIX, ranks=2),
    Case("no bias", dict(bias=False, **HEADS), dict(reduction="batchmean"), ranks=3),
    Case("head from logits", dict(student="head"), dict(divergence=kd.ReverseKL(), num_items=7), ranks=2),
    Case("logits from head", dict(teacher="head"), dict(divergence=kd.JSD(), **MIX), ranks=4),
    Case("token losses of logits", {}, dict(reduction="none", **MIX), ranks=2),
    *(
        Case(f"token losses of {dtype}", dict(dtype=dtype, scale=1.0), dict(reduction="none"), split="empty")
        for dtype in (torch.bfloat16, torch.float16)
    ),
    Case("in place", {}, dict(inplace=True, vocab_size=50, **MIX), ranks=3, split="even"),
    Case("token losses of heads", HEADS, dict(reduction="none", divergence=kd.JSD(), **MIX), ranks=3),
    Case("token numbers", HEADS, dict(temperature=per_token(0.5), hard_weight=per_token(0.0)), ranks=2),
    Case("token weights", HEADS, dict(token_weights=per_token(-0.5), divergence=kd.ReverseKL()), ranks=4),
    Case("chunks of tokens", HEADS, dict(chunk_bytes=8 * 61 * 4, **MIX), ranks=3),
    Case(
        "chunks of the shard",
        dict(shape=(40,), **HEADS),
        dict(chunk_bytes=3000, divergence=kd.JSD(), **MIX),
        ranks=2,
    ),
    Case("the eager backend", HEADS, dict(divergence=kd.ReverseKL(), **MIX), ranks=3, backend="eager"),
    Case(
        "dH summed in fp64",
        dict(dtype=torch.float64, **HEADS),
        MIX,
        shard=dict(reduce_dtype=torch.bfloat16),
        ranks=2,
    ),
]
SEVERAL = [
    Case("of logits", {}, THREE, "several", ranks=3, split="empty"),
    Case("of heads", HEADS, dict(chunk_bytes=3000, **THREE), "several", ranks=2),
]
TOGETHER = [
    Case("of logits", {}, MIX, "codistillation_loss", ranks=3),
    Case(
        "of heads",
        HEADS,
        dict(divergence=kd.ReverseKL(), label_smoothing=0.1, **MIX),
        "codistillation_loss",
        ranks=2,
    ),
    Case("token losses", HEADS, dict(reduction="none"), "codistillation_loss", ranks=2),
]
SPARSE = [
    *(
        Case(f"{tail}, {name}", problem, options, tail=tail, ranks=2 + i % 3, split=("even", "empty")[i % 2])
        for tail in TAILS
        for i, (name, problem, options) in enumerate(
            [
                ("logits", {}, dict(temperature=1.7, hard_weight=0.5)),
                ("head", dict(student="head"), dict(temperature=1.7)),
                ("token losses of a head", dict(student="head"), dict(reduction="none", hard_weight=0.5)),
            ]
        )
    ),
    Case("soft logits", {}, dict(temperature=1.7), tail="conditional", ranks=4, split="empty"),
    Case(
        "JSD",
        dict(student="head"),
        dict(divergence=kd.JSD(0.3), temperature_squared=True),
        tail="bucket",
        ranks=3,
    ),
    Case("ReverseKL", dict(student="head"), dict(divergence=kd.ReverseKL()), tail="conditional", ranks=4),
    Case(
        "a softcap",
        dict(student="head", softcap=5.0),
        dict(label_smoothing=0.1, hard_weight=0.3),
        tail="truncate",
    ),
    Case("chunks", dict(student="head", shape=(40,)), dict(chunk_bytes=3000), tail="bucket"),
    Case("the entropy", {}, dict(entropy_weight=0.3, temperature=1.7), tail="bucket", ranks=3, split="empty"),
    Case(
        "the entropy, token losses",
        dict(student="head"),
        dict(entropy_weight=-0.3, hard_weight=0.5, reduction="none", chunk_bytes=3000),
        tail="conditional",
    ),
]
LOOSE = Case(
    "tolerance", dict(scale=8.0, **HEADS), dict(gradient_tolerance=0.05, divergence=kd.ReverseKL()), ranks=3
)
OWN = [
    Case("mean", dict(shape=(15,), **HEADS), dict(divergence=kd.JSD(0.3), **MIX), ranks=3),
    Case("sum", dict(shape=(15,), **HEADS), MIX, ranks=4, shard=dict(data_parallel="sum"), split="empty"),
    Case("even, chunks", dict(shape=(15,), **HEADS), dict(chunk_bytes=8 * 61 * 4, **MIX), ranks=2),
    Case("token losses", dict(shape=(15,), **HEADS), dict(reduction="none", **MIX), ranks=3),
    Case("three divergences", dict(shape=(15,), **HEADS), THREE, "several", ranks=3),
    Case("sparse", dict(shape=(15,), student="head"), dict(hard_weight=0.5), tail="bucket", ranks=3),
    Case("stored", dict(shape=(15,), student="head"), dict(reduction="none"), tail="conditional", ranks=2),
    *(
        Case(
            f"another K on each, {given}",
            dict(shape=(15,), student="head", given=given),
            dict(hard_weight=0.5, reduction="none"),
            tail=tail,
            ranks=3,
            ragged=True,
        )
        for given, tail in [("logprobs", "bucket"), ("weights", "conditional")]
    ),
    Case(
        "policies, another K on each",
        dict(shape=(15,), softcap=5.0, **HEADS),
        dict(return_stats=True),
        "token_log_probs",
        ranks=3,
        ragged=True,
    ),
    Case(
        "policies",
        dict(shape=(15,), softcap=5.0, **HEADS),
        dict(temperature=per_token(0.5).flatten(), return_stats=True),
        "token_log_probs",
        ranks=3,
    ),
    Case(
        "policies, sum",
        dict(shape=(15,), **HEADS),
        dict(chunk_bytes=3000, return_stats=True),
        "token_log_probs",
        ranks=4,
        shard=dict(data_parallel="sum"),
        split="empty",
    ),
]
DIFFERENT = [
    "tokens",
    "a number",
    "an option",
    "dtype",
    "labels",
    *shard_refusals.VALUES,
    *shard_refusals.WRONG,
    *shard_refusals.OF_HEADS,
]
POLICIES = [
    Case("of logits", {}, dict(temperature=1.7), "token_log_probs", ranks=3, split="empty"),
    Case("of heads", dict(softcap=5.0, **HEADS), dict(chunk_bytes=3000), "token_log_probs", ranks=4),
    Case("of bf16 heads", dict(dtype=torch.bfloat16, **HEADS), {}, "token_log_probs", ranks=2),
    Case("vocab_size", {}, dict(vocab_size=50), "token_log_probs", ranks=3, split="even"),
    Case("in place", {}, dict(inplace=True, vocab_size=50), "token_log_probs", ranks=3, split="even"),
    Case("bf16", dict(dtype=torch.bfloat16), {}, "token_log_probs", split="empty"),
]
STATS = [
    Case("stats of a sparse target", {}, dict(return_stats=True, hard_weight=0.5), tail="bucket", ranks=3),
    Case(
        "stats",
        dict(rows="ties", dtype=torch.bfloat16),
        dict(return_stats=True, **MIX),
        ranks=3,
        split="even",
    ),
    Case(
        "stats of heads", HEADS, dict(return_stats=True, divergence=kd.JSD(), **MIX), ranks=4, split="empty"
    ),
]


REFUSED = [
    "another width",
    "a whole teacher",
    "another range of the teacher",
    "a gap",
    "starts on one rank only",
    "an empty vocabulary",
    "a backend that fails on one rank",
    "logits of own tokens",
    "two kinds of shards",
    "the oracle",
    "create_graph",
]


#: What is no Case: the name, and what each of three ranks makes.
OTHERS = {
    "mistake in sparse targets": shard_mistakes.mistaken_sparse,
    "Megatron": shard_projects.megatrons,
    "Megatron's output": shard_projects.megatrons_output,
    "ModelOpt": shard_projects.modelopt_losses,
    "split logits": shard_projects.of_split_logits,
    "dtensors": shard_dtensors.dtensors,
    "dtensors of own tokens": shard_dtensors.dtensors_of_own_tokens,
    "autocast": shard_properties.autocast,
    "heads of meshes": shard_dtensors.heads_of_meshes,
    "refused dtensors": shard_refusals.refused_dtensors,
    "compiled": shard_properties.compiled,
    "made while compiling": shard_properties.shard_made_while_compiling,
    "inplace views": shard_properties.inplace_views,
    **{
        f"trained by {wrapper}": functools.partial(shard_training.trained, wrapper)
        for wrapper in ("DDP", "FSDP2")
    },
    "trained by FSDP2 with tied embeddings": shard_training.trained_with_tied_embeddings,
    "reshard_head": shard_properties.resharded,
    "global_tokens": shard_properties.counted_tokens,
    "nan": shard_properties.nan,
    "twice": shard_properties.twice,
    "own tokens twice": shard_own_tokens.own_tokens_twice,
    "masked on one rank": shard_own_tokens.masked_on_one_rank,
    "own dH": shard_properties.own_dh,
    "unbroken": functools.partial(shard_cases.sharded, shard_mistakes.BROKEN),
    **{
        f"mistake: {mistake}": functools.partial(shard_mistakes.mistaken, mistake)
        for mistake in shard_mistakes.MISTAKES
    },
}


def everything():
    """(key, number of ranks, function, its arguments but the group) of each."""
    cases_of = [
        ("policies", POLICIES),
        ("loose", [LOOSE]),
        ("exact", CASES),
        ("several", SEVERAL),
        ("codistilled", TOGETHER),
        ("sparse", SPARSE),
        ("stats", STATS),
    ]
    given = [
        ((kind, case.name), case.ranks, shard_cases.sharded, case)
        for kind, cases in cases_of
        for case in cases
    ]
    given += [(("refused", name), 3, shard_refusals.refused, name) for name in REFUSED]
    given += [(("own tokens", case.name), case.ranks, shard_own_tokens.own_tokens, case) for case in OWN]
    given += [(("different", name), 3, shard_refusals.other_arguments, name) for name in DIFFERENT]
    given += [("two dimensions", 4, shard_dtensors.two_dimensions)]
    given += [(name, 3, function) for name, function in OTHERS.items()]
    return given
