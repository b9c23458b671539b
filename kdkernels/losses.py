"""The public losses. Each checks its arguments once, makes one request of them, and lets core/evaluate.py solve it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .backends import candidates, chosen_backend, reference_asked
from .backends.spec import Output, Result
from .core.evaluate import evaluate, evaluate_each
from .core.make import Given, make
from .core.option_checks import checked_divergence
from .core.request import Call, Limits, Terms, Tokens
from .core.several import check_several, checked_divergences
from .core.sides import Logits, Teacher
from .divergences import JSD, Divergence, ForwardKL, NoDivergence
from .heads import LinearHead
from .options import CodistillationOptions, CrossEntropyOptions, DistillationOptions, Reduction
from .targets import SparseTarget

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Stats(NamedTuple):
    """Detached scalars in the loss's dtype (fp32, fp64 for fp64 students), each a mean over the unmasked tokens;
    ``tokens``, their number, is int64.

    ``soft`` is the divergence (without weight and T^2), ``hard`` the hard term without its
    weight (cross entropy, label smoothing and z-loss; 0 where ``hard_weight`` is 0), entropies are in nats at the loss's temperature, ``agreement`` is how often the two top-1 tokens are the same.
    With a :class:`SparseTarget` both entropies are those of the K + 1 (or K) outcomes that are compared.

    >>> import torch, kdkernels as kd
    >>> loss, stats = kd.kl_div(torch.randn(4, 10), torch.randn(4, 10), return_stats=True)
    >>> bool(stats.soft == loss), stats.tokens.item()
    (True, 4)
    """

    soft: Tensor
    hard: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    tokens: Tensor


class CodistillationLoss(NamedTuple):
    """Both models' losses in nats, each a scalar or ``[...]``, fp32 (fp64 for fp64 models); add them (weighted if you like) and
    call backward once.

    >>> import torch, kdkernels as kd
    >>> s, t = (torch.randn(4, 100, requires_grad=True) for _ in range(2))
    >>> student, teacher = kd.codistillation_loss(s, t, torch.tensor([1, 2, -100, 3]))
    >>> (student + 0.5 * teacher).backward()
    """

    student: Tensor
    teacher: Tensor


def _stats(call: Call, results: Tensor) -> Stats:
    tokens = torch.full((), results.shape[0], device=results.device)
    if call.request.labels is not None:
        tokens = (call.request.labels >= 0).sum()
    smoothing = call.terms.label_smoothing
    hard_weights = (
        (1 - smoothing, Output.LABEL),
        (smoothing, Output.SMOOTH),
        (call.terms.z_loss, Output.LSE_SQUARED),
    )
    hard = sum(
        (weight * results[:, at] for weight, at in hard_weights if weight), torch.zeros_like(results[:, 0])
    )
    means = (torch.cat([results, hard[:, None]], 1).sum(0) / tokens.clamp(min=1)).to(call.reducer.dtype)
    return Stats(
        soft=means[Output.SOFT],
        hard=means[-1],
        student_entropy=means[Result.STUDENT_ENTROPY],
        teacher_entropy=means[Result.TEACHER_ENTROPY],
        agreement=means[Result.AGREEMENT],
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


@overload
def distillation_loss(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    divergence: tuple[Divergence, ...],
    return_stats: Literal[False] = False,
    **options: Unpack[DistillationOptions],
) -> tuple[Tensor, ...]: ...


def distillation_loss(
    student: Logits,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    divergence: Divergence | tuple[Divergence, ...] = ForwardKL(),
    temperature: float | Tensor = 1.0,
    temperature_squared: bool = False,
    soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor = 0.0,
    entropy_weight: float | Tensor = 0.0,
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
    gradient_tolerance: float = 0.0,
) -> Tensor | tuple[Tensor, Stats] | tuple[Tensor, ...]:
    """soft_weight * D(teacher, student) + hard_weight * CE(labels, student), and its gradient.

    The full ``[tokens, vocab]`` logits of a LinearHead are never held, and logits that are given
    are read once. The teacher is a constant: no gradient reaches it.

    Args:
        student: logits ``[..., V]`` (fp64, fp32, bf16, fp16) or a :class:`LinearHead`.
        teacher: the same, of any dtype and width, with the same leading shape and vocabulary; or a
            :class:`SparseTarget`, whose tail says what of the teacher was not stored.
        labels: int64 ``[...]``; tokens at ``ignore_index`` leave both terms. Not shifted here.
        divergence: one of the classes in :mod:`kdkernels.divergences`. Or a tuple of them with ``reduction="none"``:
            then the result is a tuple of their token losses, from one projection of each model, whose gradient is
            made in one pass of the backward. Soft term only, of a dense teacher.
        temperature: both distributions of the soft term are taken at logits / temperature, in [1e-12, 1e12]. For a
            SparseTarget see :mod:`kdkernels.backends.outcomes`; where it is an approximation, a warning says so.
        temperature_squared: multiply the soft term (value and gradient) by temperature^2
            (Hinton et al., 2015).
        soft_weight: of the divergence.
        hard_weight: of the cross entropy, which is at temperature 1 and needs labels. Both weights and the
            temperature may be tensors, 0-dim or one number for each token ``[...]``: constants, which nothing
            waits for and compiled code never holds. A Python number compiles again at its first change, and where
            a weight becomes 0 or the temperature 1, which is another kind of loss.
        entropy_weight: adds entropy_weight * H, the student's entropy over the whole vocabulary at the temperature;
            negative favours spread. Masked as the rest, without T^2. It may be a tensor, as the other weights may.
        label_smoothing: of the hard term, as in :func:`cross_entropy`.
        z_loss: the same.
        mask: bool or 0/1 ``[...]``; tokens where it is False or 0 leave both terms, as those at
            ``ignore_index`` do, whatever their label.
        token_weights: ``[...]``, multiplies each token's loss; does not enter the mean's divisor. A
            constant, as the teacher is.
        reduction: "none" (``[...]``), "sum", "mean" (over unmasked tokens) or "batchmean"
            (F.kl_div's: sum / size(0)). All masked or empty gives 0 with a zero gradient.
        num_items: divide the sum by this instead: the tokens of a whole accumulated batch.
        vocab_size: use only the first entries of both vocabularies (padding cut off).
        inplace: the student's logits are overwritten with their gradient. Nobody else may write to them
            before the backward. Of logits that are a view autograd knows no gradient any more, and calls no hook that
            is set on it afterwards; the view holds the gradient.
            Student and teacher may be parts of one tensor that have no memory in common, as the halves of a batch
            are.
        return_stats: also return :class:`Stats`, which are computed only then.
        chunk_bytes: budget of the logit tiles, default 512 MiB; on a GPU what 2048 rows need, if that is more
            and no more than a sixteenth of its memory.
        gradient_tolerance: of a :class:`LinearHead`, in [0, 1). In each chunk of tokens the gradient for the
            logits may be off by this much of its norm, so that fewer columns go into the products dH and dW
            (docs/tolerance.md). 0 is exact; 2**-8 is about bf16's rounding. The value and ``bias`` are exact with any,
            and so are gradients of logits that are given.

    Returns:
        The loss in nats, a scalar or, of ``reduction="none"``, ``[...]``; fp32 (fp64 for fp64 students). With
        ``return_stats`` (loss, stats).

    Raises:
        ValueError: shapes, dtypes, devices, labels or numbers that do not fit; the message names
            them. RuntimeError from a second backward without ``retain_graph=True``.

    >>> import torch, kdkernels as kd
    >>> head = kd.LinearHead(torch.randn(4, 8, requires_grad=True), torch.randn(100, 8))
    >>> kd.distillation_loss(head, torch.randn(4, 100), temperature=2.0).backward()
    """
    several = isinstance(divergence, tuple)

    def given() -> Given:
        if teacher is None:
            raise TypeError("distillation_loss needs a teacher, got None; kd.cross_entropy has none")
        terms = Terms(
            checked_divergences(divergence),
            temperature=temperature,
            temperature_squared=temperature_squared,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            return_stats=return_stats,
            entropy_weight=entropy_weight,
        )
        tokens = Tokens(
            labels, mask, token_weights, ignore_index=ignore_index, reduction=reduction, num_items=num_items
        )
        if several:
            check_several(terms, tokens, teacher, inplace)
        return Given(terms, tokens, Limits(vocab_size, chunk_bytes, gradient_tolerance), inplace)

    call = make(student, teacher, given)
    if several:
        return evaluate_each(student, teacher, call)
    evaluated = evaluate(student, teacher, call)
    loss = evaluated.student
    return (loss, _stats(call, evaluated.results)) if return_stats else loss


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
    temperature: float | Tensor = 1.0,
    temperature_squared: bool = False,
    soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor = 1.0,
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
    gradient_tolerance: float = 0.0,
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

    def given() -> Given:
        if teacher is None or isinstance(teacher, SparseTarget):
            kind = "None" if teacher is None else "a kd.SparseTarget"
            raise TypeError(f"codistillation_loss trains its teacher, so it cannot be {kind}")
        if labels is None:
            raise ValueError("codistillation_loss needs labels: the teacher's loss is its cross entropy")
        terms = Terms(
            (checked_divergence(divergence),),
            temperature=temperature,
            temperature_squared=temperature_squared,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            return_stats=return_stats,
            teacher_learns=True,
        )
        tokens = Tokens(
            labels, mask, token_weights, ignore_index=ignore_index, reduction=reduction, num_items=num_items
        )
        return Given(terms, tokens, Limits(vocab_size, chunk_bytes, gradient_tolerance))

    call = make(student, teacher, given)
    evaluated = evaluate(student, teacher, call)
    assert evaluated.teacher is not None
    losses = CodistillationLoss(evaluated.student, evaluated.teacher)
    return (losses, _stats(call, evaluated.results)) if return_stats else losses


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
    gradient_tolerance: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` from logits or a :class:`LinearHead`, with ``z_loss * logsumexp^2`` (PaLM).

    ``label_smoothing`` is F.cross_entropy's. ``class_weights`` ``[V]`` is its ``weight``: a token's loss (its
    z-loss included) is multiplied by the weight of its label, and the mean divides by the sum of these; not
    together with label smoothing. Probabilities instead of labels are a teacher: ``kl_div(student,
    probabilities.log())`` has F.cross_entropy's gradient, and its value less the probabilities' entropy.
    Labels are int64 ``[...]``; the loss is in nats, fp32 (fp64 for fp64 students). Other arguments and errors as in
    :func:`distillation_loss`.

    >>> import torch, kdkernels as kd
    >>> logits = torch.randn(3, 10)
    >>> labels = torch.tensor([1, -100, 2])
    >>> ours, theirs = kd.cross_entropy(logits, labels), torch.nn.functional.cross_entropy(logits, labels)
    >>> bool(torch.isclose(ours, theirs))
    True
    """

    def given() -> Given:
        if labels is None:
            raise TypeError("cross_entropy needs labels, got None")
        terms = Terms((NoDivergence(),), hard_weight=1.0, label_smoothing=label_smoothing, z_loss=z_loss)
        tokens = Tokens(labels, mask, token_weights, class_weights, ignore_index, reduction, num_items)
        return Given(terms, tokens, Limits(vocab_size, chunk_bytes, gradient_tolerance), inplace)

    return evaluate(student, None, make(student, None, given)).student


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
    """Forward KL(teacher || student): :func:`distillation_loss` under its common name, with its arguments and errors.

    Takes logits; ``labels`` of ``ignore_index`` mask tokens. ``reduction="batchmean"`` divides as F.kl_div's does.

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


def explain(
    student: Logits,
    teacher: Teacher | None = None,
    *,
    divergence: Divergence = ForwardKL(),
    vocab_size: int | None = None,
) -> str:
    """Which backend serves these inputs, and why those before it do not; arguments that no loss takes are the same
    errors as :func:`distillation_loss`'s. One divergence at a time.

    >>> import torch, kdkernels as kd
    >>> kd.explain(torch.randn(2, 5, dtype=torch.float64)).splitlines()[-1]
    'eager: serves this call'
    """

    def given() -> Given:
        terms = Terms((NoDivergence(),))
        if teacher is not None:
            terms = Terms((checked_divergence(divergence),), soft_weight=1.0)
        return Given(terms, Tokens(), Limits(vocab_size))

    request = make(student, teacher, given).request
    if reference_asked():
        return "reference: serves this call"
    models = [request.student] if request.spec.tail else [request.student, request.teacher]
    dtypes = [tensors[0].dtype for tensors in models if tensors]
    lines = []
    for backend, reason in candidates(chosen_backend(), request.weights.device, dtypes, request.spec):
        lines.append(f"{backend.name}: {reason or 'serves this call'}")
        if reason is None:
            break
    return "\n".join(lines)
