"""A smaller model from a larger one: the layers that change the hidden states least are left out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .errors import UserError, one_line


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
    check_config(model)
    return model


def check_config(model: Any) -> None:
    """Raises :class:`UserError` if the model's config makes another model: one in which a layer's place says what it is."""
    refused = f"a {model.config.model_type} cannot lose these layers"
    with one_line(refused), torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config)).eval()
    refused += ", give another --drop or another model: by its config a layer's place, or how many there are, says what "
    ours, theirs = (each.state_dict() for each in (model, made))
    for name in ours | theirs:
        if (own := _shape(ours.get(name))) != (other := _shape(theirs.get(name))):
            raise UserError(f"{refused}it is, and {name} would be {other}, not {own}")
    _share(model, made)
    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        said, would_say = (each(input_ids=ids, use_cache=False).logits for each in (model, made))
    if not torch.allclose(said, would_say, rtol=0, atol=1e-4 * said.abs().max().item()):
        raise UserError(f"{refused}it does, and the student would say something else once it is loaded")


def _shape(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def _share(model: Any, made: Any) -> None:
    """Puts the tensors of ``model`` into another one of the same names, with those that are in no file."""
    made.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        module, _, last = name.rpartition(".")
        setattr(made.get_submodule(module), last, buffer)


def layers_of(model: Any) -> nn.ModuleList:
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{type(model).__name__} has no list of layers to drop from")
    return layers
