"""Tiny runs of ``python -m kdkernels train`` for the tests: settings, processes, weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from kdkernels.__main__ import main
from kdkernels.trainer import models, train
from kdkernels.trainer.command_line import resolve

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kdkernels" / "backends"  #: text to train on


def options(folder, **values):
    """A few steps of micro models on a few source files."""
    return {
        "output_dir": str(folder),
        "student": "micro",
        "teacher": "micro",
        "tokenizer_size": 300,
        "data": [str(PACKAGE)],
        "max_length": 32,
        "max_steps": 4,
        "logging_steps": 1,
        "eval_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "validation_sequences": 5,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        **values,
    }


def run(mode, folder, **values):
    """In this process."""
    return train.run(resolve(mode, options(folder, **values)))


def error_of(capsys, mode, folder, **values):
    """The line that the command ends with; it leaves no half of a run."""
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(options(folder / "run", **values)))
    with pytest.raises(SystemExit) as caught:
        main(["train", mode, "--config", str(path)])
    assert not (folder / "run" / "config.yaml").exists() or (folder / "run" / "model").exists()
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code  # printed, and exit status 1
    return caught.value.code


def start_weights(name, folder, seed):
    """What a model made from scratch begins with."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return models.load_model(name, tokenizer, dtype="float32", seed=seed, max_length=32).state_dict()


def with_opening(folder):
    """The tokenizer of a folder, with a <bos> before every text, as Llama's has it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


#: What a micro teacher writes, in hard and compare.
WRITES = {"prompts": 12, "prompt_tokens": 4}


#: Several commands in one process.
SEVERAL = """
import json, sys
from kdkernels.__main__ import main
for command in json.loads(sys.argv[1]):
    main(command)
"""

#: accelerate shards over accelerators only: here its switch is set by hand, then fully_shard runs over gloo.
FSDP_ON_CPU = (
    """
import accelerate.state, accelerate.utils, json, sys
original, plugin = accelerate.state.AcceleratorState.__init__, None
def init(self, *arguments, fsdp_plugin=None, **options):
    global plugin
    plugin = fsdp_plugin or plugin
    original(self, *arguments, fsdp_plugin=plugin, **options)
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = accelerate.utils.DistributedType.FSDP, plugin
accelerate.state.AcceleratorState.__init__ = init
"""
    + SEVERAL
)


#: accelerate takes tensor parallelism on accelerators only: here its check is left out, and transformers' is over gloo.
TENSOR_PARALLEL_ON_CPU = (
    """
from accelerate import ParallelismConfig
ParallelismConfig._validate_accelerator = lambda self, accelerator: None
"""
    + SEVERAL
)


def flags(values):
    line = []
    for name, value in values.items():
        if value is not None:
            line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def process(*arguments, script=None, torchrun=False, timeout=240, cwd=ROOT):
    """A real process: the command itself, or a script that ends in it."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script)] if script else ["-m", "kdkernels"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def weights(folder):
    """Every weight of the models under a folder, by file and name."""
    from safetensors.torch import load_file

    return {
        f"{path.parent.name}/{name}": tensor
        for path in sorted(Path(folder).rglob("*model.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
