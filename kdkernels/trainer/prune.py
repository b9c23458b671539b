"""A smaller model from a larger one: the layers that change the hidden states least are left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .settings import UserError


def influence(model: Any, rows: list[list[int]]) -> list[float]:
    """How far each layer turns the hidden states of ``rows`` of ids: 1 - cos(before, after), over all tokens.

    This is ShortGPT's block influence (arXiv:2403.03853).
    """
    similar = []
    for ids in rows:
        with torch.inference_mode():
            states = model(
                input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False
            ).hidden_states
        similar.append(
            torch.stack([torch.cosine_similarity(*pair, dim=-1)[0] for pair in zip(states, states[1:])])
        )
    return (1 - torch.cat(similar, dim=1).mean(1)).tolist()


def least(influences: list[float], count: int) -> list[int]:
    """The ``count`` layers of the least influence, in the model's order.

    >>> least([0.9, 0.2, 0.1, 0.3], 2)
    [1, 2]
    """
    return sorted(sorted(range(len(influences)), key=influences.__getitem__)[:count])


def without_layers(model: Any, dropped: list[int]) -> Any:
    """The model, changed in place: without these layers, and with a config that says so."""
    layers = layers_of(model)
    kept = [index for index in range(len(layers)) if index not in dropped]
    model.base_model.layers = nn.ModuleList(layers[index] for index in kept)
    for place, layer in enumerate(model.base_model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in the cache of a model that writes
                module.layer_idx = place
    for name, value in model.config.to_dict().items():
        if isinstance(value, list) and len(value) == len(layers):  # one entry for each layer
            setattr(model.config, name, [value[index] for index in kept])
    model.config.num_hidden_layers = len(kept)
    return model


def layers_of(model: Any) -> nn.ModuleList:
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{type(model).__name__} has no list of layers to drop from")
    return layers
