"""Sparse teacher targets, and the formats of other programs that they are read from."""

from .sparse_target import TAILS, SparseTarget, Tail

__all__ = ["TAILS", "SparseTarget", "Tail"]
