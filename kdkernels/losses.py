"""The public losses. Each checks its arguments, describes the loss in numbers, and runs one operator."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import reference
from .backends import candidates, chosen_backend, reference_asked
from .backends import row_state as rs
from .core import autograd
from .core.layout import overlaps_itself
from .core.request import Call, Logits, Teacher, checked, hard_spec, prepare, side, soft_spec
from .divergences import JSD, Divergence, ForwardKL, NoDivergence
from .heads import LinearHead
from .options import CodistillationOptions, CrossEntropyOptions, DistillationOptions, Reduction
from .targets import SparseTarget

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Stats(NamedTuple):
    """Detached scalars, each a mean over the unmasked tokens except the count itself.

    ``soft`` is the divergence (without weight and T^2), ``hard`` the cross entropy, entropies are
    in nats at the loss's temperature, ``agreement`` is how often the two top-1 tokens are the same.
    With a :class:`SparseTarget` both entropies are those of the K + 1 (or K) outcomes that are compared.
    """

    soft: Tensor
    hard: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    tokens: Tensor


class CodistillationLoss(NamedTuple):
    """Both models' losses; add them (or weigh them) and call backward once."""

    student: Tensor
    teacher: Tensor


def _wants(tensors: list[Tensor]) -> list[bool]:
    return [torch.is_grad_enabled() and t.requires_grad for t in tensors]


def _check_inplace(call: Call) -> None:
    if call.student.is_head:
        raise ValueError("inplace=True overwrites the student's logits, but student is a LinearHead")
    logits = call.student.tensors[0]
    if overlaps_itself(logits):
        raise ValueError(
            "inplace=True needs logits of their own memory, but student is expanded or unfolded: shape "
            f"{tuple(logits.shape)}, strides {tuple(logits.stride())}; clone it, or inplace=False"
        )
    # A compiler cannot look behind a view; it functionalises the write, so nothing is lost there.
    source = logits if torch.compiler.is_compiling() or logits._base is None else logits._base
    if source.is_leaf and source.requires_grad:
        raise ValueError(
            "inplace=True would overwrite a leaf tensor that requires grad; pass the output of the "
            "lm_head, or inplace=False"
        )


def _run(call: Call, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """(loss, per-row results), attached to the student."""
    wants = _wants(call.student.tensors)
    if inplace and any(wants):
        _check_inplace(call)
    if call.per_row:
        rows, results = _rows_with_grad(call, wants, inplace)
        if call.reduction == "none":
            return rows, results
        return (rows * call.scale).sum().to(rows.dtype), results
    weights = (call.weights * call.scale).to(call.weights.dtype)
    results, gradients = _rows(call, weights, wants, inplace)
    value = autograd.row_loss(results, weights.double(), call.spec).sum().to(weights.dtype)
    if any(wants):
        value = autograd.attach(value, autograd.wanted(call.student.tensors, wants), gradients)
    return value, results


def _rows(
    call: Call, weights: Tensor, wants: list[bool], inplace: bool, teacher_wants: list[bool] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Results and wanted gradients, outside autograd."""
    student, teacher = [t.detach() for t in call.student.tensors], call.teacher_tensors
    arguments = (teacher, call.labels, weights, call.spec.to_floats(), call.vocab, call.chunk_bytes)
    if inplace and any(wants):
        return autograd.rows_(student[0], *arguments), student
    wants = wants + (teacher_wants or [False] * len(teacher))
    results, *gradients = autograd.rows(student, *arguments, wants)
    return results, gradients


def _rows_with_grad(call: Call, wants: list[bool], inplace: bool) -> tuple[Tensor, Tensor]:
    """(token losses ``[...]``, per-row results)."""
    leading = call.student.leading
    if any(wants) and call.student.is_head:
        all_wants = wants + [False] * len(call.teacher_tensors)
        value, results, _ = autograd.deferred(
            call.student.tensors,
            call.teacher_tensors,
            call.labels,
            call.weights,
            call.spec.to_floats(),
            call.vocab,
            call.chunk_bytes,
            all_wants,
        )
        return value.reshape(leading), results
    results, gradients = _rows(call, call.weights, wants, inplace)
    value = autograd.row_loss(results, call.weights, call.spec).reshape(leading)
    if any(wants):
        value = autograd.attach(value, call.student.tensors, gradients)
    return value, results


def _stats(call: Call, results: Tensor) -> Stats:
    tokens = torch.full((), results.shape[0], device=results.device)
    if call.labels is not None:
        tokens = (call.labels >= 0).sum()
    means = (results.sum(0) / tokens.clamp(min=1)).to(call.weights.dtype)
    return Stats(
        soft=means[rs.SOFT],
        hard=means[rs.HARD],
        student_entropy=means[rs.STUDENT_ENTROPY],
        teacher_entropy=means[rs.TEACHER_ENTROPY],
        agreement=means[rs.AGREEMENT],
        tokens=tokens,
    )


@overload
def distillation_loss(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    divergence: Divergence = ...,
    return_stats: Literal[False] = False,
    **options: Unpack[DistillationOptions],
) -> Tensor: ...


@overload
def distillation_loss(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    divergence: Divergence = ...,
    return_stats: Literal[True],
    **options: Unpack[DistillationOptions],
) -> tuple[Tensor, Stats]: ...


@overload
def distillation_loss(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    divergence: Divergence = ...,
    return_stats: bool,
    **options: Unpack[DistillationOptions],
) -> Tensor | tuple[Tensor, Stats]: ...


def distillation_loss(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    divergence: Divergence = ForwardKL(),
    temperature: float = 1.0,
    temperature_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    inplace: bool = False,
    return_stats: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    """soft_weight * D(teacher, student) + hard_weight * CE(labels, student), and its gradient.

    The full ``[tokens, vocab]`` logits of a LinearHead are never held, and logits that are given
    are read once. The teacher is a constant: no gradient reaches it.

    Args:
        student: logits ``[..., V]`` (fp64, fp32, bf16, fp16) or a :class:`LinearHead`.
        teacher: the same, of any dtype and width, with the same leading shape and vocabulary; or a
            :class:`SparseTarget`, whose tail says what of the teacher was not stored.
        labels: int64 ``[...]``; tokens at ``ignore_index`` leave both terms. Not shifted here.
        divergence: one of the classes in :mod:`kdkernels.divergences`.
        temperature: both distributions of the soft term are taken at logits / temperature. For a
            SparseTarget see :mod:`kdkernels.backends.outcomes`; where it is an approximation, a warning says so.
        temperature_squared: multiply the soft term (value and gradient) by temperature^2
            (Hinton et al., 2015).
        soft_weight, hard_weight: the mix; the hard term is at temperature 1 and needs labels.
        label_smoothing, z_loss: of the hard term, as in :func:`cross_entropy`.
        mask: bool or 0/1 ``[...]``; tokens where it is False or 0 leave both terms, as those at
            ``ignore_index`` do, whatever their label.
        token_weights: ``[...]``, multiplies each token's loss; does not enter the mean's divisor. A
            constant, as the teacher is.
        reduction: "none" (``[...]``), "sum", "mean" (over unmasked tokens) or "batchmean"
            (F.kl_div's: sum / size(0)). All masked or empty gives 0 with a zero gradient.
        num_items: divide the sum by this instead: the tokens of a whole accumulated batch.
        vocab_size: use only the first entries of both vocabularies (padding cut off).
        inplace: the student's logits are overwritten with their gradient. Student and teacher may be parts of
            one tensor that have no memory in common, as the halves of a batch are.
        return_stats: also return :class:`Stats`.
        chunk_bytes: budget of the logit tiles, default 512 MiB.

    Returns:
        The loss in fp32 (fp64 for fp64 students), or (loss, stats).

    Raises:
        ValueError: shapes, dtypes, devices, labels or numbers that do not fit; the message names
            them. RuntimeError from a second backward without ``retain_graph=True``.

    >>> import torch, kdkernels as kd
    >>> head = kd.LinearHead(torch.randn(4, 8, requires_grad=True), torch.randn(100, 8))
    >>> kd.distillation_loss(head, torch.randn(4, 100), temperature=2.0).backward()
    """
    spec = soft_spec(
        divergence,
        temperature,
        temperature_squared,
        soft_weight,
        hard_weight=hard_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    checked(inplace=inplace, return_stats=return_stats)
    if teacher is None:
        raise TypeError("distillation_loss needs a teacher, got None; kd.cross_entropy has none")
    call = prepare(
        student,
        teacher,
        labels,
        spec,
        mask=mask,
        token_weights=token_weights,
        reduction=reduction,
        num_items=num_items,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        chunk_bytes=chunk_bytes,
    )
    if reference_asked():
        loss, results = reference.run(student, teacher, call, divergence)
    else:
        loss, results = _run(call, inplace)
    return (loss, _stats(call, results.detach())) if return_stats else loss


@overload
def codistillation_loss(
    student: Logits,
    teacher: Logits,
    labels: Tensor,
    *,
    divergence: Divergence = ...,
    return_stats: Literal[False] = False,
    **options: Unpack[CodistillationOptions],
) -> CodistillationLoss: ...


@overload
def codistillation_loss(
    student: Logits,
    teacher: Logits,
    labels: Tensor,
    *,
    divergence: Divergence = ...,
    return_stats: Literal[True],
    **options: Unpack[CodistillationOptions],
) -> tuple[CodistillationLoss, Stats]: ...


@overload
def codistillation_loss(
    student: Logits,
    teacher: Logits,
    labels: Tensor,
    *,
    divergence: Divergence = ...,
    return_stats: bool,
    **options: Unpack[CodistillationOptions],
) -> CodistillationLoss | tuple[CodistillationLoss, Stats]: ...


def codistillation_loss(
    student: Logits,
    teacher: Logits,
    labels: Tensor,
    *,
    divergence: Divergence = ForwardKL(),
    temperature: float = 1.0,
    temperature_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    return_stats: bool = False,
    chunk_bytes: int | None = None,
) -> CodistillationLoss | tuple[CodistillationLoss, Stats]:
    """Both models' losses from one pass over each model's logits.

    The teacher's loss is its own cross entropy; the student's is ``soft_weight * D +
    hard_weight * CE`` against the detached teacher. A teacher's tile is projected once and serves
    both. ``label_smoothing`` and ``z_loss`` are the student's only; there is no ``inplace``, since both models
    get a gradient. Other arguments and errors as in :func:`distillation_loss`.

    With ``reduction="none"`` or fp16 models the two losses are taken in two passes.

    >>> import torch, kdkernels as kd
    >>> s, t = (torch.randn(4, 100, requires_grad=True) for _ in range(2))
    >>> losses = kd.codistillation_loss(s, t, torch.tensor([1, 2, -100, 3]))
    >>> (losses.student + losses.teacher).backward()
    """
    spec = soft_spec(
        divergence,
        temperature,
        temperature_squared,
        soft_weight,
        hard_weight=hard_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    checked(return_stats=return_stats)
    shared: dict[str, Any] = dict(
        mask=mask,
        token_weights=token_weights,
        reduction=reduction,
        num_items=num_items,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        chunk_bytes=chunk_bytes,
    )
    if teacher is None or isinstance(teacher, SparseTarget):
        kind = "None" if teacher is None else "a kd.SparseTarget"
        raise TypeError(f"codistillation_loss trains its teacher, so it cannot be {kind}")
    if labels is None:
        raise ValueError("codistillation_loss needs labels: the teacher's loss is its cross entropy")
    call = prepare(student, teacher, labels, spec, **shared)
    if reference_asked():
        student_loss, results = reference.run(student, teacher, call, divergence)
        losses = CodistillationLoss(student_loss, cross_entropy(teacher, labels, **shared))
    elif call.per_row or call.teacher_tensors[0].dtype == torch.float16:
        vocab = {**shared, "vocab_size": call.vocab}
        student_loss, results = _run(call)
        losses = CodistillationLoss(student_loss, cross_entropy(teacher, labels, **vocab))
    else:
        losses, results = _run_both(call)
    return (losses, _stats(call, results.detach())) if return_stats else losses


def _run_both(call: Call) -> tuple[CodistillationLoss, Tensor]:
    """Both losses from one pass, each attached to its model, and the per-row results."""
    call = replace(call, spec=call.spec._replace(teacher_hard_weight=1.0))
    assert call.teacher is not None
    own, teachers = call.student.tensors, call.teacher.tensors
    wants, teacher_wants = _wants(own), _wants(teachers)
    weights = (call.weights * call.scale).to(call.weights.dtype)
    results, gradients = _rows(call, weights, wants, False, teacher_wants)
    wide = weights.double()
    student_loss = autograd.row_loss(results, wide, call.spec).sum().to(weights.dtype)
    teacher_dtype = torch.float64 if teachers[0].dtype == torch.float64 else torch.float32
    teacher_loss = torch.where(wide != 0, results[:, rs.TEACHER_HARD] * wide, 0.0).sum().to(teacher_dtype)
    split = sum(wants)
    if split:
        student_loss = autograd.attach(student_loss, autograd.wanted(own, wants), gradients[:split])
    if any(teacher_wants):
        teacher_loss = autograd.attach(
            teacher_loss, autograd.wanted(teachers, teacher_wants), gradients[split:]
        )
    return CodistillationLoss(student_loss, teacher_loss), results


def cross_entropy(
    student: Logits,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    inplace: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor:
    """``F.cross_entropy`` from logits or a :class:`LinearHead`, with ``z_loss * logsumexp^2`` (PaLM).

    ``label_smoothing`` is F.cross_entropy's. ``class_weights`` ``[V]`` is its ``weight``: a token's loss (its
    z-loss included) is multiplied by the weight of its label, and the mean divides by the sum of these; not
    together with label smoothing. Probabilities instead of labels are a teacher: ``kl_div(student,
    probabilities.log())`` has F.cross_entropy's gradient, and its value less the probabilities' entropy.
    Other arguments and errors as in :func:`distillation_loss`.

    >>> import torch, kdkernels as kd
    >>> logits = torch.randn(3, 10)
    >>> labels = torch.tensor([1, -100, 2])
    >>> ours, theirs = kd.cross_entropy(logits, labels), torch.nn.functional.cross_entropy(logits, labels)
    >>> bool(torch.isclose(ours, theirs))
    True
    """
    spec = hard_spec(label_smoothing, z_loss)
    checked(inplace=inplace)
    if labels is None:
        raise TypeError("cross_entropy needs labels, got None")
    call = prepare(
        student,
        None,
        labels,
        spec,
        mask=mask,
        token_weights=token_weights,
        class_weights=class_weights,
        reduction=reduction,
        num_items=num_items,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        chunk_bytes=chunk_bytes,
    )
    if reference_asked():
        return reference.run(student, None, call, NoDivergence())[0]
    return _run(call, inplace)[0]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    **options: Unpack[CrossEntropyOptions],
) -> Tensor:
    """:func:`cross_entropy` of ``LinearHead(hidden, weight, bias)``; options are cross_entropy's.

    >>> import torch, kdkernels as kd
    >>> loss = kd.linear_cross_entropy(torch.randn(3, 8), torch.randn(10, 8), torch.tensor([1, 2, 3]))
    """
    return cross_entropy(LinearHead(hidden, weight, bias), labels, **options)


@overload
def kl_div(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[DistillationOptions],
) -> Tensor: ...


@overload
def kl_div(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[DistillationOptions],
) -> tuple[Tensor, Stats]: ...


@overload
def kl_div(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    return_stats: bool,
    **options: Unpack[DistillationOptions],
) -> Tensor | tuple[Tensor, Stats]: ...


def kl_div(
    student: Logits, teacher: Teacher, labels: Tensor | None = None, **options: Any
) -> Tensor | tuple[Tensor, Stats]:
    """Forward KL(teacher || student): :func:`distillation_loss` under its common name.

    Takes logits, not log-probabilities. ``reduction="batchmean"`` divides as F.kl_div's does.

    >>> import torch, kdkernels as kd
    >>> s, t = torch.randn(4, 10), torch.randn(4, 10)
    >>> theirs = torch.nn.functional.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    >>> bool(torch.isclose(kd.kl_div(s, t, reduction="batchmean"), theirs, atol=1e-6))
    True
    """
    return distillation_loss(student, teacher, labels, divergence=ForwardKL(), **options)


@overload
def js_divergence(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    beta: float = ...,
    return_stats: Literal[False] = False,
    **options: Unpack[DistillationOptions],
) -> Tensor: ...


@overload
def js_divergence(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    beta: float = ...,
    return_stats: Literal[True],
    **options: Unpack[DistillationOptions],
) -> tuple[Tensor, Stats]: ...


@overload
def js_divergence(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    beta: float = ...,
    return_stats: bool,
    **options: Unpack[DistillationOptions],
) -> Tensor | tuple[Tensor, Stats]: ...


def js_divergence(
    student: Logits, teacher: Teacher, labels: Tensor | None = None, *, beta: float = 0.5, **options: Any
) -> Tensor | tuple[Tensor, Stats]:
    """Generalised Jensen-Shannon divergence :class:`JSD` (beta): options as distillation_loss's.

    >>> import torch, kdkernels as kd
    >>> loss = kd.js_divergence(torch.randn(4, 10), torch.randn(4, 10), beta=0.5)
    """
    return distillation_loss(student, teacher, labels, divergence=JSD(beta), **options)


def explain(student: Logits, teacher: Teacher | None = None, *, divergence: Divergence = ForwardKL()) -> str:
    """Which backend serves these inputs, and why those before it do not.

    >>> import torch, kdkernels as kd
    >>> kd.explain(torch.randn(2, 5, dtype=torch.float64)).splitlines()[-1]
    'eager: serves this call'
    """
    if reference_asked():
        return "reference: serves this call"
    sides = [side("student", student)]
    entry = "fused_sparse" if isinstance(teacher, SparseTarget) else "fused"
    if teacher is not None and not isinstance(teacher, SparseTarget):
        sides.append(side("teacher", teacher))
    dtypes = [side.tensors[0].dtype for side in sides]
    lines = []
    for module, reason in candidates(chosen_backend(), sides[0].device, dtypes, entry, divergence):
        lines.append(f"{module.name}: {reason or 'serves this call'}")
        if reason is None:
            break
    return "\n".join(lines)
