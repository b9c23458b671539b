"""Models and tokenizers: loaded by name or folder, or made from scratch."""

from __future__ import annotations

import contextlib
import glob
import hashlib
from pathlib import Path
from typing import Any, Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import cached_file

from .errors import UserError, one_line
from .files import save_whole
from .settings import SCRATCH, ModelSettings, Settings
from .weights import PACKAGED, plain, source

END_OF_TEXT = "<|endoftext|>"
#: What transformers and peft save of a model; beside them may lie checkpoints' other files.
MODEL_FILES = (
    "config.json",
    "adapter_config.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.bin",
)
#: One of which every tokenizer has that transformers loads.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def check_models(settings: ModelSettings, max_length: int) -> None:
    """Raises :class:`UserError` for a model that is not there or has too few positions. Only configs are read."""
    configs = {name: _pretrained(AutoConfig, name, "model").get_text_config() for name in settings.pretrained}
    sizes = [f"{name} has {config.vocab_size}" for name, config in configs.items()]
    if settings.tensor_parallel > 1 and len({config.vocab_size for config in configs.values()}) > 1:
        raise UserError(
            f"tensor_parallel={settings.tensor_parallel} needs lm_heads of the same size, so that a process has the "
            f"same tokens of both: {', '.join(sizes)}"
        )
    for name, config in configs.items():
        positions = positions_of(config)
        if positions is not None and max_length > positions:
            raise UserError(
                f"--max_length {max_length} is more than the {positions} positions of {name}: "
                f"give {positions} or less"
            )


def positions_of(config: Any) -> int | None:
    """The longest sequence that a model is made for; None if its config says nothing about it.

    >>> positions_of(LlamaConfig(max_position_embeddings=4096))
    4096
    """
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions is not None and rope.get("rope_type") in ("linear", "dynamic", "yarn"):
        # With these types of RoPE max_position_embeddings is the number before scaling, with others the number after it.
        unscaled = rope.get("original_max_position_embeddings") or positions
        return max(positions, int(unscaled * (rope.get("factor") or 1)))
    return positions


def fingerprint(name: str, *, writes: bool = False) -> str | None:
    """What tells a model from another one under the same name: of a folder, a hash of its configs and weights, and
    where it ``writes``, of what says where its texts end; of a name on the hub, the commit, or None if that is unknown
    (such models of one name are not told apart)."""
    if name in SCRATCH:
        return name
    where, file = source(name)
    if not Path(where).is_dir():
        return _pretrained(AutoConfig, name, "model")._commit_hash
    from ..teacher_cache.shards import sha256

    patterns = [glob.escape(file["gguf_file"])] if file else MODEL_FILES
    patterns = [*patterns, "generation_config.json"] if writes else patterns
    parts = sorted({path for pattern in patterns for path in Path(where).glob(pattern)})
    return hashlib.sha256("".join(path.name + sha256(path) for path in parts).encode()).hexdigest()


def parameters(model: Any, *, trained: bool = False) -> int:
    """How many numbers a model has, or trains. A parameter that ZeRO-3 shards counts as a whole."""
    return sum(
        getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or not trained
    )


def load_tokenizer(settings: ModelSettings, texts: Iterable[str], keep_in: Path) -> Any:
    """The tokenizer that both models share, trained on ``texts`` if neither brings one."""
    named = settings.pretrained
    if not settings.trains_tokenizer:
        ours = settings.tokenizer or named[0]
        tokenizer = _tokenizer(ours)
        for name in named[0 if settings.tokenizer else 1 :]:
            if not settings.tokenizer or has_tokenizer(name):
                _check_same(tokenizer, _tokenizer(name), ours, name)
    elif (keep_in / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(keep_in)
    else:
        tokenizer = train_tokenizer(texts, settings.tokenizer_size)
        save_whole(keep_in, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {settings.tokenizer or named[0]} has no end-of-text token")
    return tokenizer


def has_tokenizer(name: str) -> bool:
    """Whether a model brings a tokenizer."""
    where, file = source(name)
    if file:
        return True
    for each in TOKENIZER_FILES:
        with contextlib.suppress(OSError):  # it is not there
            cached_file(where, each)
            return True
    return False


def vocabulary(tokenizer: Any) -> int:
    """How many ids there are up to the tokenizer's largest. len(tokenizer) counts its tokens, and ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it can write any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def load_model(
    name: str, tokenizer: Any, *, dtype: str, seed: int, max_length: int, tensor_parallel: int = 1
) -> Any:
    """A causal LM by folder or name, or one of :data:`SCRATCH`, whose weights depend on ``seed`` alone.

    With ``tensor_parallel`` above 1 its layers are shared out over so many processes as it is loaded."""
    if name in SCRATCH:
        hidden, intermediate, layers, heads = SCRATCH[name]
        set_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary(tokenizer),
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=max(max_length, 2048),
                initializer_range=hidden**-0.5,  # transformers' 0.02 is for widths of thousands
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).to(getattr(torch, dtype))
    shared: dict[str, Any] = {} if tensor_parallel == 1 else _shared_out(name, tensor_parallel)
    model = plain(_whole(name, dtype=getattr(torch, dtype), **shared))
    weight = model.get_output_embeddings().weight
    rows = getattr(weight, "ds_shape", weight.shape)[0]  # under ZeRO-3 the weight tensor itself is empty
    if rows < vocabulary(tokenizer):
        raise UserError(
            f"model {name} has a vocabulary of {rows}, the tokenizer {vocabulary(tokenizer)}: "
            "they do not belong together"
        )
    return model


def _whole(name: str, **options: Any) -> Any:
    """A model of which every weight was found. transformers draws the others at random, with no more than a warning."""
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = _pretrained(AutoModelForCausalLM, name, "model", **options)
    once = {weight for weight, _ in model.named_parameters()}  # of tied ones the first
    odd = sorted(once & set(found["missing_keys"]) | {weight for weight, *_ in found["mismatched_keys"]})
    if odd:
        more = f" and {len(odd) - 1} more" if odd[1:] else ""
        raise UserError(
            f"cannot load model {name}: what its config asks for is missing or of another shape in its weights, "
            f"{odd[0]}{more}; give the whole model, with the config that it was saved with"
        )
    return model


def _shared_out(name: str, processes: int) -> dict[str, Any]:
    """What has transformers share a model out over the processes. UserError for one that it has no plan for."""
    from transformers.distributed import DistributedConfig

    config = _pretrained(AutoConfig, name, "model")
    with torch.device("meta"):
        plan = AutoModelForCausalLM.from_config(config).tp_plan
    if "lm_head" not in plan:
        what = "does not shard its lm_head" if plan else "is not there"
        raise UserError(
            f"tensor_parallel={processes}: transformers' tp_plan for {name} ({config.model_type}) {what}; leave it out"
        )
    return {"distributed_config": DistributedConfig(tp_size=processes, tp_plan="auto")}


def load_trained(folder: str, tokenizer: Any, settings: Settings) -> Any:
    """A model that a run has saved; of a LoRA run the base with its adapter."""
    if not Path(folder, "adapter_config.json").exists():
        return load_model(folder, tokenizer, dtype=settings.model.dtype, seed=0, max_length=2)
    from peft import PeftModel

    base = load_model(
        settings.model.student,
        tokenizer,
        dtype=settings.model.dtype,
        seed=settings.run.seed,
        max_length=settings.data.max_length,
    )
    return PeftModel.from_pretrained(base, folder)


def add_lora(model: Any, settings: ModelSettings, seed: int) -> Any:
    """The model with adapters whose first weights depend on ``seed`` alone."""
    if not settings.lora_rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--lora_rank needs peft: pip install peft") from error
    modules: Any = settings.lora_modules
    modules = modules[0] if modules == ["all-linear"] else modules
    set_seed(seed)
    return get_peft_model(
        model, LoraConfig(r=settings.lora_rank, target_modules=modules, task_type="CAUSAL_LM")
    )


def _pretrained(cls: Any, name: str, what: str, **options: Any) -> Any:
    where, file = source(name)
    try:
        with one_line(f"cannot load {what} {name}"):
            return cls.from_pretrained(where, **file, **options)
    except UserError as problem:
        if not Path(where).exists():
            raise UserError(
                f"no {what} {name}: not a folder here, and not found under this name "
                f"(scratch models are {', '.join(SCRATCH)}; packaged ones {', '.join(PACKAGED)})"
            ) from problem
        raise


def _tokenizer(name: str) -> Any:
    """The tokenizer that is there. For some models' configs transformers would make one that knows no word."""
    tokenizer = None
    if not Path(name).is_dir() or has_tokenizer(name):
        tokenizer = _pretrained(AutoTokenizer, name, "tokenizer")
    if tokenizer is None or not has_tokenizer(name):
        raise UserError(f"{name} brings no tokenizer: give the one that it was trained with, --tokenizer")
    return tokenizer


def _check_same(ours: Any, theirs: Any, our_name: str, their_name: str) -> None:
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine == other:
        return
    token = next(iter(sorted(t for t in mine.keys() | other.keys() if mine.get(t) != other.get(t))))
    raise UserError(
        f"tokenizer mismatch: {our_name} has {len(mine)} tokens, {their_name} {len(other)}, and {token!r} is "
        f"{mine.get(token)} in one, {other.get(token)} in the other; token-level distillation needs one vocabulary"
    )
