"""Two gloo processes: gradients of call_through_head are everybody's, and a check of sharded weights ends for all."""

import pytest
import torch
import torch.distributed as dist

import kdkernels as kd

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from kdkernels.integrations.model_head import call_through_head, check_head  # noqa: E402

CONFIG = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.3,
    lru_width=32,
    logits_soft_cap=2.0,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def capped():
    torch.manual_seed(0)
    return transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**CONFIG)).eval()


class Doubling(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def head_gradient(model, run, labels):
    """Of the final norm: every token has a part in it."""
    model.zero_grad()
    run(labels).backward()
    gradient = model.model.final_norm.weight.grad
    return getattr(gradient, "full_tensor", lambda: gradient)().clone()


def llama(seed, width=32):
    """With an lm_head of its own, and 49 rows: 25 and 24."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**CONFIG, "vocab_size": 49, "hidden_size": width, "head_dim": 8})
    return transformers.LlamaForCausalLM(config).eval()


def gathered(model):
    return {
        name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()
    }


def lm_heads_stay_sharded(rank, ids, labels):
    """Gradients of a body and its lm_head, of the mean over 6 and 2 tokens, and those of one process."""
    from torch.distributed.fsdp import fully_shard

    mine, kept, seen = {"input_ids": ids[rank : rank + 1]}, labels[rank : rank + 1], []
    alone, others = [llama(0), llama(1, 16)], [llama(0), llama(1, 16)]
    check_head(others[0])
    for model in others:
        fully_shard(model.lm_head, reshard_after_forward=True)
        for unit in (*model.model.layers, model):
            fully_shard(unit)

    def loss(models, inputs, labels, keep_sharded, scale=1.0):
        options = dict(divergence=kd.JSD(0.3), hard_weight=0.5, num_items=8)

        def distil(student, teacher):
            seen.append(student.vocab_size)
            return scale * kd.distillation_loss(student, teacher, labels, **options)

        student, teacher = models
        with torch.no_grad():
            said = call_through_head(teacher, inputs, lambda head: head, keep_sharded=keep_sharded)
        return call_through_head(student, inputs, lambda head: distil(head, said), keep_sharded=keep_sharded)

    for step in range(2):  # gradients of micro-batches add up
        if step:
            with torch.no_grad():  # as a callback that samples
                others[0](**mine)
        loss(alone, {"input_ids": ids}, labels, False).backward()
        loss(others, mine, kept, True, scale=2).backward()
    assert seen == [49, (25, 24)[rank]] * 2
    truth, made = gathered(alone[0]), gathered(others[0])
    for name, gradient in truth.items():
        assert gradient.norm() > 1e-4, name
        assert (made[name] - gradient).norm() < 1e-5 * gradient.norm(), name

    tied, together = capped(), llama(0)
    for model in (tied, together):
        fully_shard(model)
        with pytest.raises(ValueError, match=r"fully_shard\(model.lm_head, .*\) before"):
            call_through_head(model, mine, lambda head: head.hidden.sum(), keep_sharded=True)
        assert model.lm_head is model.get_output_embeddings() and hasattr(model.lm_head, "weight")


def on_rank(rank, store, ids, labels):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine, kept = {"input_ids": ids[rank : rank + 1]}, labels[rank : rank + 1]
    alone = capped()
    everybody = head_gradient(
        alone,
        lambda labels: call_through_head(alone, {"input_ids": ids}, lambda h: kd.cross_entropy(h, labels)),
        labels,
    )
    assert everybody.norm() > 1e-3

    def distance(gradient):
        return ((gradient - everybody).norm() / everybody.norm()).item()

    ddp = torch.nn.parallel.DistributedDataParallel(capped())
    own = ddp.module
    right = head_gradient(own, lambda y: call_through_head(ddp, mine, lambda h: kd.cross_entropy(h, y)), kept)
    assert distance(right) < 1e-5

    # What docs/transformers.md warns of: hidden states fetched from inside, past DDP. Nobody says a word.
    def past_ddp(y):
        hidden = ddp.module.model(**mine, use_cache=False).last_hidden_state
        return kd.cross_entropy(kd.LinearHead(hidden, own.lm_head.weight, softcap=2.0), y)

    assert distance(head_gradient(own, past_ddp, kept)) > 1e-2

    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(capped())
    gradient = head_gradient(
        sharded, lambda y: call_through_head(sharded, mine, lambda h: kd.cross_entropy(h, y)), kept
    )
    assert distance(gradient) < 1e-5
    wrong = capped()
    wrong.lm_head = Doubling(32, 48, bias=False)
    wrong = fully_shard(wrong)
    with pytest.raises(ValueError, match="does more than hidden @ weight.T"):
        check_head(wrong)
    uneven = labels.clone()
    uneven[1, 2:] = -100
    lm_heads_stay_sharded(rank, ids, uneven)
    dist.barrier()  # both came here
    dist.destroy_process_group()


def test_gradients_are_everybodys(tmp_path):
    ids = torch.randint(3, 48, (2, 7))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100  # as many tokens on each rank, so that means of means are means
    torch.multiprocessing.spawn(on_rank, (tmp_path / "store", ids, labels), nprocs=2)
