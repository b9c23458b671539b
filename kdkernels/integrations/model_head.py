"""A causal LM of transformers as hidden states and an lm_head.

The model runs its own forward, with everything that it takes (images, audio, position ids) and does before its
lm_head. Only the lm_head's forward is replaced, for the length of one call: it hands hidden states and weight to the
loss instead of projecting. FSDP, FSDP2 and ZeRO-3 gather weights around a module's forward, so they work, and
nothing here knows of them. A tensor-parallel lm_head stays in shards, and the loss is that of DTensors. So does one that
FSDP2 shards by itself, where that is asked for: another module then stands in its place, whose forward gathers nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any, Callable, Iterator

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

import kdkernels as kd

from ..backends.spec import LogitMap
from ..checks import is_wrapped
from ..core.shards import even_shard
from .common import forward_as, is_dtensor, replicated, whole

#: Of float32 logits. Those of half precision differ by their rounding.
TOLERANCE = 1e-3
#: What a forward may take by **kwargs, beside what it names. A recurrent model (xLSTM) ignores attention_mask. That is
#: right with padding on the right: no token with a label sees it.
_PASSED_ON = {*TransformersKwargs.__annotations__, "attention_mask", "use_cache", "return_dict"}
_WAY_OUT = "distil it from its logits, kd.distillation_loss(model(**batch).logits, ...)"


#: What check_head measured, by model, and of which lm_head: another one may do more than the first.
_logit_maps: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], LogitMap]] = (
    weakref.WeakKeyDictionary()
)
#: The causal LMs whose lm_head's forward is running a function of ours.
_entered: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: What a model's hook returns for None, which would leave the model's own output.
_NOTHING = object()


@torch.compiler.disable
def call_through_head(
    model: nn.Module,
    inputs: dict[str, Any],
    function: Callable[[kd.LinearHead], Any],
    with_router: Callable[[Any, Tensor], Any] | None = None,
    *,
    keep_sharded: bool = False,
) -> Any:
    """``function(LinearHead)`` of a causal LM, called inside its lm_head's forward, in a call of ``model`` itself.

    This is where hidden states come from in a training loop of your own. It calls ``model(...)``, with every hook
    that DDP, FSDP, FSDP2 or a DeepSpeed engine has put there: pass what they returned, not the module inside.
    ``ddp.module.model(ids)`` would give the same hidden states, but its gradients would not be reduced over processes.
    torch.compile of what calls it leaves this call out of its graphs.

    Args:
        model: a causal LM of transformers, plain or with LoRA of peft, wrapped for training or not.
        inputs: of its forward: ``input_ids [B, L]``, ``attention_mask``, images, ... but no labels.
        function: takes a :class:`kdkernels.LinearHead` of hidden ``[B, L, H]`` and the lm_head's weight ``[V, H]``,
            ``logit_scale`` and ``softcap`` included. A loss is computed in it, since sharded weights are gone later.
        with_router: takes what ``function`` returned and a mixture of experts' load balancing loss, times its
            coefficient, and gives what is returned, as ``torch.add`` does. Called where the model has such a loss,
            which is where its config says ``output_router_logits=True``; without it that loss is left out.
        keep_sharded: under FSDP2 hand over this rank's rows of the lm_head, as FSDP2 has them, with a
            ``Shard(tokens="sharded")``: neither the whole weight nor its whole gradient is made. The lm_head must be
            a unit of its own over all ranks with other tokens, ``fully_shard(model.lm_head,
            reshard_after_forward=True)`` before ``fully_shard(model)``, and ``check_head(model)`` before both: else
            the first call checks it, and gathers it once. A teacher's head beside it must be handed over so as well.

    Raises:
        ValueError: a model whose logits are not those of a linear head (:func:`check_head`, which the first call with
            an lm_head runs), labels or an input that its forward does not name, a compiled ``model``, a call of it in
            ``function``; ``keep_sharded`` of an lm_head that is no such unit, tied to embeddings, or adapted.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
    ...                                      num_hidden_layers=1, num_attention_heads=2))
    >>> ids = torch.tensor([[1, 2, 3, 4]])
    >>> labels = torch.tensor([[2, 3, 4, -100]])
    >>> loss = call_through_head(model, {"input_ids": ids}, lambda head: kd.cross_entropy(head, labels))
    >>> loss.backward()
    """
    own, causal_lm, head = _parts(model)
    logit_map = _known(causal_lm, head)
    if logit_map is None:
        logit_map = check_head(model)

    def forward(hidden: Tensor) -> tuple[Any, Tensor]:
        linear = (_sharded_head if keep_sharded else _linear_head)(head, hidden, logit_map)
        return function(linear), hidden.new_zeros(1, 1, linear.vocab_size)

    def finish(result: Any, output: Any) -> Any:
        router = None if with_router is None else _router_loss(causal_lm, output)
        return result if router is None else with_router(result, router)  # type: ignore[misc]

    with _replaced(causal_lm, head) if keep_sharded else contextlib.nullcontext(head) as called:
        return _run(model, own, causal_lm, called, inputs, forward, finish)


@torch.compiler.disable
def check_head(model: nn.Module, inputs: dict[str, Any] | None = None) -> LogitMap:
    """Measures what ``model`` does to its lm_head's output. ValueError if a LinearHead cannot express it.

    A forward, without gradients, of two tokens, or of ``inputs`` where a model takes no tokens alone: few, since this makes
    logits of them. The random state and every module's training mode are restored. The lm_head gets the hidden states, as
    they are and enlarged, and must project them. Then the model gets logits of every size instead of its
    own. What it makes of them must be a :class:`LogitMap`, whatever its config calls that. Where weights are sharded, every
    process must take part.
    """
    own, causal_lm, head = _parts(model)
    name, project, seen = type(causal_lm).__name__, head.forward, _Seen()
    given = _inputs_of_check(causal_lm, inputs)
    ids: Tensor = given["input_ids"]

    def forward(hidden: Tensor) -> tuple[None, Tensor]:
        seen.hidden = True
        linear = _linear_head(head, hidden, LogitMap())
        if linear.leading_shape != ids.shape:
            raise ValueError(
                f"{name} hands its lm_head hidden states {list(hidden.shape)} for tokens {list(ids.shape)}; {_WAY_OUT}"
            )
        _check_linear(name, head, project, linear, hidden)
        seen.logits = _logits_of_every_size(linear)
        torch.set_grad_enabled(True)  # shows what is learned between here and the logits
        return None, seen.logits.clone()  # a model may write over it

    def finish(_: None, output: Any) -> Any:
        torch.set_grad_enabled(False)
        return getattr(output, "logits", output[0] if isinstance(output, tuple) else None)

    with torch.no_grad(), _evaluating(model), torch.random.fork_rng(_gpus(ids)):
        try:
            logits = _run(model, own, causal_lm, head, given, forward, finish)
        except (AttributeError, TypeError, ValueError, LookupError, RuntimeError) as error:
            hooked = bool(head._forward_hooks or own._forward_hooks)
            why = _why_it_failed(name, error, two_tokens=inputs is None and not seen.hidden, hooked=hooked)
            if why is None:
                raise
            raise why from error
    logit_map = _measured(name, seen.logits, logits)
    _logit_maps[causal_lm] = weakref.ref(head), logit_map
    return logit_map


@dataclass
class _Seen:
    """What has passed a model's lm_head while it is checked."""

    hidden: bool = False  #: whether any hidden states have
    logits: Any = None  #: what the model got instead of its own


def _inputs_of_check(causal_lm: Any, inputs: dict[str, Any] | None) -> dict[str, Any]:
    """``inputs``, or two tokens. ValueError if they hold no tokens, or the weights are not here."""
    device = getattr(causal_lm, "device", torch.device("cpu"))
    if device.type == "meta":
        name = type(causal_lm).__name__
        raise ValueError(f"{name}'s weights are on the meta device (offloaded, perhaps); {_WAY_OUT}")
    if inputs is None:
        return {"input_ids": torch.tensor([[0, 1]], device=device)}
    if "input_ids" not in inputs:
        raise ValueError(
            f"check_head compares hidden states with input_ids, and inputs hold {', '.join(inputs)}"
        )
    return inputs


def _why_it_failed(name: str, error: Exception, *, two_tokens: bool, hooked: bool) -> Exception | None:
    """What to raise for an error of a checked model's forward; None if it says itself what is wrong.

    ``two_tokens``: it came before the lm_head, of a model that was given nothing else."""
    if isinstance(error, (torch.OutOfMemoryError, torch.distributed.DistError)):
        return None
    if two_tokens and _WAY_OUT not in str(error):
        return TakesOtherInputs(
            f"{name}'s forward of two tokens fails ({type(error).__name__}: {error}); where it takes more than tokens "
            f"call check_head(model, inputs) with a few of its own before it is trained, or {_WAY_OUT}"
        )
    if isinstance(error, ValueError):
        return None if name in str(error) else ValueError(f"{name}: {error}")
    if not hooked or isinstance(error, (LookupError, RuntimeError)):
        return None
    return ValueError(
        f"{name} or its lm_head has a forward hook, which gets no logits here: {error}; remove it, or {_WAY_OUT}"
    )


class TakesOtherInputs(ValueError):
    """A model cannot be measured with two tokens alone."""


def is_measured(model: nn.Module) -> bool:
    """Whether :func:`check_head` knows the model's lm_head."""
    _, causal_lm, head = _parts(model)
    return _known(causal_lm, head) is not None


def _known(causal_lm: nn.Module, head: nn.Module) -> LogitMap | None:
    """What was measured of this lm_head."""
    of, logit_map = _logit_maps.get(causal_lm, (None, None))
    return logit_map if of is not None and of() is head else None


def weights_are_here(model: nn.Module) -> bool:
    """Whether the model can be checked as it is: not on the meta device, not sharded, not left to ZeRO-3's engine."""
    return not any(p.is_meta or not p.numel() or is_dtensor(p) for p in model.parameters())


# -- one call ----------------------------------------------------------------------------------------


def _parts(model: nn.Module) -> tuple[nn.Module, Any, nn.Module]:
    """(model without DDP, FSDP or an engine around it, the causal LM in it, its lm_head)."""
    own: Any = extract_model_from_parallel(model)
    causal_lm = own.get_base_model() if _is_peft(own) else own
    if causal_lm in _entered:
        raise ValueError(_nested(causal_lm))
    if is_compiled_module(own) or any(m._compiled_call_impl is not None for m in (own, causal_lm)):
        raise ValueError(
            "the whole model is compiled, and its lm_head is replaced at every call; compile the part before "
            "it instead: model.base_model.compile()"
        )
    name = type(causal_lm).__name__
    if getattr(causal_lm.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder, whose labels are not shifted input_ids; {_WAY_OUT}")
    try:
        head = causal_lm.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if not isinstance(head, nn.Module) or isinstance(head, (nn.Embedding, nn.ModuleList)):
        raise ValueError(
            f"{name} has no lm_head: get_output_embeddings() gives {type(head).__name__}; {_WAY_OUT}"
        )
    return own, causal_lm, head


def _run(
    model: nn.Module,
    own: nn.Module,
    causal_lm: Any,
    head: nn.Module,
    inputs: dict[str, Any],
    forward: Callable[[Tensor], tuple[Any, Tensor]],
    finish: Callable[[Any, Any], Any],
) -> Any:
    """``model(**inputs)`` with its lm_head's forward replaced by one that gives (result, logits to go on with).

    The hooks of sharding look for tensors with a gradient in what a module returns, so the result must pass through
    them. The lm_head's last hook takes the result and returns the logits to the model. The model's first hook returns
    the result in place of the model's output.
    """
    results: list[Any] = []

    def enter_head(hidden: Tensor, **options: Any) -> tuple[Any, Tensor]:
        if causal_lm in _entered:
            raise ValueError(_nested(causal_lm))
        _entered.add(causal_lm)
        try:
            given = forward(hidden)  # refuses activated LoRA, which alone needs peft's alora_offsets
        finally:
            _entered.discard(causal_lm)
        if others := options.keys() - {"alora_offsets"}:
            raise ValueError(
                f"{type(causal_lm).__name__} gives its lm_head {', '.join(sorted(others))} beside hidden states; {_WAY_OUT}"
            )
        return given

    def leave_head(module: nn.Module, arguments: Any, returned: Any) -> Tensor:
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise ValueError(
                f"a forward hook of {type(causal_lm).__name__}'s lm_head changes its logits; {_WAY_OUT}"
            )
        results.append(returned[0])
        return returned[1]

    def leave_model(module: nn.Module, arguments: Any, output: Any) -> Any:
        if len(results) != 1:
            raise ValueError(
                f"{type(causal_lm).__name__} calls its lm_head {len(results)} times in a forward, not once; {_WAY_OUT}"
            )
        result = finish(results[0], output)
        return _NOTHING if result is None else result

    hooks = head.register_forward_hook(leave_head), own.register_forward_hook(leave_model, prepend=True)
    try:
        with forward_as(head, enter_head):
            returned = model(**_named(causal_lm, inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return None if returned is _NOTHING else returned


def _nested(causal_lm: Any) -> str:
    return (
        f"{type(causal_lm).__name__} is called inside its own call, by the function that its lm_head runs: call it "
        "before, and let the function use what it returned"
    )


def _named(causal_lm: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, with use_cache and return_dict where the forward takes them. ValueError if it would ignore an input, or
    compute a loss."""
    if inputs.get("labels") is not None:
        raise ValueError(
            f"the inputs hold labels, of which {type(causal_lm).__name__} would make a loss of its own logits: leave them "
            "out, and shifted by one give them to the loss in function, kd.cross_entropy(head, labels)"
        )
    names, passes_on = _signature(type(causal_lm))  # type: ignore[arg-type]
    known = names | _PASSED_ON if passes_on else names
    if unknown := [name for name in inputs if name not in known]:
        raise ValueError(
            f"{type(causal_lm).__name__}.forward does not name {', '.join(unknown)} and would ignore it: "
            f"leave it out of the batch, or use the model that takes it (it takes {', '.join(sorted(names - {'labels'}))})"
        )
    return {**inputs, **{n: v for n, v in (("use_cache", False), ("return_dict", True)) if n in known}}


@cache
def _signature(cls: Any) -> tuple[frozenset[str], bool]:
    """(the arguments that a class's forward and its base classes' forwards name, whether it takes others)."""
    forwards = [
        inspect.signature(c.forward)
        for c in cls.__mro__
        if issubclass(c, PreTrainedModel) and "forward" in vars(c)
    ]
    named = (p.name for f in forwards for p in f.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD)
    passes_on = any(p.kind == p.VAR_KEYWORD for p in forwards[0].parameters.values())
    return frozenset(named) - {"self"}, passes_on


def _router_loss(causal_lm: Any, output: Any) -> Tensor | None:
    """A mixture of experts' load balancing loss, times its coefficient, as the model adds it to its own loss."""
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    for place in (causal_lm, causal_lm.config, causal_lm.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if hasattr(place, name):
                return getattr(place, name) * loss
    raise ValueError(
        f"{type(causal_lm).__name__} returns an aux_loss and names no router_aux_loss_coef; "
        "set output_router_logits=False in its config"
    )


@contextlib.contextmanager
def _replaced(causal_lm: Any, head: nn.Module) -> Iterator[nn.Module]:
    """An empty module in the lm_head's place: FSDP2's hooks, which gather, are those of the lm_head."""
    empty = nn.Module()
    causal_lm.set_output_embeddings(empty)
    try:
        yield empty
    finally:
        causal_lm.set_output_embeddings(head)


# -- the lm_head -------------------------------------------------------------------------------------


def _linear_head(head: Any, hidden: Tensor, logit_map: LogitMap) -> kd.LinearHead:
    hidden, weight, bias = head_weights(head, hidden)
    return kd.LinearHead(
        replicated(hidden, weight),
        weight,
        bias,
        logit_scale=logit_map.scale,
        softcap=logit_map.softcap or None,
    )


def _sharded_head(head: Any, hidden: Tensor, logit_map: LogitMap) -> kd.LinearHead:
    """This rank's rows, as FSDP2 has them. Their gradient is a mean over the ranks, as FSDP2's own are."""
    weight: Any
    bias: Any
    weight, bias = _plain_weights(head)
    if not is_dtensor(weight) or len(weight.placements) > 1 or not weight.placements[0].is_shard(0):
        how = f"a DTensor {weight.placements}" if is_dtensor(weight) else "whole here"
        raise ValueError(
            f"keep_sharded needs an lm_head that FSDP2 shards by itself over one mesh dimension, and this one is {how}; "
            "call fully_shard(model.lm_head, reshard_after_forward=True) before fully_shard(model), with embeddings of "
            "their own"
        )
    shard = even_shard(weight.device_mesh.get_group(), weight.shape[0], tokens="sharded")
    rows = weight.to_local().to(hidden.dtype)
    own_bias = None if bias is None else bias.to_local().to(hidden.dtype)
    return kd.LinearHead(hidden, rows, own_bias, logit_map.scale, logit_map.softcap or None, shard)


def head_weights(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) of an lm_head, whatever peft has made of it.

    LoRA's ``W + s B A`` is the head ``[W, B]`` over hidden states ``[h, s A dropout(h)]``: one
    projection, dropout where peft has it, and no matrix the size of the logits.
    """
    if hasattr(head, "modules_to_save"):  # peft trains a copy of the whole head
        active = (
            [] if head.disable_adapters else [n for n in head.active_adapters if n in head.modules_to_save]
        )
        return head_weights(head.modules_to_save[active[0]] if active else head.original_module, hidden)
    if not hasattr(head, "base_layer"):
        return hidden, *_plain_weights(head)
    hidden, weight, bias = head_weights(head.base_layer, hidden)
    if head.disable_adapters or head.merged:
        return hidden, weight, bias
    # AdaLoRA's are parameters, between which there are singular values.
    if not isinstance(getattr(head, "lora_A", None), nn.ModuleDict) or getattr(head, "lora_variant", None):
        kinds = {type(layer) for layer in (head, *getattr(head, "lora_variant", {}).values())}
        found = " and ".join(sorted(f"{kind.__module__}.{kind.__name__}" for kind in kinds))
        raise ValueError(f"only plain LoRA is supported on an lm_head, got {found}")
    parts, columns = [hidden], [weight]
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        low = head.lora_A[name](head.lora_dropout[name](hidden.to(head.lora_A[name].weight.dtype)))
        parts.append((low * head.scaling[name]).to(hidden.dtype))
        columns.append(whole(head.lora_B[name].weight).to(weight.dtype))
        if head.lora_bias[name]:
            extra = whole(head.lora_B[name].bias) * head.scaling[name]
            bias = extra.to(weight.dtype) if bias is None else bias + extra.to(weight.dtype)
    return torch.cat(parts, -1), torch.cat(columns, -1), bias


def _plain_weights(head: Any) -> tuple[Tensor, Tensor | None]:
    kind, weight = type(head).__name__, getattr(head, "weight", None)
    # What parametrizations compute of their own parameters is the weight.
    others = [
        n
        for n, _ in head.named_parameters()
        if n not in ("weight", "bias") and not n.startswith("parametrizations.")
    ]
    if others:
        raise ValueError(
            f"the lm_head ({kind}) has parameters that a LinearHead leaves out: {', '.join(others)}; {_WAY_OUT}"
        )
    if (
        not isinstance(weight, Tensor)
        or weight.dim() != 2
        or not weight.is_floating_point()
        or weight.is_meta
        or is_wrapped(weight)
    ):
        raise ValueError(
            f"the lm_head ({kind}) has no floating weight [V, H] in reach of its forward (offloaded or "
            f"quantized, perhaps); {_WAY_OUT}"
        )
    return weight, getattr(head, "bias", None)


# -- measuring what a model does to its logits ---------------------------------------------------------


def _check_linear(
    name: str, head: nn.Module, project: Callable[[Tensor], Tensor], linear: kd.LinearHead, hidden: Tensor
) -> None:
    """The lm_head's own forward against its weights, on hidden states as they are and where logits reach 100."""
    largest = _projected(linear).abs().max().item()
    for factor in (1.0, 100 / max(largest, 1e-3)):
        expected = project(hidden * factor)
        actual = _projected(_linear_head(head, hidden * factor, LogitMap()))
        if actual.shape != expected.shape:
            raise ValueError(
                f"{name}'s lm_head ({type(head).__name__}) gives {list(expected.shape)}, its weight {list(actual.shape)}; {_WAY_OUT}"
            )
        wide = expected.double()
        # Of two results that are rounded once the norms differ by an eighth of an eps, with LoRA's sums by nearly a half;
        # of weights that are rounded to 8 bits, by more than that. The largest errors of all these are of one size.
        error = (actual.double() - wide).norm() / wide.norm().clamp(min=1e-30)
        roundings = 1.0 if hasattr(head, "lora_A") else 0.5
        if not error <= max(TOLERANCE, roundings * torch.finfo(expected.dtype).eps):
            raise ValueError(
                f"{name}'s lm_head ({type(head).__name__}) does more than hidden @ weight.T + bias: logits "
                f"differ by {error:.1e} of their size; {_WAY_OUT}"
            )


def _projected(linear: kd.LinearHead) -> Tensor:
    return whole(nn.functional.linear(linear.hidden, linear.weight, linear.bias))


def _logits_of_every_size(linear: kd.LinearHead) -> Tensor:
    """Distinct values ``[B, L, V]`` of both signs from 2^-10 to 2^14, which fp16 can hold. Any mask, cut or cap changes some."""
    dtype, device = torch.promote_types(linear.hidden.dtype, torch.float32), linear.hidden.device
    shape = *linear.leading_shape, linear.vocab_size
    sizes = torch.linspace(-10, 14, math.prod(shape), dtype=dtype, device=device).exp2()
    sizes[1::2].neg_()
    return sizes.view(shape)


def _measured(name: str, given: Tensor, logits: Any) -> LogitMap:
    """The LogitMap from ``given`` to ``logits``. The smallest values show its scale, the largest its softcap."""
    if not isinstance(logits, Tensor) or logits.shape != given.shape:
        raise ValueError(
            f"{name} makes {list(getattr(logits, 'shape', []))} of its lm_head's {list(given.shape)}; {_WAY_OUT}"
        )
    if logits.requires_grad:
        raise ValueError(
            f"{name} does something learned to its logits, which would get no gradient; {_WAY_OUT}"
        )
    tolerance, x, y = _tolerance(logits), given.double().flatten(), logits.double().flatten()
    scale, largest = (y[0] / x[0]).item(), y[-1].abs().item()
    found = LogitMap(scale)
    if 0 < largest < 0.5 * abs(scale * x[-1].item()):
        found = LogitMap(largest * math.atanh(y[0].item() / largest) / x[0].item(), largest)
    expected = found.logits(x, x.dtype)
    error, at = ((y - expected) / expected).abs().max(0)
    if not error <= tolerance:
        raise ValueError(
            f"{name} does more to its logits than a linear head with logit_scale and softcap: it makes "
            f"{y[at]:.4g} of {x[at]:.4g}, where {found} makes {expected[at]:.4g}; {_WAY_OUT}"
        )
    return found


def _tolerance(logits: Tensor) -> float:
    return max(TOLERANCE, torch.finfo(logits.dtype).eps)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; then each in its own mode again, since parts of a model may differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _gpus(tensor: Tensor) -> list[int]:
    return [] if tensor.device.index is None or tensor.is_cpu else [tensor.device.index]


def _is_peft(model: nn.Module) -> bool:
    config = getattr(model, "peft_config", None)
    if not config or not hasattr(model, "get_base_model"):
        return False
    if any(c.is_prompt_learning for c in config.values()):
        raise ValueError(
            "prompt learning adds tokens to the sequence; only weight adapters such as LoRA are supported"
        )
    return True
