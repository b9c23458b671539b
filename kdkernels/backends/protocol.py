"""The waist: what a backend is. It knows rows of logits, nothing of hidden states, reductions, shards or trainers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .outcomes import Outcomes
from .spec import Spec

#: What rows compiled kernels read and write.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_dtypes(dtypes: list[torch.dtype]) -> str | None:
    """Why compiled kernels do not serve rows of these dtypes; None where they do."""
    other = sorted({str(d) for d in dtypes if d not in KERNEL_DTYPES})
    return f"it serves fp32, bf16 and fp16 rows, not {', '.join(other)}" if other else None


class Tile(NamedTuple):
    """One vocabulary chunk of both models' rows, and where it lies.

    Rows have any stride and adjacent columns. Rows in half precision are computed in fp32, fp64 rows in fp64.
    ``labels`` -1 is a token that takes no part: its results and gradients are 0, whatever its logits are.
    """

    student: Tensor  # [n, w] raw logits
    teacher: Tensor | None  # [n, w]
    labels: Tensor | None  # int64 [n]
    temperature: Tensor  # fp64 [n], or [1] for all rows
    parameters: Tensor  # fp64 [P], the divergence's numbers
    offset: int  # where the columns begin in the vocabulary
    vocab: int  # columns of the whole row


class Gradients(NamedTuple):
    """Buffers ``[n, w]`` for d(loss)/d(raw logits), each of which may be its model's logits themselves."""

    student: Tensor | None
    teacher: Tensor | None

    @property
    def asked(self) -> bool:
        return self.student is not None or self.teacher is not None


class SparseGradient(NamedTuple):
    """The soft gradient of finished rows with a sparse target, before the row's weight.

    ``stored`` at the ids that the target stores, ``rest`` times the softmax of all others. ``at_1`` and ``softmax`` are
    of the whole row, stored ids included, contiguous, and anything where no hard term, or no entropy, is asked for.
    They are ``struct Normaliser`` and ``struct Softmax`` of csrc.
    """

    ids: Tensor  # int64 [n, K], ascending; -1: none
    rest: Tensor  # fp64 [n]
    stored: Tensor  # [n, K], adjacent columns
    at_1: Tensor  # fp64 [n, 2]: at temperature 1, the reference and log_sum_exp relative to it
    softmax: Tensor  # fp64 [n, 3]: at T, both, and the mean of (z - reference) / T


class Backend(Protocol):
    """``weights`` is fp64 ``[n, OUTPUTS]``: a row's loss is the sum of weight times output, and weight 0 times
    anything is 0. ``spec`` says which outputs are asked for; the others are not computed.
    """

    name: str

    def why_not(self) -> str | None:
        """None where it is usable on this machine, else why it is not."""

    def cannot(self, device: torch.device, dtypes: list[torch.dtype], spec: Spec) -> str | None:
        """None where it serves rows of these dtypes on this device, else why it does not."""

    def bytes_per_logit(self, dtypes: list[torch.dtype]) -> int:
        """Temporaries beside the tiles, for the schedule."""

    def fused(self, tile: Tile, weights: Tensor, spec: Spec, gradients: Gradients) -> Tensor:
        """Whole rows: results ``[n, RESULTS]`` fp64, and gradients where there are buffers."""

    def accumulate(self, tile: Tile, spec: Spec, state: Tensor, skipped: Tensor | None = None) -> None:
        """Fold one vocabulary chunk into the state ``[n, COLUMNS]``. The ids ``skipped`` ``[n, K]`` (ascending, -1:
        none) stay out of the student's reference, sums and top-1, but not out of its label's logit and sum."""

    def accumulate_value(self, tile: Tile, spec: Spec, state: Tensor) -> None:
        """For a divergence without a closed form, once the first pass is over: add a chunk's phi and q_psi."""

    def gradient(
        self,
        tile: Tile,
        weights: Tensor,
        spec: Spec,
        state: Tensor,
        gradients: Gradients,
        sparse: SparseGradient | None = None,
    ) -> None:
        """The gradient of one chunk from finished state. With ``sparse`` the soft term is that, and the state
        the rest's."""

    def fused_sparse(
        self, tile: Tile, target: Outcomes, weights: Tensor, spec: Spec, gradients: Gradients
    ) -> Tensor:
        """``fused`` for a sparse target."""
