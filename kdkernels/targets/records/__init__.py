"""Top-k log-probabilities as other programs write them -> (ids, logprobs) for a SparseTarget.

Unless said otherwise, row t of the result is about token t + 1, as row t of a causal LM's logits is.
A record that does not have its producer's shape is a ValueError that says which record and what is wrong.
Nothing but torch is imported: numpy arrays, lists and the producers' own objects are taken as they come.

A producer is a module. Most write lists of slots (slots.py), some arrays (arrays.py).
"""

from .axolotl import axolotl
from .distillkit import distillkit, distillkit_bytes
from .megatron import megatron
from .tinker import tinker
from .trl_server import trl_server
from .vllm import vllm

__all__ = ["axolotl", "distillkit", "distillkit_bytes", "megatron", "tinker", "trl_server", "vllm"]
