"""Megatron-core's own GPTModel on two gloo processes: with its logits, and with an output processor in their place.

Needs ``pip install --no-deps megatron-core==0.16.0``. Three things of it are replaced on the CPU: the device that
buffers are made on, the random state for dropout, which is 0 here, and norms, of which torch's refuse sequence
parallelism because nobody would add up their gradients. Nobody does here.
"""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

import kdkernels as kd  # noqa: E402
from kdkernels.integrations import megatron  # noqa: E402

VOCAB, BATCH, LENGTH = 50, 2, 8


def gpt(sequence_parallel, tied, **options):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=4,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        **options,
    )
    torch.manual_seed(0)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="LayerNorm"),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=tied,
    )


def on_rank(rank, folder):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.cuda.current_device = lambda: torch.device("cpu")
    random.CudaRNGStatesTracker.fork = lambda self, *name: contextlib.nullcontext()
    WrappedTorchNorm.__new__ = lambda cls, config, hidden_size, **_: torch.nn.LayerNorm(hidden_size)
    ids = 3 * torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)  # in both parts of the vocabulary
    inputs = ids, torch.arange(LENGTH).expand(BATCH, LENGTH), torch.ones(1, 1, LENGTH, LENGTH).tril() == 0
    labels, upstream, made = 7 * ids % VOCAB, 1.0 + ids, {}
    hook = megatron.output_processor(lambda head, own: kd.cross_entropy(head, own, reduction="none"))
    for sequence_parallel in (False, True):
        for tied in (False, True):
            model, both = gpt(sequence_parallel, tied), []
            for run in (
                lambda model=model: model(*inputs, labels=labels),
                lambda model=model: megatron.call_with_processor(model, hook, *inputs, labels=labels),
            ):
                model.zero_grad()
                loss = run()
                (loss * upstream).sum().backward()
                gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
                both.append({"loss": loss.detach(), **gradients})
            made[sequence_parallel, tied] = both
    torch.save(made, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.multiprocessing.spawn(on_rank, (str(folder),), 2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all tokens", "sequence parallel"])
def test_a_model_learns_the_same_without_logits(sequence_parallel, tied, outcomes):
    for made in outcomes:
        theirs, ours = made[sequence_parallel, tied]
        assert ours["loss"].shape == (BATCH, LENGTH) and list(ours) == list(theirs)
        for name, true in theirs.items():
            assert true.norm() > 1e-4, name
            assert (ours[name] - true).norm() < 1e-5 * true.norm(), name
