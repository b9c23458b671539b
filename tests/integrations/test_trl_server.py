"""Server distillation: the loss on a teacher's top k beside TRL's, and the trainer with a server that is
a model in this process."""

import contextlib
import os
from types import SimpleNamespace

import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl")

import tiny  # noqa: E402
import torch  # noqa: E402
from compare import assert_same, outcome  # noqa: E402
from peak import peak_of  # noqa: E402
from trl.experimental.server_distillation import (  # noqa: E402
    ServerDistillationConfig,
    ServerDistillationTrainer,
)

from kdkernels.integrations import trl as dropin  # noqa: E402

their_compute_loss = ServerDistillationTrainer.compute_loss
B, P, C, V = 3, 4, 6, 41


def fake_trainer(beta, temperature, tail, told):
    made = object.__new__(ServerDistillationTrainer)
    made.beta, made.temperature, made.loss_add_tail = beta, temperature, tail
    made.reverse_kl_top_1_mode, made.current_gradient_accumulation_steps = "sampled", 2
    made.model = SimpleNamespace(training=True)
    made._get_teacher_token_logprobs_from_server = lambda inputs, start: told
    return made


def batch(*, all_masked=False):
    prompt_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    kept = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]]) * (not all_masked)
    return {
        "prompt_ids": torch.randint(0, V, (B, P)),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(0, V, (B, C)),
        "completion_mask": kept,
    }


def server(inputs, k, *, holes=False):
    """What a server tells: log-probabilities of the top k and of the token, -inf beyond the completion."""
    start = 2  # the shortest prompt
    kept = torch.cat([torch.zeros(B, P - start), inputs["completion_mask"]], 1).bool()
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[:, start:]
    log_p = (2 * torch.randn(B, P - start + C, V)).log_softmax(-1)
    top, ids = log_p.topk(k, -1)
    actual = log_p.gather(-1, tokens[..., None])[..., 0]
    top = top.masked_fill(~kept[..., None], -torch.inf)
    if holes:
        top[:, ::2, -1] = -torch.inf
        top[0, P - start + 1] = -torch.inf
    return {
        "topk_logprobs": top,
        "topk_token_ids": ids,
        "actual_logprobs": actual.masked_fill(~kept, -torch.inf),
    }


def loss_of(function, trainer, inputs, logits):
    def call(leaf):
        return function(trainer, lambda input_ids, attention_mask: SimpleNamespace(logits=leaf), inputs)

    return outcome(call, [logits])


@pytest.mark.parametrize("beta, k", [(0.0, 1), (0.0, 5), (0.0, V), (0.3, 1), (0.5, 1), (1.0, 1)])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize("tail", [True, False])
def test_loss(beta, k, temperature, tail):
    inputs = batch()
    told = server(inputs, k)
    trainer = fake_trainer(beta, temperature, tail, told)
    logits = torch.randn(B, P + C, V)
    ours, theirs = (
        loss_of(f, trainer, inputs, logits) for f in (dropin.server_compute_loss, their_compute_loss)
    )
    if not tail and (beta == 1 or k == 1 and beta == 0):  # one outcome with all the mass: nothing to learn
        assert_same(ours, theirs, 1e-6, zero_gradient=True)
    elif tail and k == V:  # TRL clamps what is left of the student to 1e-7, with its gradient
        torch.testing.assert_close(ours[0][0], theirs[0][0], rtol=1e-4, atol=1e-4)
    else:
        assert_same(ours, theirs, 5e-5)


def test_top_one_is_the_sampled_token():
    inputs = batch()
    told = server(inputs, 1)
    told["topk_token_ids"] = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[:, 2:, None]
    told["topk_logprobs"] = told["actual_logprobs"][..., None]
    trainer, logits = fake_trainer(0.5, 1.0, True, told), torch.randn(B, P + C, V)
    assert_same(
        *(loss_of(f, trainer, inputs, logits) for f in (dropin.server_compute_loss, their_compute_loss)), 5e-5
    )


@pytest.mark.parametrize("tail", [True, False])
def test_empty_slots(tail):
    inputs = batch()
    trainer = fake_trainer(0.0, 1.0, tail, server(inputs, 4, holes=True))
    logits = torch.randn(B, P + C, V)
    assert_same(
        *(loss_of(f, trainer, inputs, logits) for f in (dropin.server_compute_loss, their_compute_loss)), 5e-5
    )


def test_all_masked():
    inputs = batch(all_masked=True)
    told = {
        "topk_logprobs": torch.full((B, 2, 3), -torch.inf),
        "actual_logprobs": torch.full((B, 2), -torch.inf),
        "topk_token_ids": torch.zeros(B, 2, 3, dtype=torch.int64),
    }
    trainer, logits = fake_trainer(0.0, 1.0, True, told), torch.randn(B, P + C, V)
    assert_same(
        *(loss_of(f, trainer, inputs, logits) for f in (dropin.server_compute_loss, their_compute_loss)),
        0.0,
        zero_gradient=True,
    )


@pytest.mark.parametrize("beta, missing", [(0.5, "actual-token"), (0.5, "top-1"), (1.0, "actual-token")])
def test_missing_logprobs_are_an_error(beta, missing):
    inputs = batch()
    told = server(inputs, 1)
    told["actual_logprobs" if missing == "actual-token" else "topk_logprobs"][0, 3] = -torch.inf
    trainer = fake_trainer(beta, 1.0, True, told)
    for function in (dropin.server_compute_loss, their_compute_loss):
        with pytest.raises(ValueError, match=f"{missing} logprobs"):
            loss_of(function, trainer, inputs, torch.randn(B, P + C, V))


class Server:
    """Answers as VLLMClient does, from a model."""

    def __init__(self, base_url, connection_timeout):
        self.teacher = tiny.model(48, seed=1).eval()

    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs, temperature):
        answer = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": []}
        for sequence, start in zip(sequences, prompt_lengths):
            ids = torch.tensor([sequence])
            with torch.no_grad():
                log_p = (self.teacher(ids).logits[0, start - 1 : -1] / temperature).log_softmax(-1)
            top = log_p.topk(top_logprobs, -1)
            answer["logprobs"].append(top.values.tolist())
            answer["logprob_token_ids"].append(top.indices.tolist())
            answer["actual_logprobs"].append(log_p.gather(-1, ids[0, start:, None]).tolist())
        return answer


@pytest.mark.parametrize("beta, k", [(0.0, 4), pytest.param(0.5, 1, marks=pytest.mark.slow)])
def test_twenty_steps_agree(beta, k, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient", Server)
    results = []
    for context in (contextlib.nullcontext, dropin.patch):
        with context():
            args = ServerDistillationConfig(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_steps=20,
                learning_rate=1e-3,
                logging_steps=1,
                report_to="none",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                seed=3,
                save_strategy="no",
                beta=beta,
                loss_top_k=k,
                max_completion_length=8,
                teacher_model_server_url="http://teacher",
            )
            made = ServerDistillationTrainer(
                model=tiny.model(),
                args=args,
                train_dataset=tiny.prompts(),
                eval_dataset=tiny.prompts(8),
                processing_class=tiny.tokenizer(),
            )
            made.train()
            losses = torch.tensor([line["loss"] for line in made.state.log_history if "loss" in line])
            results.append((losses, made.evaluate()["eval_loss"]))
    (theirs, their_eval), (ours, our_eval) = results
    assert len(ours) == 20 and ours.unique().numel() > 10
    torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=1e-6)
    assert our_eval == pytest.approx(their_eval, rel=5e-5)


def test_memory_falls():
    inputs = {
        "prompt_ids": torch.zeros(1, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(1, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(1, 255, dtype=torch.int64),
        "completion_mask": torch.ones(1, 255, dtype=torch.int64),
    }
    logits = torch.randn(1, 256, 65536)
    top = (logits[:, :-1] + torch.randn(1, 255, 65536)).log_softmax(-1).topk(8, -1)
    told = {"topk_logprobs": top.values, "topk_token_ids": top.indices, "actual_logprobs": top.values[..., 0]}
    trainer = fake_trainer(0.0, 1.0, True, told)

    def peak(function):
        def step():
            leaf = logits.detach().requires_grad_()
            model = lambda input_ids, attention_mask: SimpleNamespace(logits=leaf)  # noqa: E731
            function(trainer, model, inputs).backward()

        return peak_of(step) / (logits.numel() * 4)

    ours, theirs = peak(dropin.server_compute_loss), peak(their_compute_loss)
    assert theirs >= 2.8 and ours <= 1.2, (ours, theirs)
