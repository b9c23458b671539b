"""Liger-Kernel's distillation losses by their names: change the import, keep the call::

    from kdkernels.integrations.liger import LigerFusedLinearJSDLoss

Modules and functions of ``liger_kernel.transformers``, and ``LigerFusedLinearJSDLoss`` of
``liger_kernel.chunked_loss``; on every device that torch has. What differs from Liger 0.8.5 (tests in
``tests/integrations/test_liger.py``):

* LigerFusedLinearJSDLoss, teacher's vocabulary longer than the student's: Liger pads the student's
  logits with 0, which are no unlikely tokens but likely ones (exp(0) each in the normaliser). Here the
  teacher's surplus, the padding that Liger's comment speaks of, is cut.
* LigerJSD takes log-probabilities, as Liger does, and normalises them again: it is right to pass
  logits and drop the log_softmax. Its gradient for log-probabilities therefore differs from Liger's
  by a multiple of the student's probabilities, which the log_softmax before it takes away.
* LigerFusedLinearKLDivLoss: targets are taken as distributions: their rows should sum to 1.
* A zero probability costs exactly nothing: ``eps`` is taken and not needed.
* A mask that leaves no token gives 0, not 0 / 0. A second backward gives the same gradient, or an error.
* Losses are fp32, and sums over chunks of tokens too, whatever ``accum_dtype``, ``chunk_size`` and
  ``compiled`` say.

``LigerFusedLinearScaledCrossEntropyFunction`` of ``liger_kernel.ops`` (token losses, entropies and log-probabilities
of selected ids, at a temperature) is here too. Its entropies are fp32, where Liger's are in the dtype of the hidden
states outside of its Hopper kernel.

Class weights, token scaling and the extra outputs of Liger's cross entropies are not here: asking for
them is a ValueError that says what serves instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.option_checks import checked
from ..divergences import JSD, TotalVariation
from ..heads import MappedLogits
from ..log_probs import token_log_probs
from ..losses import cross_entropy, distillation_loss, js_divergence
from ..losses import kl_div as kl_of_logits
from ..options import Reduction
from .common import IGNORED, given_ids, head
from .functional import reduced


def _unmasked(shift_labels: Tensor | None, ignore_index: int) -> Tensor | None:
    return None if shift_labels is None else shift_labels != ignore_index


#: What serves instead of the options of Liger's cross entropies that are not here.
_INSTEAD = {
    "weight": "kd.cross_entropy(class_weights=)",
    "ce_weight": "kd.cross_entropy(class_weights=)",
    "return_z_loss": "the difference of kd.cross_entropy with z_loss= and without",
    "use_token_scaling": "kd.cross_entropy(token_weights=) with the labels' probabilities",
    "return_token_accuracy": "kd.token_log_probs(return_stats=True).top1",
    "return_predicted_tokens": "kd.token_log_probs(return_stats=True).top1",
}


def _refuse(**asked: Any) -> None:
    for name, value in asked.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} is not in this drop-in: leave it out, or take {_INSTEAD[name]}")


def liger_jsd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """Mean generalised JSD over unmasked tokens of log-probabilities (or logits) ``[BT, V]``, student first.

    >>> s, t = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
    >>> liger_jsd(s.log_softmax(-1), t.log_softmax(-1), beta=0.1).backward()
    """
    return js_divergence(input, target, mask=_unmasked(shift_labels, ignore_index), beta=beta)


def liger_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool = True,
    reduce: bool = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    """:func:`kdkernels.integrations.functional.kl_div`, in fp32 at least and with the target a constant;
    ``size_average``, ``reduce`` and ``eps`` do nothing.

    >>> liger_kl_div(torch.randn(4, 10).log_softmax(-1), torch.rand(4, 10).softmax(-1)).shape
    torch.Size([])
    """
    return reduced("kl of log target" if log_target else "kl", input, target.detach(), reduction, wide=True)


def liger_tvd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """1/2 |p - q| of probabilities ``[BT, V]``: each, or over unmasked tokens their sum, the sum per token
    ("batchmean") or per entry ("mean"). The target is a constant.

    >>> liger_tvd(torch.rand(4, 10).softmax(-1), torch.rand(4, 10).softmax(-1), reduction="batchmean").shape
    torch.Size([])
    """
    unmasked = _unmasked(shift_labels, ignore_index)
    tokens = max(input.shape[0], 1) if unmasked is None else unmasked.sum().clamp(min=1)
    divisors = {"none": 1, "sum": 1, "batchmean": tokens, "mean": tokens * input.shape[-1]}
    if reduction not in divisors:
        raise ValueError(f"unknown reduction {reduction!r}; there are {', '.join(divisors)}")
    taken = "none" if reduction == "none" else "sum"
    terms = reduced("tv", input, target.detach(), taken, unmasked, wide=True)
    return terms if reduction in ("none", "sum") else terms / divisors[reduction]


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean generalised JSD over unmasked tokens, from hidden states ``[BT, H]`` and heads ``[V, H]``.

    >>> h, w = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8)
    >>> liger_fused_linear_jsd(h, w, torch.randn(4, 6), torch.randn(10, 6), temperature=2.0).backward()
    """
    return js_divergence(
        head(student_input, student_weight),
        head(teacher_input, teacher_weight),
        mask=_unmasked(shift_labels, ignore_index),
        beta=jsd_beta,
        temperature=temperature,
    )


def liger_fused_linear_kl_div(
    student_input: Tensor,
    student_weight: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    eps: float = 1e-10,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """KL(target || student) from hidden states ``[BT, H]``, a head ``[V, H]`` and probabilities ``[BT, V]``.

    "batchmean" is per unmasked token, "mean" per entry, "sum" neither. The target's logarithm is taken
    once, in memory of its size in fp32: teacher logits with ``kd.kl_div`` do without.

    >>> h, w = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8)
    >>> liger_fused_linear_kl_div(h, w, torch.randn(4, 10).softmax(-1)).backward()
    """
    if reduction not in ("batchmean", "mean", "sum"):
        raise ValueError(f"reduction must be one of batchmean, mean, sum, got {reduction!r}")
    checked(temperature=temperature)
    # The target is at the temperature already: only the student's logits are divided by it.
    student = head(student_input, student_weight, logit_scale=1 / temperature)
    loss = kl_of_logits(
        student,
        target.to(torch.promote_types(target.dtype, torch.float32)).log(),
        mask=_unmasked(shift_labels, ignore_index),
        reduction="sum" if reduction == "sum" else "mean",
    )
    return loss / target.shape[-1] if reduction == "mean" else loss


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor:
    """:func:`kdkernels.cross_entropy`; ``lse_square_scale`` is its z_loss.

    >>> liger_cross_entropy(torch.randn(3, 10), torch.tensor([1, -100, 2]), softcap=30.0).shape
    torch.Size([])
    """
    _refuse(
        weight=weight,
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
    )
    return cross_entropy(
        MappedLogits(input, softcap=softcap),
        target,
        label_smoothing=label_smoothing,
        z_loss=lse_square_scale,
        reduction=reduction,
        ignore_index=ignore_index,
    )


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor:
    """:func:`kdkernels.cross_entropy` from hidden states ``[BT, H]`` and a head ``[V, H]``.

    >>> h, w = torch.randn(3, 8, requires_grad=True), torch.randn(10, 8)
    >>> liger_fused_linear_cross_entropy(h, w, torch.tensor([1, -100, 2])).backward()
    """
    _refuse(
        ce_weight=ce_weight,
        return_z_loss=return_z_loss,
        use_token_scaling=use_token_scaling,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
    )
    return cross_entropy(
        head(input, weight, bias, softcap=softcap),
        target,
        label_smoothing=label_smoothing,
        z_loss=lse_square_scale,
        reduction=reduction,
        ignore_index=ignore_index,
    )


class LigerJSD(nn.Module):
    """:func:`liger_jsd` as a module."""

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta, self.ignore_index = beta, ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)


class LigerKLDIVLoss(nn.KLDivLoss):
    """:func:`liger_kl_div` as a module; reduction and log_target are nn.KLDivLoss's."""

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        return liger_kl_div(y_pred, y_true, reduction=self.reduction, log_target=self.log_target)


class LigerTVDLoss(nn.Module):
    """:func:`liger_tvd` as a module."""

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        self.reduction, self.ignore_index = reduction, ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return liger_tvd(p, q, shift_labels, self.reduction, self.ignore_index)


class LigerFusedLinearJSD(nn.Module):
    """:func:`liger_fused_linear_jsd` as a module."""

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checked(temperature=temperature)
        self.jsd_beta, self.ignore_index = jsd_beta, ignore_index
        self.temperature, self.accum_dtype = temperature, accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        return liger_fused_linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            shift_labels,
            self.jsd_beta,
            self.ignore_index,
            self.temperature,
        )


class LigerFusedLinearKLDivLoss(nn.Module):
    """:func:`liger_fused_linear_kl_div` as a module."""

    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checked(temperature=temperature)
        self.reduction, self.ignore_index, self.temperature = reduction, ignore_index, temperature
        self.eps, self.accum_dtype = eps, accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        target: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        return liger_fused_linear_kl_div(
            student_input,
            student_weight,
            target,
            shift_labels,
            self.reduction,
            self.ignore_index,
            self.temperature,
        )


class LigerFusedCETVDLoss(nn.Module):
    """(cross entropy, total variation), each ``[BT]``, of logits ``[BT, V]``; 0 for ignored tokens.

    >>> ce, tvd = LigerFusedCETVDLoss()(torch.randn(3, 10), torch.randn(3, 10), torch.tensor([1, -100, 2]))
    >>> ce.shape, tvd.shape
    (torch.Size([3]), torch.Size([3]))
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        shared: dict[str, Any] = dict(reduction="none", ignore_index=self.ignore_index)
        tvd = distillation_loss(student_logits, teacher_logits, target, divergence=TotalVariation(), **shared)
        return cross_entropy(student_logits, target, **shared), tvd


class LigerCrossEntropyLoss(nn.Module):
    """:func:`liger_cross_entropy` as a module; options are its keyword arguments."""

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        _refuse(
            weight=weight,
            return_z_loss=return_z_loss,
            return_token_accuracy=return_token_accuracy,
            return_predicted_tokens=return_predicted_tokens,
        )
        self.ignore_index, self.lse_square_scale = ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = label_smoothing, reduction, softcap

    def forward(self, _input: Tensor, target: Tensor) -> Tensor:
        return liger_cross_entropy(
            _input,
            target,
            ignore_index=self.ignore_index,
            lse_square_scale=self.lse_square_scale,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            softcap=self.softcap,
        )


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """:func:`liger_fused_linear_cross_entropy` as a module; the weight comes first, as in Liger."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        _refuse(
            ce_weight=ce_weight,
            return_z_loss=return_z_loss,
            use_token_scaling=use_token_scaling,
            return_token_accuracy=return_token_accuracy,
            return_predicted_tokens=return_predicted_tokens,
        )
        self.ignore_index, self.lse_square_scale = ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = label_smoothing, reduction, softcap

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return liger_fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            lse_square_scale=self.lse_square_scale,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            softcap=self.softcap,
        )


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss CE + weight_soft_loss JSD from hidden states, means over unmasked tokens.

    Hidden states ``[BT, H]``, weights ``[V, H]``, labels ``[BT]``; with ``return_soft_hard_loss``
    (loss, JSD, CE), the last two detached.

    >>> h, w = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8)
    >>> loss = LigerFusedLinearJSDLoss(beta=0.5, temperature=2.0)
    >>> loss(h, w, torch.randn(4, 6), torch.randn(10, 6), torch.tensor([1, -100, 2, 3])).backward()
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        checked(temperature=temperature)
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature = ignore_index, temperature
        self.compiled, self.chunk_size = compiled, chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        student = head(student_input, student_weight, student_bias)
        shared: dict[str, Any] = dict(
            ignore_index=self.ignore_index, vocab_size=self._vocab(student_weight, teacher_weight)
        )
        loss, stats = distillation_loss(
            student,
            head(teacher_input, teacher_weight, teacher_bias),
            true_labels,
            divergence=JSD(self.beta),
            temperature=self.temperature,
            soft_weight=self.weight_soft_loss,
            hard_weight=self.weight_hard_loss,
            return_stats=True,
            **shared,
        )
        if not self.return_soft_hard_loss:
            return loss
        hard = stats.hard
        if not self.weight_hard_loss:
            with torch.no_grad():
                hard = cross_entropy(student, true_labels, **shared)
        return loss, stats.soft, hard

    @staticmethod
    def _vocab(student_weight: Tensor, teacher_weight: Tensor) -> int | None:
        """A teacher's padded rows are cut; a student with more tokens than its teacher is an error."""
        vocab = student_weight.shape[0]
        return vocab if teacher_weight.shape[0] > vocab else None


class LigerFusedLinearScaledCrossEntropyFunction:
    """Negative log-probabilities of tokens ``[M]`` from hidden states ``[M, H]`` and an lm_head ``[V, H]``."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """The negative log-probabilities ``[M]``. With ``return_entropy`` the entropies ``[M]`` follow, with
        ``selected_token_ids`` ``[K]`` the log-probabilities ``[M, K]`` of these; all are 0 for ignored tokens, and all
        are differentiable."""
        ids = given_ids(target, ignore_index)[:, None]
        if selected_token_ids is not None:
            selected = given_ids(selected_token_ids, None).expand(len(target), -1)
            ids = torch.cat([ids, selected.masked_fill(ids == IGNORED, IGNORED)], 1)
        of = token_log_probs(head(_input, weight), ids, temperature=temperature, entropy=return_entropy)
        made = [-of.log_probs[:, 0]]
        if of.entropy is not None:
            made.append(of.entropy)
        if selected_token_ids is not None:
            made.append(of.log_probs[:, 1:])
        return made[0] if len(made) == 1 else tuple(made)
