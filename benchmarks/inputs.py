"""The tensors of a case, and a step's fresh view of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import real
from benchmarks.cases import Case

#: Large tensors repeat a random block of this many numbers, or making them would take longer than
#: measuring. It is prime, so that no two rows are the same.
_BLOCK = 4_194_301


class _Handed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, logits):
        return torch.empty(0, dtype=logits.dtype, device=logits.device).set_(
            logits.untyped_storage(), 0, logits.shape
        )

    @staticmethod
    def backward(ctx, grad):
        return None, None


def handed(logits: Tensor) -> Tensor:
    """``logits`` as an lm_head returns them: not a leaf, and used by nothing else."""
    return _Handed.apply(torch.zeros((), requires_grad=True), logits)


def _random(shape: tuple[int, ...], scale: float, dtype: torch.dtype, device: str) -> Tensor:
    count = math.prod(shape)
    block = (torch.randn(min(count, _BLOCK), device=device) * scale).to(dtype)
    if count <= _BLOCK:
        return block.view(shape)
    flat = torch.empty(count, dtype=dtype, device=device)
    for start in range(0, count, _BLOCK):
        flat[start : start + _BLOCK] = block[: count - start]
    return flat.view(shape)


class Inputs:
    """One set of a case's tensors: ``student`` and ``teacher`` are [logits] or [hidden, weight]."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case = case
        if case.spectrum == "real":
            self._of_a_real_model(device)
        else:
            self.student = self._side(case.width, device)
            self.teacher = self._side(case.teacher_width or case.width, device)
            self.labels = torch.randint(0, case.vocab, (case.tokens,), device=device)
        if masked := case.tokens - case.live_tokens:
            self.labels[torch.randperm(case.tokens, device=device)[:masked]] = -100
        self.target: kd.SparseTarget | None = None
        if case.top_k:
            self.target, self.teacher = self._sparse(device), []
        self._scratch: Tensor | None = None

    def _sparse(self, device: str) -> kd.SparseTarget:
        """A target as a teacher cache holds it: the largest of some logits, at ids that are spread out."""
        case = self.case
        values = _random((case.tokens, 8 * case.top_k), 2.0, torch.float32, device)
        logprobs = values.log_softmax(-1).topk(case.top_k).values
        step = case.vocab // case.top_k
        ids = torch.arange(case.top_k, device=device) * step
        ids = ids + torch.randint(0, step, (case.tokens, case.top_k), device=device)
        return kd.SparseTarget(ids, logprobs, tail="bucket")

    def _of_a_real_model(self, device: str) -> None:
        """The teacher, and as its student the teacher without six layers, whose lm_head is the teacher's own."""
        case, made = self.case, real.read()
        if (case.vocab, case.width) != made["weight"].shape or case.tokens > len(made["labels"]):
            raise ValueError(
                f"{case.name}: a real model's are {real.TOKENS} tokens, {real.WIDTH} -> {real.VOCAB}"
            )
        as_case = lambda tensor: tensor.to(device, case.torch_dtype)  # noqa: E731
        weight = as_case(made["weight"])
        self.student = [as_case(made["without six layers"])[: case.tokens], weight]
        self.teacher = [as_case(made["teacher"])[: case.tokens], weight]
        self.labels = made["labels"][: case.tokens].to(device, copy=True)

    def _side(self, width: int, device: str) -> list[Tensor]:
        case = self.case
        if not width:
            return [_random((case.tokens, case.vocab), 2.0, case.torch_dtype, device)]
        shapes = ((case.tokens, width), 1.0), ((case.vocab, width), 2.0 / width**0.5)
        hidden, weight = (_random(shape, scale, case.torch_dtype, device) for shape, scale in shapes)
        # One direction holds how frequent a token is: the logarithm of Zipf's law.
        if case.spectrum == "peaked":
            hidden[:, 0] = 1.0
            weight[:, 0] = -torch.arange(1, case.vocab + 1, device=device).log()
        return [hidden, weight]

    def tensors(self) -> list[Tensor]:
        sparse = [] if self.target is None else [self.target.ids, self.target.values]
        return [*self.student, *self.teacher, *sparse, self.labels]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def scratch(self) -> Tensor:
        """A copy of the student's logits for one in-place step; :meth:`restore` renews it."""
        if self._scratch is None:
            self._scratch = self.student[0].clone()
        return self._scratch

    def restore(self) -> None:
        if self._scratch is not None:
            self._scratch.copy_(self.student[0])

    def double(self) -> Inputs:
        """The same numbers in fp64, for the oracle."""
        wide = object.__new__(Inputs)
        wide.case, wide.labels, wide.target, wide._scratch = self.case, self.labels, self.target, None
        wide.student, wide.teacher = ([t.double() for t in side] for side in (self.student, self.teacher))
        return wide


class Step:
    """What one training step sees: leaves without a gradient, or logits that it may overwrite."""

    def __init__(self, inputs: Inputs, *, inplace: bool = False) -> None:
        self.case, self.inputs = inputs.case, inputs
        self.labels = inputs.labels
        self._inplace = inplace
        if inplace:
            self.student = [handed(inputs.scratch())]
        else:
            self.student = list(self._leaves(inputs.student, trains=True))
        self.teacher = list(self._leaves(inputs.teacher, trains=self.case.teacher_trains))

    def _leaves(self, tensors: list[Tensor], *, trains: bool) -> Iterator[Tensor]:
        for index, tensor in enumerate(tensors):
            frozen = index == 1 and self.case.frozen_head
            yield tensor.detach().requires_grad_(trains and not frozen)

    @property
    def mask(self) -> Tensor | None:
        """Labels for a soft loss, which uses them only as a mask; None if nothing is masked."""
        return self.labels if self.case.masked else None

    @staticmethod
    def _given(tensors: list[Tensor]) -> Tensor | kd.LinearHead:
        return tensors[0] if len(tensors) == 1 else kd.LinearHead(*tensors)

    def sides(self) -> tuple[Tensor | kd.LinearHead, Tensor | kd.LinearHead | kd.SparseTarget]:
        """(student, teacher) as kdkernels takes them."""
        return self._given(self.student), self.inputs.target or self._given(self.teacher)

    def logits(self) -> tuple[Tensor, Tensor]:
        """(student, teacher) logits, projected from hidden states if the case has those."""
        return self.student_logits(), self._logits(self.teacher)

    def student_logits(self) -> Tensor:
        return self._logits(self.student)

    @staticmethod
    def _logits(side: list[Tensor]) -> Tensor:
        return side[0] if len(side) == 1 else torch.nn.functional.linear(*side)

    def gradients(self) -> list[Tensor | None]:
        """The gradients that the backward left, for the leaves that train."""
        if self._inplace:
            return [self.inputs.scratch()]
        return [leaf.grad for leaf in self.student + self.teacher if leaf.requires_grad]
