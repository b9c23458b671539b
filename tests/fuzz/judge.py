"""Runs a call three times, as kdkernels, as the oracle and as plain PyTorch, and holds the first against the others."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kdkernels as kd

from . import oracle, plain
from .calls import Call, Draw, Side, numbers, shipped

#: Error allowed beside twice the plain formula's, in units of the coarsest dtype's rounding and of what is summed.
FEW = 16


def check(seed: int, backend: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """AssertionError, with the call, where kdkernels is further from the truth than the rule allows."""
    call = Draw(seed, dtypes).call()
    try:
        with kd.use_backend(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = run(call, kdkernels_losses)
            has_stats = call.kind in ("distillation", "codistillation")
            stats = statistics(call) if has_stats else None
        with np.errstate(all="ignore"):  # infinities and NaN of tokens that do not count
            _judge(call, ours, run(call, plain_losses, cleaned), truth(call))
            if stats is not None:
                _judge_statistics(call, stats)
    except Exception as error:
        raise AssertionError(
            f"seed {seed}, backend {backend}: {type(error).__name__}: {error}\n{call.describe()}"
        ) from error


def sides(call: Call) -> list[Side]:
    return [call.student, call.teacher] if call.kind == "codistillation" else [call.student]


def run(call: Call, losses, memories=lambda call, side: [laid.memory for laid in side.tensors]):
    """For each model that learns: its loss, and the gradients of its tensors (None of those that do not learn)."""
    leaves = [
        [memory.clone().requires_grad_(learns) for memory, learns in zip(memories(call, side), side.learned)]
        for side in sides(call)
    ]
    # inplace=True may not overwrite a leaf.
    own = [[m.clone() for m in side] if call.inplace else side for side in leaves]
    values = losses(call, [side.given(memory) for side, memory in zip(sides(call), own)])
    found = []
    for side, value, memory in zip(sides(call), values, leaves):
        learned = [m for m in memory if m.requires_grad]
        if not learned or not value.requires_grad:
            found.append((value.detach(), [None] * len(memory)))
            continue
        grads = torch.autograd.grad((value * call.factor.to(value.dtype)).sum(), learned, retain_graph=True)
        again = torch.autograd.grad((value * call.factor.to(value.dtype)).sum(), learned)
        assert all(same(a, b) for a, b in zip(grads, again)), "a second backward gives another gradient"
        found.append((value.detach(), _unused_is_zero(side, memory, list(grads))))
    if call.inplace:
        _unused_is_unused(call, own[0][0].detach())
    return found


def cleaned(call: Call, side: Side) -> list[Tensor]:
    """Zeros where nothing counts: in PyTorch 0 * NaN would spoil what does."""
    memories = [laid.memory.nan_to_num(nan=0.0, posinf=0.0, neginf=-torch.inf) for laid in side.tensors]
    side.tensors[0].view(memories[0])[~call.counting()] = 0.0
    return memories


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _unused_is_unused(call: Call, memory: Tensor) -> None:
    laid = call.student.tensors[0]
    laid.view(memory).copy_(laid.view(laid.memory))
    assert same(memory, laid.memory), "inplace=True wrote beside the student's logits"


def statistics(call: Call) -> kd.Stats:
    with torch.no_grad():
        given = [side.given([laid.memory.clone() for laid in side.tensors]) for side in sides(call)]
        return kdkernels_losses(call, given, return_stats=True)[-1][-1]


def _unused_is_zero(side: Side, memories: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    views = []
    for laid, memory in zip(side.tensors, memories):
        if memory.requires_grad:
            grad = grads.pop(0)
            views.append(laid.view(grad).clone())
            laid.view(grad).zero_()
            assert not grad.any(), "memory that the call does not see has a gradient"
        else:
            views.append(None)
    return views


def kdkernels_losses(call: Call, given: list[Any], **more) -> Any:
    options = dict(call.options)
    for name in ("labels", "mask", "token_weights", "class_weights"):
        if laid := getattr(call, name):
            options[name] = laid.view(laid.memory)
    options |= {"ignore_index": call.ignore_index, **more}
    if call.kind == "log_probs":
        return [_log_probs_loss(call, given[0], **options)]
    if call.kind == "codistillation":
        found = kd.codistillation_loss(*given, divergence=shipped(call.divergence), **options)
        return [found] if more else list(found)
    if call.inplace:
        options["inplace"] = True
    if call.kind == "cross_entropy":
        return [kd.cross_entropy(*given, **options)]
    teacher = (
        call.teacher.given([t.memory for t in call.teacher.tensors])
        if isinstance(call.teacher, Side)
        else call.teacher
    )
    found = kd.distillation_loss(*given, teacher, divergence=shipped(call.divergence), **options)
    if call.kind == "several":
        found = sum(weight * each for (weight, _), each in zip(call.divergence[1:], found))
    return [found]


def _log_probs_loss(call: Call, student: Any, *, entropy_weight: float, reduction: str, **options) -> Tensor:
    ids, asks = call.ids.view(call.ids.memory), entropy_weight != 0
    of = kd.token_log_probs(student, ids, entropy=asks, **options)
    weights = call.id_weights.to(of.log_probs.dtype)
    each = torch.where(weights == 0, 0.0, of.log_probs.reshape(weights.shape) * weights)
    each = -each.sum(-1).reshape(call.leading)
    return each + entropy_weight * of.entropy if asks else each


def _per_token(call: Call) -> tuple[Tensor, Tensor | None, Tensor, float]:
    """(which tokens count, labels, token weights, divisor), flat."""
    labels = None if call.labels is None else call.labels.view(call.labels.memory).reshape(-1)
    live = call.live().reshape(-1)
    given = call.token_weights
    weights = torch.ones(call.tokens) if given is None else given.view(given.memory).reshape(-1)
    items, mean = call.options.get("num_items"), float(live.sum())
    if call.class_weights is not None:
        of_label = call.class_weights.view(call.class_weights.memory)[torch.where(live, labels, 0)].double()
        weights, mean = weights.double() * of_label, float(of_label[live].sum())
    divisor = {"mean": mean or 1.0, "batchmean": max(call.leading[0], 1) if call.leading else 1}
    return live, labels, weights, divisor.get(call.options["reduction"], 1) if items is None else float(items)


def plain_losses(call: Call, given: list[Any]) -> list[Tensor]:
    live, labels, weights, divisor = _per_token(call)
    options, T = call.options, call.options.get("temperature", 1.0)
    z = [plain.logits(side, call.vocab) for side in given]
    student, values = z[0], []
    safe = None if labels is None else torch.where(live, labels, 0)
    hard = options.get("hard_weight", 1.0 if call.kind == "cross_entropy" else 0.0)
    if call.kind == "codistillation":
        values = [torch.nn.functional.cross_entropy(z[1], safe, reduction="none")]
    rows = student.new_zeros(len(student))
    if call.kind == "log_probs":
        ids = call.asked_ids()
        asked = (student / T).log_softmax(-1).gather(-1, ids.where(_is_id(call, ids), 0))
        some = _is_id(call, ids) & (call.id_weights != 0)
        rows = -torch.where(some, asked * call.id_weights.to(asked.dtype), 0.0).sum(-1)
    if weight := options.get("entropy_weight"):
        log_q = (student / T).log_softmax(-1)
        rows = rows - weight * (log_q.exp() * log_q).sum(-1)
    if soft := _soft_weight(call):
        rows = rows + soft * _plain_soft(
            call, student, z[1].detach() if call.kind == "codistillation" else None, T
        )
    if hard:
        smoothing = options.get("label_smoothing", 0.0)
        entropy = torch.nn.functional.cross_entropy(
            student, safe, reduction="none", label_smoothing=smoothing
        )
        rows = rows + hard * (entropy + options.get("z_loss", 0.0) * student.logsumexp(-1).square())
    reduced = []
    for value in [rows, *values]:
        value = torch.where(live & (weights != 0), value, 0.0) * weights.to(value.dtype) / divisor
        reduced.append(value.reshape(call.leading) if options["reduction"] == "none" else value.sum())
    return reduced


def _is_id(call: Call, ids: Tensor) -> Tensor:
    return (ids >= 0) & (ids != call.ignore_index)


def _soft_weight(call: Call) -> float:
    if call.kind in ("cross_entropy", "log_probs"):
        return 0.0
    squared = call.options["temperature"] ** 2 if call.options["temperature_squared"] else 1.0
    return call.options["soft_weight"] * squared


def _plain_soft(call: Call, z: Tensor, teacher: Tensor | None, T: float) -> Tensor:
    if isinstance(call.teacher, kd.SparseTarget):
        target = sparse_truth(call.teacher)
        t = torch.from_numpy(target.weights(call.vocab).astype(np.float64)).to(z.dtype)
        return plain.sparse_rows(z, t, target.tail, call.divergence, T)
    if teacher is None:
        teacher = plain.logits(call.teacher.given(cleaned(call, call.teacher)), call.vocab)
    name, *parameters = call.divergence
    dtype = torch.promote_types(z.dtype, teacher.dtype)
    lp, lq = (teacher / T).log_softmax(-1).to(dtype), (z / T).log_softmax(-1).to(dtype)
    return plain.divergence(name, parameters, lp, lq).to(z.dtype)


def sparse_truth(target: kd.SparseTarget) -> oracle.Sparse:
    linear = target.logprobs is None
    ids, values = (numbers(t.reshape(-1, t.shape[-1])) for t in (target.ids, target.values))
    given = (ids >= 0) & (values != (0 if linear else -np.inf))
    if target.mask is not None:
        given &= target.mask.reshape(ids.shape).numpy()
    return oracle.Sparse(ids, values, linear, given, target.tail)


def truth(call: Call):
    live, labels, weights, divisor = _per_token(call)
    arriving = numbers(
        call.factor.expand(call.leading).reshape(-1) if call.options["reduction"] == "none" else call.factor
    )
    common = dict(
        live=live.numpy(), token_weights=numbers(weights), divisor=divisor, arriving=oracle.wide(arriving)
    )
    numbers_of = {name: call.options.get(name, 0.0) for name in ("hard_weight", "label_smoothing", "z_loss")}
    if call.kind == "cross_entropy":
        numbers_of["hard_weight"] = 1.0
    if call.ids is not None:
        ids = call.asked_ids()
        common["ids"] = torch.where(_is_id(call, ids), ids, -1).numpy()
        common["id_weights"] = numbers(call.id_weights)
    options = oracle.Options(
        **common,
        entropy_weight=call.options.get("entropy_weight", 0.0),
        divergence=call.divergence,
        temperature=call.options.get("temperature", 1.0),
        soft_weight=_soft_weight(call),
        **numbers_of,
    )
    teacher: Any = call.teacher
    if isinstance(teacher, Side):
        teacher = teacher.truth(call.vocab)
    elif teacher is not None:
        teacher = sparse_truth(teacher)
    y = None if labels is None else labels.numpy()
    found = [oracle.losses(call.student.truth(call.vocab), teacher, y, options)]
    if call.kind == "codistillation":
        found.append(oracle.losses(teacher, None, y, oracle.Options(**common, hard_weight=1.0)))
    return found


def _judge(call: Call, ours, theirs, truths) -> None:
    live, _, weights, divisor = _per_token(call)
    size = numbers((weights.double() * live).abs() / divisor)
    factor = abs(numbers(call.factor.expand(call.leading).reshape(-1) if call.factor.dim() else call.factor))
    # One pass serves both models of a co-distillation, with one set of weights in the student's precision.
    coarse = max(torch.finfo(_wide(side)).eps for side in sides(call))
    for side, (value, grads), (plain_value, plain_grads), (rows, slopes) in zip(
        sides(call), ours, theirs, truths
    ):
        assert value.dtype == _wide(side), f"the loss is {value.dtype}, not {_wide(side)}"
        expected, allowed = (
            rows,
            4 * FEW * coarse * (size + abs(rows)) + _product(call) * abs(rows),
        )
        if call.options["reduction"] == "none":
            expected, allowed = (a.reshape(call.leading) for a in (expected, allowed))
        else:
            expected, allowed = expected.sum(), allowed.sum()
        _close("loss", value, plain_value, expected, allowed)
        if (factor == 0).any() and not np.isfinite(rows).all():
            continue  # nothing of an infinite loss
        terms = oracle.terms(side.truth(call.vocab), size * factor)
        one = slopes[0] / np.where(size * factor == 0, 1, size * factor)[:, None]
        if side.tensors[0].memory.dtype == torch.float16 and abs(np.nan_to_num(one)).max(initial=0) > 65504:
            continue  # the gradient of a loss of weight 1 is kept in fp16, which has no such number
        for i, (grad, plain_grad) in enumerate(zip(grads, plain_grads)):
            if grad is not None:
                plain_grad = torch.zeros_like(grad) if plain_grad is None else plain_grad
                allowed = (FEW * coarse + _others_product(call, side)) * np.linalg.norm(terms[i])
                _close_gradient(i, grad, plain_grad, slopes[i], allowed)


def _judge_statistics(call: Call, stats: kd.Stats) -> None:
    """Each is a mean over the tokens that count; entropies of a sparse target are of its outcomes, and not here."""
    live, labels, *_ = _per_token(call)
    T, z = call.options["temperature"], call.student.truth(call.vocab)
    z, tokens = z.logits() if isinstance(z, oracle.Head) else oracle.wide(z), max(int(live.sum()), 1)
    assert stats.tokens == live.sum(), f"{stats.tokens} tokens for {live.sum()}"
    if not np.isfinite(z[(live & ~call.counting().reshape(-1)).numpy()]).all():
        return  # a token of weight 0 has no part in the loss, but it has in these means
    expected = {}
    if isinstance(call.teacher, Side):
        t = call.teacher.truth(call.vocab)
        t = t.logits() if isinstance(t, oracle.Head) else oracle.wide(t)
        expected["soft"] = oracle.divergence_rows(z, t, call.divergence, T)[0]
        expected["student_entropy"], expected["teacher_entropy"] = (oracle.entropy_rows(x, T) for x in (z, t))
    else:
        expected["soft"] = oracle.sparse_rows(z, sparse_truth(call.teacher), call.divergence, T)[0]
    if call.options["hard_weight"]:
        safe = torch.where(live, labels, 0).numpy()
        smoothing, z_loss = (call.options.get(name, 0.0) for name in ("label_smoothing", "z_loss"))
        expected["hard"] = oracle.cross_entropy_rows(z, safe, smoothing, z_loss)[0]
    for name, rows in expected.items():
        truth = np.where(live.numpy(), rows, 0).sum() / tokens
        # Without the plain formula beside it: what a product rounds shifts a mean by some ulp of the logits.
        size = abs(z[np.isfinite(z)]).max(initial=1)
        allowed = 1e-4 * (1 + abs(truth)) + 8 * _product(call) * size * max(1, abs(truth))
        found = getattr(stats, name).item()
        assert not np.isfinite(truth) or abs(found - truth) <= allowed, f"stats.{name} is {found} for {truth}"


def _wide(side: Side) -> torch.dtype:
    return torch.float64 if side.tensors[0].memory.dtype == torch.float64 else torch.float32


def _product(call: Call) -> float:
    """One rounding of what a head's product was rounded to."""
    heads = [side for side in (call.student, call.teacher) if isinstance(side, Side) and side.head]
    return max((torch.finfo(side.tensors[0].memory.dtype).eps for side in heads), default=0.0)


def _others_product(call: Call, side: Side) -> float:
    """One rounding of a teacher's product that is coarser than the student's numbers."""
    teacher = call.teacher
    if not isinstance(teacher, Side) or teacher is side or not teacher.head:
        return 0.0
    theirs, own = (torch.finfo(one.tensors[0].memory.dtype).eps for one in (teacher, side))
    return theirs if theirs > own else 0.0


def _close_gradient(which: int, grad: Tensor, plain: Tensor, truth, allowed: float) -> None:
    """By norm; a gradient is 0 in the columns that vocab_size cuts off."""
    columns = which == 0 and truth.ndim == 2
    ours, theirs = (numbers(g.reshape(-1, g.shape[-1]) if columns else g) for g in (grad, plain))
    whole = np.zeros(ours.shape)
    whole[(slice(None), slice(truth.shape[1])) if columns else slice(len(truth))] = truth
    if not np.isfinite(whole).all():
        return
    error, excused = (
        np.linalg.norm(ours - whole),
        np.nan_to_num(np.linalg.norm(theirs - whole), nan=0.0, posinf=0.0),
    )
    allowed = 2 * excused + allowed + FEW * torch.finfo(grad.dtype).eps * np.linalg.norm(whole)
    what = ("hidden states or logits", "weight", "bias")[which]
    assert error <= allowed, (
        f"gradient of {what}: off by {error:.3g} of {np.linalg.norm(whole):.3g}, plain by {excused:.3g}, allowed {allowed:.3g}"
    )


def _close(what: str, ours: Tensor, theirs: Tensor, truth, allowed) -> None:
    ours, theirs, truth = numbers(ours), numbers(theirs), np.asarray(truth, np.float64)
    assert ours.shape == truth.shape, f"{what} has shape {ours.shape}, the truth {truth.shape}"
    error, excused = abs(ours - truth), np.nan_to_num(abs(theirs - truth), nan=0.0, posinf=0.0)
    good = ~np.isfinite(truth) | (error <= 2 * excused + allowed)
    assert good.all(), f"{what}: {ours[~good]} for {truth[~good]}, plain {theirs[~good]}"
