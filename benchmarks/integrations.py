"""``python -m benchmarks.integrations [--out FILE]``: what each drop-in saves beside the original.

Every measurement is a process of its own: peak resident memory of one forward and backward above its
inputs, the gradients included. Time is for ``python -m benchmarks``, which has the peers in one run.
``--fill FILE`` fills the table in docs of trainers from a committed result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import pages
from benchmarks.machine import describe
from benchmarks.memory import resident_peak
from benchmarks.peers.axolotl import axolotl_module
from benchmarks.peers.installed import original_module

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
PACKAGES = (
    "torch",
    "trl",
    "transformers",
    "liger-kernel",
    "torchtune",
    "axolotl",
    "nvidia-modelopt",
    "speculators",
    "verl",
    "ms-swift",
    "unsloth_zoo",
)
VOCAB, WIDTH, SLOTS = 65536, 64, 32


class Pair(NamedTuple):
    """The loss of one problem, as the original computes it and as kdkernels does."""

    theirs: Callable[[], torch.Tensor]
    ours: Callable[[], torch.Tensor]


def logits(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student (as a leaf), teacher, labels of which a quarter is masked."""
    student, teacher = torch.randn(1, tokens, VOCAB), torch.randn(1, tokens, VOCAB)
    labels = torch.randint(0, VOCAB, (1, tokens))
    labels[:, : tokens // 4] = -100
    return student.requires_grad_(), teacher, labels


def hidden(tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(hidden, weight) of both models, the student's as leaves."""
    make = lambda: [torch.randn(1, tokens, WIDTH), torch.randn(VOCAB, WIDTH) / WIDTH**0.5]  # noqa: E731
    return [leaf.requires_grad_() for leaf in make()], make()


def on_logits(theirs: Callable[..., Any], ours: Callable[..., Any], tokens: int) -> Pair:
    s, t, labels = logits(tokens)
    return Pair(lambda: theirs(s, t, labels), lambda: ours(s, t, labels))


def trl_distillation(tokens: int) -> Pair:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    from kdkernels.integrations.trl import chunked_divergence_loss

    (h, w), (th, tw) = hidden(tokens)
    given = h, th, w, tw, torch.ones(1, tokens), 0.5
    return Pair(lambda: _chunked_divergence_loss(*given)[0], lambda: chunked_divergence_loss(*given)[0])


def trl_gkd(tokens: int) -> Pair:
    from trl.experimental.gkd import GKDTrainer

    from kdkernels.integrations.trl import generalized_jsd_loss

    return on_logits(GKDTrainer.generalized_jsd_loss, generalized_jsd_loss, tokens)


def trl_server(tokens: int) -> Pair:
    from trl.experimental.server_distillation import ServerDistillationTrainer

    from kdkernels.integrations.trl import server_compute_loss

    theirs = ServerDistillationTrainer.compute_loss
    s, t, _ = logits(tokens)
    top = t[:, :-1].log_softmax(-1).topk(SLOTS, -1)
    trainer: Any = object.__new__(ServerDistillationTrainer)
    trainer.beta, trainer.temperature, trainer.loss_add_tail = 0.0, 1.0, True
    trainer.model = SimpleNamespace(training=False)
    trainer._get_teacher_token_logprobs_from_server = lambda inputs, start: {
        "topk_logprobs": top.values,
        "topk_token_ids": top.indices,
        "actual_logprobs": top.values[..., 0],
    }
    inputs = {
        f"{part}_{what}": torch.ones(1, size, dtype=torch.int64)
        for what in ("ids", "mask")
        for part, size in (("prompt", 1), ("completion", tokens - 1))
    }
    model = lambda input_ids, attention_mask: SimpleNamespace(logits=s)  # noqa: E731
    return Pair(lambda: theirs(trainer, model, inputs), lambda: server_compute_loss(trainer, model, inputs))


def liger(tokens: int) -> Pair:
    from liger_kernel import chunked_loss

    from kdkernels.integrations import liger as dropin

    (h, w), (th, tw) = hidden(tokens)
    given = h[0], w, th[0], tw, torch.randint(0, VOCAB, (tokens,))
    theirs, ours = (m.LigerFusedLinearJSDLoss(compiled=False) for m in (chunked_loss, dropin))
    return Pair(lambda: theirs(*given), lambda: ours(*given))


def torchtune(tokens: int) -> Pair:
    from kdkernels.integrations import torchtune as dropin

    original = original_module("torchtune", "torchtune/modules/loss/kd_losses.py")
    theirs, ours = (m.ForwardKLWithChunkedOutputLoss() for m in (original, dropin))
    in_chunks = lambda loss: lambda s, t, y: loss(s.chunk(8, 1), t.chunk(8, 1), y)  # noqa: E731
    return on_logits(in_chunks(theirs), in_chunks(ours), tokens)


def axolotl(tokens: int) -> Pair:
    from kdkernels.integrations import axolotl as dropin

    (h, w), (th, tw) = hidden(tokens)
    top = (th @ tw.t()).log_softmax(-1).topk(SLOTS, -1)
    labels = torch.randint(0, VOCAB, (1, tokens))
    given = w, h, top.indices, top.values.log_softmax(-1), torch.ones(1, tokens, SLOTS), labels
    theirs, ours = (
        m.LigerFusedLinearKLTopKLogprobLoss(beta=0.0, compiled=False) for m in (axolotl_module(), dropin)
    )
    return Pair(lambda: theirs(*given), lambda: ours(*given))


def modelopt(tokens: int) -> Pair:
    from kdkernels.integrations import modelopt as dropin

    original = original_module("nvidia-modelopt", "modelopt/torch/distill/losses.py")
    theirs, ours = (m.LogitsDistillationLoss(2.0, reduction="none") for m in (original, dropin))
    return on_logits(lambda s, t, y: theirs(s, t).mean(), lambda s, t, y: ours(s, t).mean(), tokens)


def speculators(tokens: int) -> Pair:
    from kdkernels.integrations import speculators as dropin

    original = original_module("speculators", "speculators/losses/eager.py")
    theirs, ours = (m.lk_hybrid_loss for m in (original, dropin))
    return on_logits(lambda s, t, y: theirs(s, t).mean(), lambda s, t, y: ours(s, t).mean(), tokens)


def trl_log_probs(tokens: int) -> Pair:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    from kdkernels.integrations.trl import selective_log_softmax_and_entropy as dropin

    both = lambda function: lambda s, t, y: sum(x.sum() for x in function(s, y.clamp(min=0)))  # noqa: E731
    return on_logits(both(selective_log_softmax_and_entropy), both(dropin), tokens)


def trl_fused_log_probs(tokens: int) -> Pair:
    from trl.kernels import ChunkedLogProbFunction as Theirs
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    from kdkernels.integrations.trl import ChunkedLogProbFunction as Ours

    (h, w), _ = hidden(tokens)
    given = h[0], w, None, torch.randint(0, VOCAB, (tokens,)), 1.0, CHUNK, None, 1.0, ("entropy",)
    both = lambda function: lambda: sum(x.sum() for x in function.apply(*given)[:2])  # noqa: E731
    return Pair(both(Theirs), both(Ours))


def trl_self_distillation(tokens: int) -> Pair:
    from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

    from kdkernels.integrations.trl import topk_self_distillation_loss

    options: dict[str, Any] = dict(
        distillation_topk=SLOTS, distillation_alpha=0.5, distillation_add_tail=True
    )
    summed = lambda loss: lambda s, t, y: loss(s, t, **options).sum()  # noqa: E731
    return on_logits(summed(compute_topk_self_distillation_loss), summed(topk_self_distillation_loss), tokens)


def trl_async(tokens: int) -> Pair:
    from trl.experimental.async_distillation.async_distillation_trainer import (
        _CHUNKED_LM_HEAD_CHUNK_SIZE,
        _chunked_jsd_loss,
    )

    from kdkernels.integrations.trl import async_chunked_jsd_loss

    (h, w), (th, tw) = hidden(tokens)
    top = (th[0] @ tw.t()).log_softmax(-1).topk(SLOTS, -1)
    real = torch.ones(tokens, SLOTS, dtype=torch.bool)
    told = top.indices, top.values, real, 0.5, 1.0, True, None, 1
    given = h[0], w, None, 1.0, None, *told, _CHUNKED_LM_HEAD_CHUNK_SIZE
    return Pair(lambda: _chunked_jsd_loss(*given)[0], lambda: async_chunked_jsd_loss(*given)[0])


def trl_iw_opd(tokens: int) -> Pair:
    from collections import defaultdict

    from trl.experimental.iw_opd import IWOPDTrainer

    from kdkernels.integrations.trl import iw_opd_compute_loss, iw_opd_loss

    s, t, labels = logits(tokens)
    inputs = dict(input_ids=labels.clamp(min=0), attention_mask=torch.ones(1, tokens), labels=labels)
    model = lambda input_ids, attention_mask: SimpleNamespace(logits=s)  # noqa: E731

    def loss_of(compute: Callable[..., torch.Tensor], **own: Any) -> Callable[[], torch.Tensor]:
        trainer: Any = object.__new__(IWOPDTrainer)
        trainer.__dict__.update(
            temperature=1.0,
            distillation_objective="iw_opd",
            iw_opd_gamma=0.5,
            iw_opd_epsilon=1e-8,
            use_teacher_server=False,
            model=SimpleNamespace(training=True),
            _metrics=defaultdict(lambda: defaultdict(list)),
            _raise_if_local_teacher_tokenizer_mismatch=lambda: None,
            _compute_prompt_length=lambda inputs: 1,
            _get_teacher_logits=lambda inputs: t,
            **own,
        )
        if own:
            trainer._compute_iw_opd_loss = iw_opd_loss.__get__(trainer)
        return lambda: compute(trainer, model, inputs)

    return Pair(loss_of(IWOPDTrainer.compute_loss), loss_of(iw_opd_compute_loss, ours=True))


def liger_log_probs(tokens: int) -> Pair:
    from kdkernels.integrations import liger as dropin

    original = original_module("liger-kernel", "liger_kernel/ops/fused_linear_scaled_cross_entropy.py")
    (h, w), _ = hidden(tokens)
    target, ids = torch.randint(0, VOCAB, (tokens,)), torch.arange(SLOTS)

    def both(module: Any) -> Callable[[], torch.Tensor]:
        function = module.LigerFusedLinearScaledCrossEntropyFunction
        return lambda: sum(
            x.sum() for x in function.apply(h[0], w, target, return_entropy=True, selected_token_ids=ids)
        )

    return Pair(both(original), both(dropin))


def swift(tokens: int) -> Pair:
    from kdkernels.integrations import swift as dropin

    original = original_module("ms-swift", "swift/rlhf_trainers/gkd_loss.py")
    theirs, ours = (lambda s, t, y, m=m: m.jsd_loss(s[0], t[0], 0.5) for m in (original, dropin))
    return on_logits(theirs, ours, tokens)


def unsloth(tokens: int) -> Pair:
    from kdkernels.integrations import unsloth as dropin

    original = original_module("unsloth_zoo", "unsloth_zoo/speculative/losses.py")
    (h, w), (th, tw) = hidden(tokens)
    given = h, w, torch.randint(0, VOCAB, (1, tokens)), "lk_hybrid", th, tw
    theirs, ours = (lambda m=m: m.chunked_lm_loss(*given)[0] for m in (original, dropin))
    return Pair(theirs, ours)


def verl(tokens: int) -> Pair:
    from kdkernels.integrations import verl as dropin

    original = original_module("verl", "verl/utils/experimental/torch_functional.py")
    (h, w), _ = hidden(tokens)
    given = h, w, torch.randint(0, VOCAB, (1, tokens))
    theirs, ours = (m.FusedLinearForPPO() for m in (original, dropin))
    return Pair(lambda: sum(x.sum() for x in theirs(*given)), lambda: sum(x.sum() for x in ours(*given)))


def functional(tokens: int) -> Pair:
    from kdkernels.integrations.functional import kl_div

    s, t, _ = logits(tokens)
    x, y = s.detach().log_softmax(-1).requires_grad_(), t.log_softmax(-1)
    options: dict[str, Any] = dict(reduction="batchmean", log_target=True)
    return Pair(lambda: F.kl_div(x, y, **options), lambda: kl_div(x, y, **options))


class Case(NamedTuple):
    trainer: str
    build: Callable[[int], Pair]
    tokens: int
    before: str
    after: str
    differs: str


_IMPORT = "from kdkernels.integrations"
CASES = {
    case.build.__name__: case
    for case in (
        Case(
            "TRL DistillationTrainer",
            trl_distillation,
            2048,
            "`trainer.train()`",
            f"`{_IMPORT} import trl; trl.patch()`",
            "bf16 on a CPU: logits are rounded as the model's lm_head does",
        ),
        Case(
            "TRL GKDTrainer, GOLDTrainer",
            trl_gkd,
            512,
            "`trainer.train()`",
            "the same `trl.patch()`",
            'bf16 logits: rows in fp32; all masked with "mean": 0, not NaN',
        ),
        Case(
            "TRL ServerDistillationTrainer",
            trl_server,
            512,
            "`trainer.train()`",
            "the same `trl.patch()`",
            "the student's tail is not clamped at 1e-7",
        ),
        Case(
            "Liger `LigerFusedLinearJSDLoss`",
            liger,
            2048,
            "`from liger_kernel.chunked_loss import ...`",
            f"`{_IMPORT}.liger import ...`",
            "a longer teacher vocabulary is cut, not met with logits of 0",
        ),
        Case(
            "torchtune `ForwardKLWithChunkedOutputLoss`",
            torchtune,
            512,
            "`_component_: torchtune.modules.loss.ForwardKLWithChunkedOutputLoss`",
            "`_component_: kdkernels.integrations.torchtune.ForwardKLWithChunkedOutputLoss`",
            "the value is the KL: lower by the teacher's entropy; same gradient",
        ),
        Case(
            "axolotl KD trainer",
            axolotl,
            2048,
            "`trainer.train()`",
            f"`{_IMPORT} import axolotl; axolotl.replace(trainer)`",
            "T² is on the gradient too; padding slots take no part",
        ),
        Case(
            "ModelOpt `LogitsDistillationLoss` for `mtd.convert`",
            modelopt,
            512,
            "`from modelopt.torch.distill import LogitsDistillationLoss`",
            f"`{_IMPORT}.modelopt import LogitsDistillationLoss`",
            "bf16 logits: rows in fp32",
        ),
        Case(
            "speculators, draft models",
            speculators,
            512,
            "`trainer.train()`",
            f"`{_IMPORT} import speculators; speculators.patch()`",
            "`nla` has no floor at an acceptance of 1e-5",
        ),
        Case(
            "TRL's log-probabilities and entropies",
            trl_log_probs,
            512,
            "`trainer.train()`",
            "the same `trl.patch()`",
            "bf16 logits: fp32; at -inf the entropy is finite",
        ),
        Case(
            "TRL's log-probabilities on hidden states",
            trl_fused_log_probs,
            2048,
            "`trainer.train()`",
            "the same `trl.patch()`",
            "under ZeRO-3 it is TRL's own",
        ),
        Case(
            "TRL SDFT, SDPO",
            trl_self_distillation,
            512,
            "`trainer.train()`",
            "the same `trl.patch()`",
            "the mass beside the top k is not clamped at 1e-7",
        ),
        Case(
            "TRL AsyncDistillationTrainer",
            trl_async,
            2048,
            "`trainer.train()`",
            "the same `trl.patch()`",
            "bf16 on a CPU: logits are rounded as the model's lm_head does",
        ),
        Case(
            "TRL IWOPDTrainer",
            trl_iw_opd,
            512,
            "`trainer.train()`",
            "the same `trl.patch()`",
            "bf16 logits: fp32",
        ),
        Case(
            "Liger `LigerFusedLinearScaledCrossEntropyFunction`",
            liger_log_probs,
            2048,
            "`from liger_kernel.ops import ...`",
            f"`{_IMPORT}.liger import ...`",
            "the entropy is fp32",
        ),
        Case(
            "ms-swift GKD",
            swift,
            512,
            "`trainer.train()`",
            f"`{_IMPORT} import swift; swift.patch()`",
            "bf16 logits: rows in fp32; -inf in both models is no term, not NaN",
        ),
        Case(
            "unsloth_zoo `chunked_lm_loss`",
            unsloth,
            2048,
            "`trainer.train()`",
            f"`{_IMPORT} import unsloth; unsloth.patch()`",
            "-inf in both models is no term, not NaN",
        ),
        Case(
            "verl `FusedLinearForPPO`",
            verl,
            2048,
            "`trainer.train()`",
            f"`{_IMPORT} import verl; verl.patch()` in every worker",
            "the entropy is fp32",
        ),
        Case(
            "your own `F.kl_div` on log-probabilities",
            functional,
            512,
            "`import torch.nn.functional as F`",
            f"`{_IMPORT} import functional as F`",
            "0 log 0 = 0, not NaN; not twice differentiable",
        ),
    )
}
SIDES = ("theirs", "ours")


def measure(name: str, side: str) -> int:
    """Bytes of one side of one case, in this process."""
    case = CASES[name]
    torch.manual_seed(0)
    getattr(case.build(8), side)().backward()  # the first call loads and compiles; not counted
    pair = case.build(case.tokens)
    with resident_peak() as peak:
        getattr(pair, side)().backward()
    return peak.bytes


def in_process(name: str, side: str) -> int:
    command = [sys.executable, "-m", "benchmarks.integrations", "--one", name, side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    where = result["machine"]
    versions = ", ".join(
        f"{name} {where['versions'][name]}" for name in PACKAGES if name in where["versions"]
    )
    lines = ["| trainer | before | after | peak of the loss, MiB | what differs |", "|---|---|---|---|---|"]
    for name, peaks in result["peak_bytes"].items():
        case, (theirs, ours) = CASES[name], (peaks[side] / 2**20 for side in SIDES)
        lines.append(
            f"| {case.trainer} | {case.before} | {case.after} | {theirs:.0f} → {ours:.0f} | {case.differs} |"
        )
    tokens = sorted({CASES[name].tokens for name in result["peak_bytes"]})
    return "\n".join(
        lines
        + [
            "",
            f"One forward and backward, original → kdkernels, fp32, vocabulary {VOCAB}; {tokens[0]} tokens where logits",
            f"are given (so one `[tokens, vocab]` tensor is {tokens[0] * VOCAB * 4 // 2**20} MiB; the peak holds the",
            f"gradient), {tokens[-1]} where hidden states of width {WIDTH} are. On a GPU TRL and Liger have other kernels.",
            f"{where['name']}, {where['date'][:10]}; {versions}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the result here, as JSON")
    parser.add_argument(
        "--fill", metavar="RESULT", help="fill the table of trainers in docs from a result, measure nothing"
    )
    parser.add_argument("--one", nargs=2, metavar=("CASE", "SIDE"), help="measure one side in this process")
    given = parser.parse_args()
    if given.fill:
        return pages.fill("integrations", table(json.loads(Path(given.fill).read_text())))
    if given.one:
        return print(measure(*given.one))
    peaks = {name: {side: in_process(name, side) for side in SIDES} for name in CASES}
    result = {"machine": describe("cpu"), "peak_bytes": peaks}
    print(table(result))
    if given.out:
        Path(given.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
