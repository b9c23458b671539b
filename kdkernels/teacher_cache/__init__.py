"""Sparse teacher targets on disk (extra ``cache``): write them once, train from them without a teacher."""

from .manifest import Manifest, data_fingerprint, tokenizer_hash
from .reader import Record, TeacherCache
from .writer import CacheWriter

__all__ = [
    "CacheWriter",
    "Manifest",
    "Record",
    "TeacherCache",
    "data_fingerprint",
    "tokenizer_hash",
]
