"""The loss layer for LLM distillation: exact losses without a full ``[tokens, vocab]`` tensor."""

from . import distributed, testing
from .backends import backends, use_backend
from .backends.native import instruction_set
from .divergences import (
    JSD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    Mixed,
    Overlap,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)
from .heads import LinearHead, Shard, ShardedLogits
from .log_probs import TokenLogProbs, token_log_probs
from .losses import (
    CodistillationLoss,
    Stats,
    codistillation_loss,
    cross_entropy,
    distillation_loss,
    explain,
    js_divergence,
    kl_div,
    linear_cross_entropy,
)
from .modules import (
    CodistillationLossModule,
    CrossEntropyLoss,
    DistillationLoss,
    JSDivergenceLoss,
    KLDivLoss,
    LinearCrossEntropyLoss,
)
from .producers import GEMMA_SAMPLES, sample_target, target_at, top_k_target, top_p_target
from .sampled import sampled_kl
from .targets import SparseTarget

__version__ = "0.1.0"

__all__ = [
    "GEMMA_SAMPLES",
    "JSD",
    "AlphaBeta",
    "CodistillationLoss",
    "CodistillationLossModule",
    "CrossEntropyLoss",
    "DistillationLoss",
    "Divergence",
    "ForwardKL",
    "JSDivergenceLoss",
    "KLDivLoss",
    "LinearCrossEntropyLoss",
    "LinearHead",
    "Mixed",
    "Overlap",
    "ReverseKL",
    "Shard",
    "ShardedLogits",
    "SkewKL",
    "SkewReverseKL",
    "SparseTarget",
    "Stats",
    "TokenLogProbs",
    "TotalVariation",
    "backends",
    "codistillation_loss",
    "cross_entropy",
    "distillation_loss",
    "distributed",
    "explain",
    "instruction_set",
    "js_divergence",
    "kl_div",
    "linear_cross_entropy",
    "sample_target",
    "sampled_kl",
    "target_at",
    "token_log_probs",
    "testing",
    "top_k_target",
    "top_p_target",
    "use_backend",
]
