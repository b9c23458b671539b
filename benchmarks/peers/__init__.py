"""Other libraries, one small module per family.

A family has ``NAME``, ``why_not(device)`` (None where it can run) and ``variants(case)``, which yields
(label, loss, forward); ``forward`` takes a Step and returns the mean loss over the unmasked tokens.
Nothing of a peer is imported before it runs.
"""

from __future__ import annotations

from benchmarks.peers import (
    axolotl,
    cut_cross_entropy,
    fla,
    liger,
    liger_triton,
    pytorch,
    quack,
    torchtune,
    trl,
    verl,
)

FAMILIES = (pytorch, trl, liger, torchtune, liger_triton, cut_cross_entropy, quack, fla, verl)
#: Those that take a sparse teacher.
SPARSE_FAMILIES = (axolotl,)
