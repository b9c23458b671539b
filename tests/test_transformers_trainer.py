"""DistillationTrainer against the plain formula on the models' own logits."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import CPUOffloadPolicy

import kdkernels as kd

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from distilled_llamas import VOCAB, arguments, batch, llama, plain_loss, rows_of  # noqa: E402

from kdkernels.integrations import transformers as integration  # noqa: E402
from kdkernels.integrations.transformers import DistillationTrainer, call_through_head, shifted_labels  # noqa: E402


def of(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return getattr(transformers, name + "ForCausalLM")(config).double().eval()


MODELS = {
    "llama": lambda: llama().eval(),
    "tied": lambda: llama(tie_word_embeddings=True).eval(),
    "gemma2": lambda: of("Gemma2", final_logit_softcapping=1.5, head_dim=4),
    "cohere": lambda: of("Cohere", logit_scale=0.3),
    "granite": lambda: of("Granite", logits_scaling=4.0),
}


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys() and ours
    for name, expected in theirs.items():
        assert expected.norm() > 1e3 * tolerance, f"{name}: the gradient is too small to tell anything"
        assert (ours[name] - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("name", MODELS)
def test_head_gives_the_models_own_logits(name):
    model, inputs = MODELS[name](), batch()
    del inputs["labels"]
    expected = model(**inputs).logits
    head = call_through_head(model, inputs, lambda head: head)
    logits = F.linear(head.hidden, head.weight, head.bias) * head.logit_scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_models_are_checked_at_construction_and_otherwise_at_their_first_batch(tmp_path, monkeypatch):
    """Where weights are not here yet: a student that ZeRO-3 or FSDP has still to put together."""
    model = llama()
    model.lm_head = Doubling(16, VOCAB, bias=False, dtype=torch.float64)
    with pytest.raises(ValueError, match="does more than hidden @ weight.T"):
        DistillationTrainer(model, arguments(tmp_path), teacher=llama(seed=7))
    monkeypatch.setattr(integration, "weights_are_here", lambda model: False)
    trainer = DistillationTrainer(model, arguments(tmp_path), teacher=llama(seed=7))
    with pytest.raises(ValueError, match="does more than hidden @ weight.T"):
        trainer.compute_loss(model, batch())


class Doubling(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_compiles_the_part_before_the_head(backend, tmp_path):
    def trained(**options):
        student = llama(dtype=torch.float32)
        args = arguments(tmp_path, max_steps=3, learning_rate=0.1, optim="sgd", logging_steps=1, **options)
        rows = rows_of(batch(rows=8)) + rows_of(batch(rows=16, seed=2))
        trainer = DistillationTrainer(
            student, args, teacher=llama(seed=7, dtype=torch.float32), train_dataset=rows, eval_dataset=rows
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        return loss, {name: p.detach().clone() for name, p in student.named_parameters()}

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain_eval, plain = trained()
    assert not torch._dynamo.utils.counters["stats"]
    compiled_eval, compiled = trained(torch_compile=True, torch_compile_backend=backend)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert compiled_eval == pytest.approx(plain_eval, rel=1e-4)
    assert compiled.keys() == plain.keys()
    for name, start in llama(dtype=torch.float32).named_parameters():
        moved = (plain[name] - start).norm()
        assert moved > 1e-3 and (compiled[name] - plain[name]).norm() < 1e-3 * moved, name


def test_each_model_of_model_init_is_made_ready(tmp_path):
    """Trainer makes one at construction and another for each run: all are checked and compiled."""
    made, teacher = [], llama(seed=7, dtype=torch.float32)

    def model_init():
        made.append(llama(dtype=torch.float32))
        return made[-1]

    args = arguments(tmp_path, max_steps=1, torch_compile=True, torch_compile_backend="aot_eager")
    trainer = DistillationTrainer(
        args=args, teacher=teacher, model_init=model_init, train_dataset=rows_of(batch())
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer.train()
    assert trainer.model is made[-1] and len(made) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert any((a != b).any() for a, b in zip(made[0].parameters(), made[1].parameters()))

    trainer.model_init = lambda: teacher.requires_grad_(True)
    with pytest.raises(ValueError, match="the teacher shares"):
        trainer.train()

    def doubled():
        model = llama(dtype=torch.float32)
        model.lm_head = Doubling(16, VOCAB, bias=False)
        return model

    trainer.model_init = doubled
    with pytest.raises(ValueError, match="does more than hidden @ weight.T"):
        trainer.train()


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_formula(name, tmp_path):
    student, teacher, inputs = MODELS[name]().train(), llama(seed=7, width=32), batch()
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, temperature=2.0, soft_weight=0.7, hard_weight=0.4
    )
    ours = trainer.compute_loss(student, inputs)
    theirs = plain_loss(student, teacher, inputs, temperature=2.0, soft=0.7, hard=0.4)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(ours, student), gradients(theirs, student), 1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_tolerance_leaves_the_loss_alone(tmp_path):
    student, teacher, inputs = llama(vocab=400), llama(seed=7, width=32, vocab=400), batch()

    def run(tolerance):
        trainer = DistillationTrainer(
            student, arguments(tmp_path), teacher=teacher, hard_weight=1.0, gradient_tolerance=tolerance
        )
        loss = trainer.compute_loss(student, inputs)
        return loss.detach(), gradients(loss, student)["lm_head.weight"]

    (loss, exact), (same, near) = run(0.0), run(0.3)
    assert torch.equal(loss, same) and not torch.equal(exact, near)
    assert (near - exact).norm() < exact.norm()


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("option", [{}, {"label_smoothing": 0.2}, {"z_loss": 0.1}], ids=str)
def test_the_evaluated_loss_is_the_training_loss(option, teacher, tmp_path):
    """And eval_hard the cross entropy itself."""
    student, inputs = llama(), batch()
    options = {"teacher": llama(seed=1) if teacher else None, "hard_weight": 0.5, **option}
    trainer = DistillationTrainer(student, arguments(tmp_path), eval_dataset=rows_of(inputs), **options)
    metrics = trainer.evaluate()
    labels = inputs["labels"][:, 1:]
    cross_entropy = kd.cross_entropy(student(inputs["input_ids"]).logits[:, :-1], labels)
    assert metrics["eval_hard"] == pytest.approx(cross_entropy.item(), rel=1e-6)
    assert metrics["eval_loss"] == pytest.approx(trainer.compute_loss(student, inputs).item(), rel=1e-6)


def test_co_trains_the_student_with_the_hard_terms_options(tmp_path):
    codistill = pytest.importorskip("kdkernels.trainer.codistill")
    pair, inputs, losses = codistill.Pair(llama(), llama(seed=1)), batch(), []
    for option in ({}, {"z_loss": 0.1}):
        soft = {"soft_schedule": codistill.SoftWeight("constant", 1.0), "teacher_learning_rate": 1e-3}
        trainer = codistill.CodistillationTrainer(
            pair, arguments(tmp_path), hard_weight=1.0, eval_dataset=rows_of(inputs), **soft, **option
        )
        losses.append(trainer.compute_loss(pair, inputs, num_items_in_batch=1).item())
    labels = inputs["labels"][:, 1:]
    logits = pair.student(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    plain, with_z = (kd.cross_entropy(logits, labels, reduction="sum", z_loss=z).item() for z in (0.0, 0.1))
    assert losses[1] - losses[0] == pytest.approx(with_z - plain, rel=1e-5) and with_z > plain + 1


def test_the_teachers_weights_may_go_when_its_forward_is_done(tmp_path):
    """As ZeRO-3 lets them go: the parameter is there, and empty."""
    teacher, inputs = llama(seed=7, width=32), batch()
    trainer = DistillationTrainer(llama(), arguments(tmp_path), teacher=teacher)
    expected = plain_loss(trainer.model, teacher, inputs)
    head = trainer.teacher_target(inputs)
    for parameter in teacher.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    trainer.teacher_target = lambda inputs: head
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), expected, rtol=1e-6, atol=0)


def test_without_a_teacher_it_is_cross_entropy(tmp_path):
    student, inputs = llama(), batch()
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=None, soft_weight=0.0, hard_weight=1.0
    )
    ours = trainer.compute_loss(student, inputs)
    theirs = plain_loss(student, llama(), inputs, soft=0.0, hard=1.0)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(ours, student), gradients(theirs, student), 1e-6)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "lora_bias": True, "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_lora_on_the_head(lora, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    student = peft.get_peft_model(
        llama(), peft.LoraConfig(r=3, lora_alpha=9, init_lora_weights=False, **lora)
    ).double()
    teacher, inputs = llama(seed=7, width=32), batch()
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher)
    ours = gradients(trainer.compute_loss(student, inputs), student)
    theirs = gradients(plain_loss(student, teacher, inputs), student)
    assert any("lm_head" in name for name in ours)
    assert_same_gradients(ours, theirs, 1e-6)


def test_what_lora_cannot_do_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=llama(seed=7))
    with pytest.raises(ValueError, match="only plain LoRA"):
        trainer.compute_loss(student, batch())


def with_shift_labels(rows):
    """The same rows with labels that are shifted already, and no others."""
    shifted = lambda labels: F.pad(torch.as_tensor(labels)[1:], (0, 1), value=-100).tolist()  # noqa: E731
    return [{"shift_labels": shifted(row.pop("labels")), **row} for row in map(dict, rows)]


@pytest.mark.parametrize("given", [list, with_shift_labels])
@pytest.mark.parametrize("size, accumulate", [(4, 2), (2, 4), (1, 8)])
def test_weights_do_not_depend_on_the_micro_batch(size, accumulate, given, tmp_path):
    def trained(size, accumulate):
        student = llama()
        options = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant"}
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, **options
        )
        rows = given(rows_of(batch(rows=8)) + rows_of(batch(rows=8, seed=2)))
        DistillationTrainer(student, args, teacher=llama(seed=7), train_dataset=rows, hard_weight=0.5).train()
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    start = torch.cat([p.detach().flatten() for p in llama().parameters()])
    whole, cut = trained(8, 1), trained(size, accumulate)
    assert (whole - start).norm() > 1e-2
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-7)


def test_a_teacher_beside_stored_targets_is_not_asked_in_silence(tmp_path):
    rows = rows_of(batch(rows=2))
    for row in rows:
        size = len(row["input_ids"])
        row["target_ids"] = torch.randint(VOCAB, (size, 3)).tolist()
        row["target_logprobs"] = torch.randn(size, 3).log_softmax(-1).tolist()
    trainer = DistillationTrainer(llama(), arguments(tmp_path), teacher=llama(seed=7), eval_dataset=rows)
    with pytest.warns(UserWarning, match="holds target_ids, which are taken; the teacher is not asked"):
        trainer.evaluate()
    assert trainer.get_eval_dataloader(eval_dataset=rows)


def test_logs_hold_the_terms(tmp_path):
    student, teacher = llama(dtype=torch.float32), llama(seed=7, dtype=torch.float32)
    before = copy.deepcopy(student)
    args = arguments(
        tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    trainer = DistillationTrainer(
        student, args, teacher=teacher, soft_weight=0.5, hard_weight=2.0, train_dataset=rows_of(batch())
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["soft"] == pytest.approx(plain_loss(before, teacher, batch()).item(), rel=1e-5)
    assert log["hard"] == pytest.approx(
        plain_loss(before, teacher, batch(), soft=0.0, hard=1.0).item(), rel=1e-5
    )
    assert log["loss"] == pytest.approx(0.5 * log["soft"] + 2.0 * log["hard"], rel=1e-5)
    assert 0 < log["student_entropy"] < math.log(VOCAB)


@pytest.mark.parametrize(
    "soft", [{}, {"divergence": kd.JSD(0.5), "temperature": 2.0}], ids=["is the soft term", "beside it"]
)
def test_kl_at_temperature_1_is_logged(soft, tmp_path, monkeypatch):
    """Beside another soft term it is of the logged step alone: both its micro-batches, by tokens."""
    student, teacher = llama(dtype=torch.float32), llama(seed=7, dtype=torch.float32)
    calls, seen = [], []
    original, training_step = kd.distillation_loss, DistillationTrainer.training_step
    monkeypatch.setattr(kd, "distillation_loss", lambda *a, **k: (calls.append(k), original(*a, **k))[1])
    monkeypatch.setattr(
        DistillationTrainer,
        "training_step",
        lambda self, model, inputs, n=None: (seen.append(inputs), training_step(self, model, inputs, n))[1],
    )
    args = arguments(
        tmp_path,
        max_steps=4,
        logging_steps=2,
        learning_rate=0.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    trainer = DistillationTrainer(
        student, args, teacher=teacher, train_dataset=rows_of(batch(rows=8)), **soft
    )
    trainer.train()
    log = trainer.state.log_history[1]
    counted = seen[6:] if soft else seen[4:]
    tokens = sum(int((inputs["labels"][:, 1:] != -100).sum()) for inputs in counted)
    expected = sum(plain_loss(student, teacher, inputs, num_items=tokens) for inputs in counted).item()
    assert log["kl"] == pytest.approx(expected, rel=1e-5)
    assert len(seen) == 8 and len(calls) == (8 + 4 if soft else 8)  # the second pass is of steps 2 and 4
    assert (log["kl"] == log["soft"]) != bool(soft)


@pytest.mark.parametrize("which", ["body", "lm_head"])
def test_autocast_joins_a_body_and_an_lm_head_of_two_dtypes(which, tmp_path):
    student, teacher = llama(dtype=torch.float32), llama(seed=1, dtype=torch.float32)
    (teacher.model if which == "body" else teacher.lm_head).to(torch.bfloat16)
    with pytest.raises(ValueError, match="LlamaForCausalLM: LinearHead needs one floating dtype"):
        DistillationTrainer(student, arguments(tmp_path), teacher=teacher)
    trainer = DistillationTrainer(student, arguments(tmp_path, bf16=True), teacher=teacher)
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        ours = trainer.compute_loss(student, inputs)
        assert torch.isclose(ours.double(), plain_loss(student, teacher, inputs), rtol=2e-2)


def test_bf16_autocast_stays_near(tmp_path):
    student, teacher, inputs = llama(dtype=torch.float32), llama(seed=7, dtype=torch.float32), batch()
    trainer = DistillationTrainer(student, arguments(tmp_path, bf16=True), teacher=teacher)
    model = trainer.accelerator.prepare_model(student)
    assert trainer.compute_loss(model, inputs).item() == pytest.approx(
        plain_loss(student, teacher, inputs).item(), rel=0.05
    )


def test_errors_name_the_way_out(tmp_path):
    student, teacher = llama(), llama(seed=7)
    with pytest.raises(ValueError, match="compute_metrics needs logits"):
        DistillationTrainer(student, arguments(tmp_path), teacher=teacher, compute_metrics=print)
    with pytest.raises(ValueError, match="label_smoothing="):
        DistillationTrainer(student, arguments(tmp_path, label_smoothing_factor=0.1), teacher=teacher)
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher)
    with pytest.raises(ValueError, match="needs labels"):
        trainer.compute_loss(student, {"input_ids": torch.ones(1, 4, dtype=torch.long)})
    with pytest.raises(ValueError, match="nothing to learn; give teacher="):
        DistillationTrainer(student, arguments(tmp_path), teacher=None).compute_loss(student, batch())
    with pytest.raises(ValueError, match="never held"):
        trainer.compute_loss(student, batch(), return_outputs=True)


def test_a_teacher_with_the_students_weights_is_refused(tmp_path):
    """Freezing it would freeze them in the student."""
    student, teacher = llama(0), llama(1)
    student.model.embed_tokens = teacher.model.embed_tokens
    with pytest.raises(ValueError, match=r"shares 1 parameter.*model\.embed_tokens\.weight"):
        DistillationTrainer(student, arguments(tmp_path), teacher=teacher)
    assert all(p.requires_grad for p in teacher.parameters())
    student.model.embed_tokens.requires_grad_(False)
    DistillationTrainer(student, arguments(tmp_path), teacher=teacher)


def test_targets_in_the_data_set_reach_the_loss(tmp_path):
    """Trainer removes the columns that the model's forward does not take; the loss's stay."""
    rows = rows_of(batch())
    for row in rows:
        size = len(row["input_ids"])
        row["target_ids"] = torch.randint(VOCAB, (size, 3)).tolist()
        row["target_logprobs"] = torch.full((size, 3), -3.0).tolist()
    args = arguments(tmp_path, max_steps=1, logging_steps=1, remove_unused_columns=True)
    trainer = DistillationTrainer(llama(), args, teacher=None, hard_weight=0.5, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["soft"] > 0


def test_shift_labels_are_taken_as_they_are():
    inputs = batch()
    assert shifted_labels(inputs)[:, :-1].equal(inputs["labels"][:, 1:])
    assert (shifted_labels(inputs)[:, -1] == -100).all()
    assert shifted_labels({"shift_labels": inputs["labels"]}) is inputs["labels"]


def test_codistillation_reports_the_statistics_of_distillation():
    torch.manual_seed(0)
    student, teacher = (torch.randn(6, 11, requires_grad=True) for _ in range(2))
    labels = torch.tensor([1, 2, -100, 4, 5, 6])
    losses, stats = kd.codistillation_loss(student, teacher, labels, return_stats=True)
    loss, expected = kd.distillation_loss(student, teacher, labels, hard_weight=1.0, return_stats=True)
    torch.testing.assert_close(losses.student, loss)
    for ours, theirs in zip(stats, expected):
        torch.testing.assert_close(ours, theirs)


def test_lm_heads_that_cannot_stay_sharded(tmp_path):
    """Those that can are in tests/test_trainer_processes.py."""
    with pytest.raises(ValueError, match="keep_sharded=True is of FSDP2"):
        DistillationTrainer(llama(), arguments(tmp_path), teacher=llama(1), keep_sharded=True)

    def check(student, teacher, **plugin):
        plugin = dict(cpu_ram_efficient_loading=False, cpu_offload=None) | plugin
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin))
        accelerator = SimpleNamespace(is_fsdp2=True, state=state, torch_device_mesh=None)
        trainer = SimpleNamespace(is_fsdp_enabled=True, accelerator=accelerator, model=student)
        DistillationTrainer._check_lm_heads_can_stay_sharded(trainer, teacher)

    check(llama(), llama(1))
    check(llama(), None)
    for given, says in [
        ((llama(tie_word_embeddings=True), llama()), "the model's lm_head is tied to its embeddings"),
        ((llama(), llama(tie_word_embeddings=True)), "the teacher's lm_head is tied to its embeddings"),
        ((llama(), llama(vocab=VOCAB + 1)), "as many rows, got {'model'"),
        ((torch.nn.Linear(2, 2), llama()), "plain lm_head of the model, and Linear has none"),
    ]:
        with pytest.raises(ValueError, match=says):
            check(*given)
    with pytest.raises(ValueError, match="goes without cpu_ram_efficient_loading"):
        check(llama(), llama(1), cpu_ram_efficient_loading=True)
    with pytest.raises(ValueError, match="goes without offload_params"):
        check(llama(), llama(1), cpu_offload=CPUOffloadPolicy())
