"""kdkernels inside TRL's trainers: ``patch()`` replaces their losses, ``unpatch()`` puts them back.

====================================  =====================================================
trainer                               what is replaced
====================================  =====================================================
``DistillationTrainer``               ``trl.trainer.distillation_trainer._chunked_divergence_loss``
``experimental.gkd.GKDTrainer``       ``generalized_jsd_loss``
``experimental.gold.GOLDTrainer``     ``generalized_jsd_loss``
``ServerDistillationTrainer``         ``compute_loss`` (in ``experimental.server_distillation``)
``experimental.sdft``, ``.sdpo``      ``compute_topk_`` and ``compute_full_logit_self_distillation_loss``
``experimental.async_distillation``   ``_chunked_jsd_loss``
``experimental.iw_opd``               ``compute_loss`` and ``_compute_iw_opd_loss``
all with log-probabilities or         ``selective_log_softmax``, ``entropy_from_logits``,
entropies                             ``selective_log_softmax_and_entropy``, ``_ChunkedLogProbFunction``
====================================  =====================================================

Signatures and values are TRL's. What differs, on purpose (each is a test in
``tests/integrations/test_trl_losses.py``):

* half-precision logits: the row arithmetic is fp32 and so is the loss; TRL's is in the logits' dtype;
* ``reduction="mean"`` with every token masked is 0 with a zero gradient; TRL's is NaN;
* async distillation: a bf16 model's logits are rounded as its lm_head does, where TRL multiplies in fp32;
* log-probabilities and entropies of half-precision logits are fp32; TRL's are in the logits' dtype without Triton. At
  logits of -inf the entropy is that of the others, with a finite gradient; TRL's is NaN there;
* the fused lm_head's is TRL's own under ZeRO-3, whose parameters are gone when the backward comes;
* self-distillation on the student's top k: the mass that it leaves is not clamped at 1e-7;
* server distillation: TRL clamps the stored mass to 1 - 1e-7, where the student's gradient stops; here it
  goes on, and teacher masses that sum to more than 1.0001 are a ValueError;
* an lm_head that FSDP2 shards as a unit of its own gets the mean of the ranks' gradients; with TRL a rank
  keeps its slice of the gradient of its own data;
* IW-OPD's own objective alone is replaced; with ``distillation_objective="jsd"`` that trainer's losses are TRL's;
* vocabularies that differ, beta outside [0, 1] and ``num_items_in_batch=0`` are a ValueError.

TRL took ``MiniLLMTrainer`` out before 1.16; :func:`minillm_single_step_loss` has its loss's signature
for those who kept a copy of that trainer.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergences import JSD, simplified
from ..heads import MappedLogits
from ..log_probs import token_log_probs
from ..losses import js_divergence
from ..options import Reduction
from ..producers import target_at
from ..targets import SparseTarget, Tail
from .common import IGNORED, head
from .patches import Patch, Patches, Target
from .trl_log_probs import (
    ChunkedLogProbFunction,
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)

#: The versions that the test suite is run with: from the first, below the second.
TESTED = ((1, 16), (1, 17))
_ASYNC = "trl.experimental.async_distillation.async_distillation_trainer"


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, sum of the student's entropies in nats, unmasked tokens), as TRL's function gives them.

    Hidden states are ``[B, K, H]`` (the widths may differ), weights ``[V, H]`` (DTensors and ZeRO-3
    parameters are gathered once), the mask ``[B, K]``. The loss is the sum over unmasked tokens
    divided by ``num_items_in_batch``, or their mean. It needs two products of the hidden states with
    each head and two more for the gradients, where TRL projects again in every pass.
    """
    zero3: Any = importlib.import_module("trl.trainer.utils").maybe_gather_lm_head_ctx
    with (
        zero3(student_lm_head_weight, student_lm_head_bias),
        zero3(teacher_lm_head_weight, teacher_lm_head_bias),
    ):
        student = head(
            student_hidden_states,
            student_lm_head_weight,
            student_lm_head_bias,
            logit_scale=student_logit_scale,
            softcap=student_final_logit_softcapping,
        )
        teacher = head(
            teacher_hidden_states,
            teacher_lm_head_weight,
            teacher_lm_head_bias,
            logit_scale=teacher_logit_scale,
            softcap=teacher_final_logit_softcapping,
        )
        loss, stats = js_divergence(
            student,
            teacher,
            mask=completion_mask != 0,
            beta=beta,
            temperature=temperature,
            num_items=_items(num_items_in_batch, student_hidden_states),
            return_stats=True,
        )
    return loss, stats.student_entropy * stats.tokens, stats.tokens


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """GKD's loss: logits ``[B, T, V]``, labels ``[B, T]`` of which only -100 matters.

    ``reduction="batchmean"`` is the mean over unmasked tokens, or sum / B without labels; "mean"
    divides by V as well; any other name than these and "sum" gives the unreduced terms, ``[tokens, V]``
    with labels. ``num_items_in_batch`` divides the sum and overrides the reduction.
    """
    if num_items_in_batch is None and reduction not in ("batchmean", "sum", "mean"):
        log_q, log_p = ((z / temperature).log_softmax(-1) for z in (student_logits, teacher_logits))
        return _terms(log_q, log_p, beta, labels)
    per_term = num_items_in_batch is None and reduction == "mean"
    ours: Reduction = "mean"
    if num_items_in_batch is not None or reduction == "sum":
        ours = "sum"
    elif labels is None and reduction == "batchmean":
        ours = "batchmean"
    loss = js_divergence(
        student_logits,
        teacher_logits,
        mask=None if labels is None else labels != IGNORED,
        beta=beta,
        temperature=temperature,
        reduction=ours,
        num_items=_items(num_items_in_batch, student_logits),
    )
    return loss / student_logits.shape[-1] if per_term else loss


def gold_generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """GOLD's loss: :func:`generalized_jsd_loss`, and ULD's form of it on probabilities.

    With ``logits_are_probs`` the rows are parts of distributions, which need not sum to 1, and the
    terms are taken as they are: nothing is saved there.
    """
    if not logits_are_probs:
        return generalized_jsd_loss(
            student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
        )
    log_q, log_p = (x.clamp_min(1e-8).log() for x in (student_logits, teacher_logits))
    terms = _terms(log_q, log_p, beta, labels)
    if num_items_in_batch is not None:
        return terms.sum() / _items(num_items_in_batch, terms)
    if reduction == "batchmean":
        return terms.sum() / max(terms.shape[0], 1)
    return {"sum": Tensor.sum, "mean": Tensor.mean}.get(reduction, Tensor.clone)(terms)


def minillm_single_step_loss(
    self: Any,
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """The reverse KL of MiniLLM (arXiv 2306.08543), as ``MiniLLMTrainer._single_step_decomposition_loss``
    had it in TRL up to 1.14: log-probabilities or logits ``[B, T, V]``, mask ``[B, T]``.

    Written as a method, so that it can take that one's place in a class. Reductions are those of
    :func:`generalized_jsd_loss`. Pass the logits, divided by the temperature, and neither
    ``log_softmax`` is needed.

    >>> s, t = torch.randn(2, 3, 10, requires_grad=True), torch.randn(2, 3, 10)
    >>> minillm_single_step_loss(None, s, t, torch.ones(2, 3, dtype=torch.bool)).backward()
    """
    labels = None if mask is None else torch.where(mask != 0, 0, IGNORED)
    return generalized_jsd_loss(student_log_probs, teacher_log_probs, labels, beta=1.0, reduction=reduction)


def server_compute_loss(
    self: Any,
    model: Any,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Any:
    """``ServerDistillationTrainer.compute_loss``: the divergence on what a teacher's server tells.

    The student's logits are read once, as they are: no log-softmax over the vocabulary, no copy. The
    server's log-probabilities are at the trainer's temperature already, so only the student's logits are
    divided by it, in the pass that reads them, and the loss is taken at 1. As in TRL it is the local
    mean over tokens, whatever ``num_items_in_batch`` says.
    """
    prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
    prompt_mask, completion_mask = inputs["prompt_mask"], inputs["completion_mask"]
    labels = torch.cat(
        [torch.full_like(prompt, IGNORED), completion.where(completion_mask.bool(), IGNORED)], 1
    )
    inputs = {
        **inputs,
        "input_ids": torch.cat([prompt, completion], 1),
        "attention_mask": torch.cat([prompt_mask, completion_mask], 1),
        "labels": labels,
        "prompt_attention_mask": prompt_mask,
    }
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    start = self._compute_prompt_length(inputs)
    from_server = self._get_teacher_token_logprobs_from_server(inputs, start)
    # Spread over all positions instead of slicing the logits: the slice's gradient would be a copy.
    logits, window = outputs.logits, slice(start, start + from_server["actual_logprobs"].shape[1])
    around = (start - 1, logits.shape[1] - window.stop + 1)
    from_server = {name: F.pad(x, (0, 0) * (x.dim() - 2) + around) for name, x in from_server.items()}
    tokens = F.pad(inputs["input_ids"][:, window], around)
    unmasked = F.pad(labels[:, window] != IGNORED, around)
    loss = js_divergence(
        MappedLogits(logits, 1 / self.temperature),
        _server_target(self, from_server, logits, tokens, unmasked),
        mask=unmasked,
        beta=self.beta,
    )
    if self.model.training:
        loss = loss / self.current_gradient_accumulation_steps
    return (loss, outputs) if return_outputs else loss


def _server_target(
    trainer: Any, from_server: dict[str, Tensor], logits: Tensor, tokens: Tensor, unmasked: Tensor
) -> SparseTarget:
    """The forward KL looks at the teacher's top k; other betas at its top 1 and the sampled token,
    beta = 1 at the sampled token alone."""
    tail: Tail = "bucket" if trainer.loss_add_tail else "conditional"
    top, top_ids, actual = (
        from_server[name] for name in ("topk_logprobs", "topk_token_ids", "actual_logprobs")
    )
    if trainer.beta == 0:
        return SparseTarget(top_ids, top, tail=tail)
    needed = {"actual-token": actual} if trainer.beta == 1 else {"actual-token": actual, "top-1": top[..., 0]}
    for name, values in needed.items():
        missing = int((unmasked & ~values.isfinite()).sum())
        if missing:
            raise ValueError(
                f"the teacher server gave no {name} logprobs for {missing} of {int(unmasked.sum())} "
                f"completion tokens, and beta={trainer.beta} needs them"
            )
    sampled = trainer._get_reverse_kl_top_1_tokens(logits, tokens)
    if trainer.beta == 1:
        return SparseTarget(sampled[..., None], actual[..., None], tail=tail)
    ids = torch.stack([top_ids[..., 0], sampled], -1)
    both = torch.stack([torch.ones_like(sampled, dtype=torch.bool), ids[..., 0] != ids[..., 1]], -1)
    return SparseTarget(ids, torch.stack([top[..., 0], actual], -1), mask=both, tail=tail)


def topk_self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> Tensor:
    """SDFT's and SDPO's loss over the student's own top k, per token ``[...]``: JSD(alpha) of the distributions over
    these ids and their rest, or over the ids alone."""
    ids = student_logits.detach().topk(distillation_topk, -1).indices
    target = target_at(teacher_logits, ids, tail="bucket" if distillation_add_tail else "conditional")
    return js_divergence(student_logits, target, beta=distillation_alpha, reduction="none")


def full_logit_self_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, distillation_alpha: float
) -> Tensor:
    """SDFT's and SDPO's loss over the whole vocabulary, per token ``[...]``."""
    return js_divergence(student_logits, teacher_logits, beta=distillation_alpha, reduction="none")


def async_chunked_jsd_loss(
    hidden_valid: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    logit_scale: float,
    final_logit_softcapping: float | None,
    target_ids: Tensor,
    teacher_target_logps: Tensor,
    valid_candidate_mask: Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: Tensor | None,
    num_teachers: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, its value, the student's and the teachers' entropies, and for each teacher tokens, loss and entropy):
    sums over tokens ``[N]``, of which a teacher's server told the log-probabilities of candidates ``[N, K]``.

    The student's at these ids and its entropy come from one projection of the hidden states ``[N, H]``; what follows
    is K + 1 numbers a token, by TRL's own functions.
    """
    theirs: Any = importlib.import_module(_ASYNC)
    student = head(
        hidden_valid,
        lm_head_weight,
        lm_head_bias,
        logit_scale=logit_scale,
        softcap=final_logit_softcapping,
    )
    ids = target_ids.where(valid_candidate_mask, -1)
    of = token_log_probs(student, ids, temperature=temperature, entropy=True)
    assert of.entropy is not None
    log_q, log_p = (
        given.masked_fill(~valid_candidate_mask, -torch.inf) for given in (of.log_probs, teacher_target_logps)
    )
    if add_tail_bucket:
        log_q, support = theirs._add_tail_bucket(log_q, valid_candidate_mask)
        log_p, _ = theirs._add_tail_bucket(log_p, valid_candidate_mask)
    else:
        log_q, log_p = (given.log_softmax(-1) for given in (log_q, log_p))
        support = valid_candidate_mask
    each = theirs._jsd_divergence(log_q, log_p, beta=beta, support_mask=support).sum(-1)
    teacher_entropy = torch.special.entr(log_p.exp().where(support, 0.0)).sum(-1).nan_to_num(nan=0.0)
    per_teacher = each.new_zeros(3 * num_teachers)
    if teacher_id_idx is not None:
        numbers = torch.stack(
            [torch.ones_like(teacher_entropy), each.detach(), teacher_entropy.to(each.dtype)], 1
        )
        per_teacher = each.new_zeros(num_teachers, 3).index_add(0, teacher_id_idx, numbers).flatten()
    return each.sum(), each.detach().sum(), of.entropy.detach().sum(), teacher_entropy.sum(), per_teacher


def iw_opd_compute_loss(
    self: Any,
    model: Any,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Any:
    """``IWOPDTrainer.compute_loss``: of both models it needs the completion's log-probabilities, where TRL takes a
    log-softmax of each, and with a server one that nobody reads."""
    if self.distillation_objective != "iw_opd":
        return _PATCHES.theirs(_IW_OPD)(self, model, inputs, return_outputs, num_items_in_batch)
    self._raise_if_local_teacher_tokenizer_mismatch()
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    start = self._compute_prompt_length(inputs)
    labels, tokens = inputs["labels"][:, start:], inputs["input_ids"][:, start:]
    if self.use_teacher_server:
        teacher_log_probs = self._get_teacher_token_logprobs_from_server(inputs, start)["actual_logprobs"]
        missing = int((labels[:, teacher_log_probs.shape[1] :] != IGNORED).sum())
        if missing:
            raise ValueError(
                f"the teacher server gave no logprobs for the last {missing} completion tokens, and IW-OPD needs all"
            )
    else:
        teacher = self._get_teacher_logits(inputs)[:, start - 1 : -1]
        teacher_log_probs = token_log_probs(teacher, tokens, temperature=self.temperature).log_probs
    given, count = inputs.get("rollout_logprobs"), teacher_log_probs.shape[1]
    loss = self._compute_iw_opd_loss(
        student_logits=outputs.logits[:, start - 1 : -1][:, :count],
        completion_tokens=tokens[:, :count],
        labels=labels[:, :count],
        teacher_actual_logprobs=teacher_log_probs,
        rollout_logprobs=None if given is None else given[:, start:][:, :count],
        num_items_in_batch=num_items_in_batch,
    )
    return (loss, outputs) if return_outputs else loss


def iw_opd_loss(
    self: Any,
    student_logits: Tensor,
    completion_tokens: Tensor,
    labels: Tensor,
    teacher_actual_logprobs: Tensor,
    rollout_logprobs: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """``IWOPDTrainer._compute_iw_opd_loss`` (arXiv 2606.22600): -log q of each token ``[B, T]`` times its advantage
    log p - log q_old, weighted by 1 + gamma where none of the sequence's advantages lie before it, and by 1 where all do.
    """
    live = labels != IGNORED
    missing = int((live & ~teacher_actual_logprobs.isfinite()).sum())
    if missing:
        raise ValueError(
            f"IW-OPD needs the teacher's log-probabilities of {missing} more of {int(live.sum())} tokens"
        )
    of = token_log_probs(student_logits, completion_tokens.where(live, IGNORED), temperature=self.temperature)
    drew = of.log_probs.detach() if rollout_logprobs is None else rollout_logprobs
    advantage = (teacher_actual_logprobs.detach() - drew).where(live, 0.0)
    size = advantage.abs()
    share_before = (size.cumsum(1) - size) / size.sum(1, keepdim=True).clamp_min(self.iw_opd_epsilon)
    weight = 1 + self.iw_opd_gamma * (1 - share_before)
    loss = -(of.log_probs * weight * advantage).sum()
    if live.any():
        _log_iw_opd(self, *((each[live]) for each in (weight * advantage, size, weight)))
    return loss / (
        live.sum().clamp_min(1) if num_items_in_batch is None else _items(num_items_in_batch, loss)
    )


def _log_iw_opd(trainer: Any, advantage: Tensor, size: Tensor, weight: Tensor) -> None:
    """TRL's own metrics, for which the CPU waits once."""
    logged = {
        "mean_advantage": advantage.mean(),
        "mean_abs_advantage": size.mean(),
        "mean_weight": weight.mean(),
        "min_weight": weight.min(),
        "max_weight": weight.max(),
    }
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, value in zip(logged, torch.stack(list(logged.values())).tolist()):
        metrics[f"iw_opd/{name}"].append(value)


def _items(num_items: Tensor | int | None, beside: Tensor) -> Any:
    return num_items.to(beside.device) if isinstance(num_items, Tensor) else num_items


def _terms(log_q: Tensor, log_p: Tensor, beta: float, labels: Tensor | None) -> Tensor:
    """The divergence's terms before any sum, of the rows whose label is not masked."""
    divergence = simplified(JSD(beta))
    terms = divergence.phi(log_p.exp(), log_q.exp(), log_p, log_q)
    return terms if labels is None else terms[labels != IGNORED]


_IW_OPD = Target(
    "trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer", "compute_loss", iw_opd_compute_loss
)
_TARGETS = (
    Target("trl.trainer.distillation_trainer", None, "_chunked_divergence_loss", chunked_divergence_loss),
    Target(
        "trl.experimental.gkd.gkd_trainer",
        "GKDTrainer",
        "generalized_jsd_loss",
        staticmethod(generalized_jsd_loss),
    ),
    Target(
        "trl.experimental.gold.gold_trainer",
        "GOLDTrainer",
        "generalized_jsd_loss",
        staticmethod(gold_generalized_jsd_loss),
    ),
    Target(
        "trl.experimental.server_distillation.server_distillation_trainer",
        "ServerDistillationTrainer",
        "compute_loss",
        server_compute_loss,
    ),
    *(
        Target("trl.trainer.utils", None, ours.__name__, ours)
        for ours in (selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy)
    ),
    Target("trl.trainer.utils", None, "_ChunkedLogProbFunction", ChunkedLogProbFunction),
    Target(_ASYNC, None, "_chunked_jsd_loss", async_chunked_jsd_loss),
    _IW_OPD,
    _IW_OPD._replace(name="_compute_iw_opd_loss", ours=iw_opd_loss),
    *(
        Target(f"trl.experimental.{trainer}.{trainer}_trainer", None, f"compute_{ours.__name__}", ours)
        for trainer in ("sdft", "sdpo")
        for ours in (topk_self_distillation_loss, full_logit_self_distillation_loss)
    ),
)

_PATCHES = Patches("trl", TESTED, _TARGETS)


def patch() -> Patch:
    """Replace the losses of TRL's trainers, at once; existing and future trainers use the new ones.

    ``patch()`` alone holds until :func:`unpatch`; ``with patch():`` until the block ends. A second
    call changes nothing, and leaving its block neither.

    Raises:
        RuntimeError: TRL's version is outside ``TESTED``, or a function that would be replaced is
            missing or takes other arguments. Nothing is replaced then.
        ImportError: TRL is not installed.
    """
    return _PATCHES.patch()


def unpatch() -> None:
    """Put TRL's own functions back, the very objects; without a patch it does nothing.

    Raises:
        RuntimeError: somebody replaced ours in turn; undo that first. Nothing is put back then.
    """
    _PATCHES.unpatch()
