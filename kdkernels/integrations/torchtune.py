"""torchtune's distillation losses by their names, for a recipe's YAML::

    kd_loss:
      _component_: kdkernels.integrations.torchtune.ForwardKLWithChunkedOutputLoss

What differs from torchtune 0.6 (tests in ``tests/integrations/test_torchtune.py``):

* ForwardKL is the divergence. torchtune's leaves out the teacher's entropy: its value is the cross
  entropy of teacher and student, higher by the mean entropy (all of it where the two agree), with
  the same gradient. SymmetricKL differs by ``sym_kd_ratio`` of that.
* A token that one side alone rules out (a logit of -inf): where the side that the divergence averages over
  gives it mass, the loss is infinite. torchtune leaves the term out. -inf on both sides is no term in both.
* Chunked logits may be pieces of any lengths, ``tensor_split``'s too, and the labels are cut as they are.
  torchtune cuts labels by ``chunk``, whatever the pieces: it fails at others, or ends with the shorter list.
* With every token masked the loss is 0 with a zero gradient; torchtune's forward and reverse losses
  are then cut off from the graph, and its chunked reverse and symmetric losses NaN.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..divergences import Divergence, ForwardKL, Mixed, ReverseKL
from ..losses import distillation_loss


class _Loss(nn.Module):
    """A mean over unmasked tokens: logits ``[..., V]`` on both sides, labels of the tokens' number."""

    def __init__(self, divergence: Divergence, ignore_index: int) -> None:
        super().__init__()
        self.divergence, self.ignore_index = divergence, ignore_index

    def _sum(self, student: Tensor, teacher: Tensor, labels: Tensor, num_items: Tensor | None):
        """The sum over unmasked tokens, divided by ``num_items`` where it is given."""
        flat, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
        return distillation_loss(
            flat,
            teacher,
            labels.flatten(),
            divergence=self.divergence,
            reduction="sum",
            num_items=num_items,
            ignore_index=self.ignore_index,
        )

    def _items(self, labels: Tensor) -> Tensor:
        return (labels != self.ignore_index).sum().clamp(min=1)


class _WholeLoss(_Loss):
    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True
    ) -> Tensor:
        return self._sum(student_logits, teacher_logits, labels, self._items(labels) if normalize else None)


class _ChunkedLoss(_Loss):
    """The logits come as lists of pieces along the token dimension, as many as the recipe asks of the models."""

    def __init__(self, divergence: Divergence, num_output_chunks: int, ignore_index: int) -> None:
        super().__init__(divergence, ignore_index)
        self.num_output_chunks = num_output_chunks

    def forward(self, student_logits: list[Tensor], teacher_logits: list[Tensor], labels: Tensor) -> Tensor:
        batch, items = max(labels.shape[0], 1), self._items(labels)
        lengths, teachers = (
            [piece.shape[:-1].numel() // batch for piece in pieces]
            for pieces in (student_logits, teacher_logits)
        )
        if lengths != teachers or sum(lengths) != labels.shape[1]:
            raise ValueError(
                f"labels {tuple(labels.shape)} cannot be cut into pieces of {lengths} tokens for the student's "
                f"logits and {teachers} for the teacher's"
            )
        pieces = labels.split(lengths, dim=1)
        losses = [self._sum(*chunk, items) for chunk in zip(student_logits, teacher_logits, pieces)]
        return sum(losses[1:], losses[0])


class ForwardKLLoss(_WholeLoss):
    """KL(teacher || student).

    >>> import torch
    >>> s, t, labels = torch.randn(4, 10), torch.randn(4, 10), torch.tensor([1, 2, -100, 3])
    >>> ForwardKLLoss()(s, t, labels).shape
    torch.Size([])
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(ForwardKL(), ignore_index)


class ReverseKLLoss(_WholeLoss):
    """KL(student || teacher)."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(ReverseKL(), ignore_index)


class SymmetricKLLoss(_WholeLoss):
    """sym_kd_ratio KL(teacher || student) + (1 - sym_kd_ratio) KL(student || teacher).

    Raises ValueError unless 0 <= sym_kd_ratio <= 1.
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(_symmetric(sym_kd_ratio), ignore_index)


class ForwardKLWithChunkedOutputLoss(_ChunkedLoss):
    """:class:`ForwardKLLoss` of chunked logits.

    >>> import torch
    >>> s, t = ([torch.randn(2, 3, 10) for _ in range(2)] for _ in "st")
    >>> ForwardKLWithChunkedOutputLoss(num_output_chunks=2)(s, t, torch.ones(2, 6, dtype=torch.int64)).shape
    torch.Size([])
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(ForwardKL(), num_output_chunks, ignore_index)


class ReverseKLWithChunkedOutputLoss(_ChunkedLoss):
    """:class:`ReverseKLLoss` of chunked logits."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(ReverseKL(), num_output_chunks, ignore_index)


class SymmetricKLWithChunkedOutputLoss(_ChunkedLoss):
    """:class:`SymmetricKLLoss` of chunked logits."""

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:
        super().__init__(_symmetric(sym_kd_ratio), num_output_chunks, ignore_index)


def _symmetric(sym_kd_ratio: float) -> Divergence:
    if not 0.0 <= sym_kd_ratio <= 1.0:
        raise ValueError(f"sym_kd_ratio must be in the range [0, 1], got {sym_kd_ratio}")
    return Mixed(sym_kd_ratio)
