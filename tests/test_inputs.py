"""Bad input is one clear ValueError; odd but legal input is exact."""

import fractions
import math

import numpy as np
import pytest
import torch
from problems import Problem, assert_refused, relative
from quantized import quantized

import kdkernels as kd

S, T = torch.randn(4, 10), torch.randn(4, 10)
Y = torch.tensor([1, 2, -100, 3])
HEAD = kd.LinearHead(torch.randn(4, 8), torch.randn(10, 8))

PAIR = torch.randn(4, 8), torch.randn(10, 8)
LEARNED = torch.tensor(2.0, requires_grad=True)
PARTS = torch.randn(4, 10, 2, requires_grad=True)  # of complex numbers

BAD = [
    (lambda: kd.kl_div(S, T[:, :9]), "10.*9.*vocab_size"),
    (lambda: kd.kl_div(S, T[:3]), r"\(4,\).*\(3,\)"),
    (lambda: kd.kl_div(S, T, Y[:3]), r"\(3,\).*\(4,\)"),
    (lambda: kd.kl_div(S.long(), T), "int64"),
    (lambda: kd.kl_div(S, T, Y.int()), "int64.*int32"),
    (lambda: kd.kl_div(S, T, torch.tensor([1, 10, 0, 0])), r"\[0, 10\).*10"),
    (lambda: kd.kl_div(S, T, torch.tensor([1, -1, 0, 0])), r"-100.*-1"),
    (lambda: kd.kl_div(S, T, temperature=0.0), "temperature.*0.0"),
    (lambda: kd.kl_div(S, T, temperature=-1.0), "temperature.*-1.0"),
    (lambda: kd.kl_div(S, T, chunk_bytes=0), "chunk_bytes.*0"),
    (lambda: kd.kl_div(S, T, reduction="average"), "average.*batchmean"),
    (lambda: kd.kl_div(S, T, reduction="none", num_items=3), "num_items.*none"),
    (lambda: kd.kl_div(S, T, num_items=0), "num_items.*0"),
    (lambda: kd.kl_div(S, T, vocab_size=11), "11.*10"),
    (lambda: kd.kl_div(S, T, token_weights=torch.ones(5)), r"\(5,\).*\(4,\)"),
    (lambda: kd.kl_div(S, T, hard_weight=1.0), "hard_weight.*labels"),
    (lambda: kd.kl_div(S, T, z_loss=1.0), "z_loss=1.0.*hard_weight=0"),
    (lambda: kd.cross_entropy(S, Y, label_smoothing=2.0), "label_smoothing.*2.0"),
    (lambda: kd.LinearHead(torch.randn(4, 8), torch.randn(10, 7)), r"\(4, 8\).*\(10, 7\)"),
    (lambda: kd.LinearHead(torch.randn(4, 8), torch.randn(10, 8), torch.randn(9)), r"10.*\(9,\)"),
    (lambda: kd.LinearHead(torch.randn(4, 8), torch.randn(10, 8).double()), "float32.*float64"),
    (lambda: kd.LinearHead(torch.randn(4, 8), torch.randn(10, 8), softcap=0.0), "softcap.*0.0"),
    (lambda: kd.JSD(1.5), "1.5"),
    (lambda: kd.SkewKL(1.0), "1.0"),
    (lambda: kd.use_backend("cuda").__enter__(), "cuda.*eager"),
    (lambda: kd.kl_div(S.clone().requires_grad_(), T, inplace=True), "inplace.*leaf"),
    (
        lambda: kd.kl_div(kd.LinearHead(HEAD.hidden, HEAD.weight.clone().requires_grad_()), T, inplace=True),
        "inplace.*LinearHead",
    ),
    (lambda: kd.kl_div(S, T, temperature=float("inf")), "temperature.*inf"),
    (lambda: kd.kl_div(S, T, temperature=10**300), r"temperature.*\[1e-12, 1e\+12\].*1e\+300"),
    (
        lambda: kd.kl_div(S, T, temperature=torch.tensor([1.0, 1e-13, 1.0, 1.0])),
        r"temperature.*\[1e-12.*at token 1",
    ),
    (lambda: kd.kl_div(S, T, temperature=torch.tensor(2.0, requires_grad=True)), "temperature requires grad"),
    (lambda: kd.kl_div(S, T, num_items=torch.tensor([1, 2, 3, 4])), r"num_items.*\(4,\)"),
    (lambda: kd.kl_div(S, T, token_weights=torch.ones(4, dtype=torch.complex64)), "token_weights.*complex64"),
    (lambda: kd.codistillation_loss(S, T, None, hard_weight=0.0), "needs labels"),
    (
        lambda: kd.LinearHead(torch.randn(4, 8), torch.randn(10, 8), softcap=float("inf")),
        "softcap.*finite.*inf",
    ),
    (lambda: kd.AlphaBeta(0.5, float("nan")), "finite.*nan"),
    (lambda: kd.testing.Problem(student="sparse"), "sparse.*head"),
    (lambda: kd.LinearHead(*PAIR, logit_scale=LEARNED), "logit_scale requires grad.*detach"),
    (lambda: kd.LinearHead(*PAIR, softcap=LEARNED), "softcap requires grad.*detach"),
    (lambda: kd.LinearHead(*PAIR, logit_scale=float("nan")), "logit_scale.*finite.*nan"),
    (lambda: kd.LinearHead(*PAIR, logit_scale=float("-inf")), "logit_scale.*finite.*-inf"),
    (lambda: kd.LinearHead(*PAIR, logit_scale=torch.ones(2)), r"logit_scale.*one number.*\(2,\)"),
    (lambda: kd.LinearHead(PAIR[0], quantized(PAIR[1])), r"has a Quantized.*dequantize\(\)"),
    (lambda: kd.LinearHead(*PAIR, softcap=float("nan")), "softcap.*finite.*nan"),
    (lambda: kd.LinearHead(*PAIR, softcap=3e38), r"softcap in \[1e-30, 1e\+30\].*3e\+38"),
    (lambda: kd.LinearHead(*PAIR, logit_scale=-1e-39), r"logit_scale\| in \[1e-30, 1e\+30\].*-1e-39"),
    (lambda: kd.kl_div(S, T, num_items=LEARNED), "num_items requires grad"),
    (lambda: kd.kl_div(S, T, token_weights=torch.ones(4, requires_grad=True)), "token_weights requires grad"),
    (
        lambda: kd.kl_div(S, T, temperature=torch.ones(3)),
        r"temperature has shape \(3,\), the student's tokens",
    ),
    (
        lambda: kd.kl_div(S, T, temperature=torch.tensor([1.0, 0.0, 1.0, 1.0])),
        "temperature.*> 0.*got 0 at token 1",
    ),
    (lambda: kd.kl_div(S, T, temperature=torch.tensor(math.nan)), "temperature.*finite.*nan"),
    (lambda: kd.kl_div(S, T, temperature=LEARNED), "temperature requires grad"),
    (lambda: kd.kl_div(S, T, soft_weight=torch.ones(4, 1)), r"soft_weight has shape \(4, 1\)"),
    (
        lambda: kd.kl_div(S, T, soft_weight=torch.ones(4, dtype=torch.complex64)),
        "soft_weight.*real.*complex64",
    ),
    (
        lambda: kd.kl_div(S, T, Y, hard_weight=torch.tensor([1.0, math.inf, 1, 1])),
        "hard_weight.*finite.*inf at token 1",
    ),
    (lambda: kd.kl_div(S, T, hard_weight=torch.ones(4)), "hard_weight=a tensor needs labels"),
    (lambda: kd.kl_div(S, T, soft_weight=float("nan")), "soft_weight.*finite.*nan"),
    (lambda: kd.kl_div(S, T, Y, hard_weight=float("inf")), "hard_weight.*finite.*inf"),
    (lambda: kd.cross_entropy(S, Y, z_loss=float("nan")), "z_loss.*finite.*nan"),
    (lambda: kd.kl_div(S, T, soft_weight=10**400), "soft_weight.*finite"),
    (lambda: kd.kl_div(S, T, vocab_size=0), "vocab_size.*0"),
    (lambda: kd.kl_div(S, T, vocab_size=2**64), "vocab_size.*64 bits"),
    (lambda: kd.kl_div(S, T, chunk_bytes=2**63), "chunk_bytes.*64 bits"),
    (lambda: kd.kl_div(S, T, Y, ignore_index=-(2**64)), "ignore_index.*64 bits"),
    (lambda: kd.kl_div(S, T, num_items=float("nan")), "num_items.*finite.*nan"),
    (lambda: kd.kl_div(S, T, num_items=-3), "num_items.*> 0.*-3"),
    (lambda: kd.kl_div(S, T, num_items=torch.tensor(0)), "num_items.*> 0.*got 0"),
    (lambda: kd.kl_div(S, T, num_items=torch.tensor(-3.0)), "num_items.*> 0.*got -3"),
    (lambda: kd.kl_div(S, T, num_items=torch.tensor(float("inf"))), "num_items.*finite.*inf"),
    (lambda: kd.kl_div(S, torch.tensor(1.0)), "teacher.*vocabulary dimension.*scalar"),
    (lambda: kd.kl_div(S.to(torch.complex64), T), "student.*complex64"),
    (lambda: kd.kl_div(S, T, Y > 0), "labels.*torch.bool.*mask="),
    (lambda: kd.kl_div(S, T, Y.float()), "labels.*int64.*float32"),
    (
        lambda: kd.cross_entropy(S, T.softmax(-1)),
        r"labels.*class ids.*\(4, 10\).*kl_div\(student, probabilities.log",
    ),
    (lambda: kd.kl_div(S, T, mask=torch.tensor([1, 2, 0, 1])), "mask.*0 and 1.*2 at token 1"),
    (lambda: kd.kl_div(S, T, mask=torch.tensor([1.0, float("nan"), 0.0, 1.0])), "mask.*nan at token 1"),
    (lambda: kd.kl_div(S, T, mask=torch.ones(3, dtype=torch.bool)), r"mask.*\(3,\).*\(4,\)"),
    (lambda: kd.kl_div(S, T, mask=torch.ones(4, dtype=torch.complex64)), "mask.*complex64"),
    (lambda: kd.cross_entropy(S, Y, class_weights=torch.ones(9)), r"class_weights.*\(10,\).*\(9,\)"),
    (
        lambda: kd.cross_entropy(S, Y, class_weights=torch.ones(10), label_smoothing=0.1),
        "class_weights.*label_smoothing",
    ),
    (lambda: kd.top_k_target(T, 11), "k=11.*1..10"),
    (lambda: kd.top_k_target(T, 2, chunk_bytes=0), "chunk_bytes.*0"),
    (lambda: kd.top_p_target(T, 0.5, chunk_bytes=-1), "chunk_bytes.*-1"),
    (lambda: kd.sample_target(T, 2, chunk_bytes=0), "chunk_bytes.*0"),
    (lambda: kd.top_k_target(T.long(), 2), "teacher.*int64"),
    (lambda: kd.top_p_target(T.long(), 0.5), "teacher.*int64"),
    (lambda: kd.sample_target(T.long(), 2), "teacher.*int64"),
    (lambda: kd.top_k_target(torch.tensor(1.0), 1), "teacher.*scalar"),
    (lambda: kd.top_p_target(T, float("nan")), "p.*nan"),
    (lambda: kd.sample_target(T, 0), "n.*0"),
    (lambda: kd.kl_div(S.to_sparse(), T), r"student.*sparse_coo.*to_dense\(\)"),
    (lambda: kd.kl_div(S, T.to_sparse()), r"teacher.*sparse_coo.*to_dense\(\)"),
    (lambda: kd.codistillation_loss(S, T.to_sparse(), Y), r"teacher.*sparse_coo.*to_dense\(\)"),
    (lambda: kd.cross_entropy(S.to_sparse(), Y), r"student.*sparse_coo.*to_dense\(\)"),
    (lambda: kd.cross_entropy(S.to_mkldnn(), Y), r"student.*mkldnn.*to_dense\(\)"),
    (lambda: kd.cross_entropy(S, Y.to_sparse()), r"labels.*sparse_coo.*to_dense\(\)"),
    (lambda: kd.kl_div(S, T, mask=(Y > 0).to_sparse()), r"mask.*sparse_coo.*to_dense\(\)"),
    (
        lambda: kd.kl_div(S, T, token_weights=torch.ones(4).to_sparse()),
        r"token_weights.*sparse_coo.*to_dense\(\)",
    ),
    (lambda: kd.kl_div(torch.nested.nested_tensor([S, S]), T), r"student.*nested.*to_padded_tensor"),
    (
        lambda: kd.kl_div(torch.view_as_complex(PARTS * 1).conj().imag, T, inplace=True),
        r"inplace=True.*negate.*resolve_neg\(\)",
    ),
    (lambda: kd.LinearHead(PAIR[0], PAIR[1].to_sparse()), r"LinearHead's weight.*sparse_coo.*to_dense\(\)"),
    (lambda: kd.LinearHead(PAIR[0].to_sparse(), PAIR[1]), r"LinearHead's hidden.*sparse_coo.*to_dense\(\)"),
    (
        lambda: kd.SparseTarget(Y[:, None], S[:, :1].to_sparse()),
        r"SparseTarget's logprobs.*sparse_coo.*to_dense\(\)",
    ),
    (lambda: kd.top_k_target(T.to_sparse(), 2), r"teacher.*sparse_coo.*to_dense\(\)"),
    (lambda: kd.top_p_target(T.to_sparse(), 0.5), r"teacher.*sparse_coo.*to_dense\(\)"),
    (lambda: kd.sample_target(T.to_sparse(), 2), r"teacher.*sparse_coo.*to_dense\(\)"),
    (lambda: kd.JSD(LEARNED), "JSD's beta requires grad"),
    (lambda: kd.AlphaBeta(0.5, torch.ones(2)), r"AlphaBeta's beta.*one number.*\(2,\)"),
    (lambda: kd.DistillationLoss(temperature=-1.0), "temperature.*-1.0"),
    (lambda: kd.DistillationLoss(num_items=0), "num_items.*0"),
    (lambda: kd.CrossEntropyLoss(reduction="average"), "average.*batchmean"),
    (lambda: kd.JSDivergenceLoss(beta=1.5), "beta.*1.5"),
    (lambda: autocast_head(torch.float64), "float64.*float32"),
    (lambda: autocast_head(torch.float32, torch.float64), "float32.*float64"),
    (lambda: kd.kl_div(autocast_head(torch.bfloat16), T), "bfloat16.*float32"),
]

BAD_TYPES = [
    (lambda: kd.kl_div(S, None), "teacher.*None"),
    (lambda: kd.top_k_target(kd.top_k_target(T, 2), 1), "teacher is a kd.SparseTarget already"),
    (lambda: kd.codistillation_loss(S, None, Y), "None"),
    (lambda: kd.linear_cross_entropy(None, T, Y), "LinearHead's hidden.*None"),
    (lambda: kd.LinearHead(S, [[1.0]]), "LinearHead's weight.*list"),
    (lambda: kd.LinearHead(*PAIR, logit_scale=None), "logit_scale.*None"),
    (lambda: kd.LinearHead(*PAIR, logit_scale="1"), "logit_scale.*'1'"),
    (lambda: kd.LinearHead(*PAIR, softcap="30"), "softcap.*'30'"),
    (lambda: kd.cross_entropy(S, None), "cross_entropy needs labels.*None"),
    (lambda: kd.kl_div([S], T), "student.*list"),
    (lambda: kd.kl_div(S, 3.0), "teacher.*3.0"),
    (lambda: kd.kl_div(S, T, temperature="2"), "temperature.*'2'"),
    (lambda: kd.kl_div(S, T, temperature=None), "temperature.*None"),
    (lambda: kd.kl_div(S, T, temperature=1j), "temperature.*1j"),
    (lambda: kd.kl_div(S, T, soft_weight=[1.0]), "soft_weight.*list"),
    (lambda: kd.kl_div(S, T, temperature_squared="no"), "temperature_squared.*True or False.*'no'"),
    (lambda: kd.kl_div(S, T, inplace=1), "inplace.*True or False.*1"),
    (lambda: kd.kl_div(S, T, return_stats=None), "return_stats.*None"),
    (lambda: kd.kl_div(S, T, mask=[1, 0, 1, 1]), "mask.*list"),
    (lambda: kd.distillation_loss(S, T, divergence=kd.ForwardKL), r"kd.ForwardKL\(\.\.\.\)"),
    (lambda: kd.top_k_target(T, 2.0), "k must be an int.*2.0"),
    (lambda: kd.top_p_target(T, "0.5"), "p must be a number.*'0.5'"),
    (lambda: kd.top_p_target(T, 0.5, max_k=2.0), "max_k.*2.0"),
    (lambda: kd.sample_target(T, None), "n must be an int.*None"),
    (lambda: kd.top_k_target([T], 2), "teacher.*list"),
    (lambda: kd.SparseTarget([[1]], T[:1, :1]), "SparseTarget's ids.*list"),
    (lambda: kd.cross_entropy(S, Y, class_weights=[1.0] * 10), "class_weights.*list"),
    (lambda: kd.JSD("0.5"), "JSD's beta.*'0.5'"),
    (lambda: kd.SkewReverseKL(0.1, None), "SkewReverseKL's detach_mixture.*None"),
    (lambda: kd.SkewReverseKL(0.1, 1.5), "SkewReverseKL's detach_mixture must be True or False, got 1.5"),
    (lambda: kd.Mixed(None), "Mixed's weight.*None"),
    (lambda: kd.DistillationLoss(temprature=2.0), "DistillationLoss.*temprature.*temperature"),
    (lambda: kd.KLDivLoss(divergence=kd.JSD()), "KLDivLoss.*divergence"),
    (lambda: kd.CrossEntropyLoss(soft_weight=1.0), "CrossEntropyLoss.*soft_weight"),
    (lambda: kd.LinearCrossEntropyLoss(chunk_bytes="1"), "chunk_bytes.*'1'"),
    (lambda: kd.codistillation_loss(S, T, Y, inplace=True), "inplace"),
    (lambda: kd.SparseTarget([[1, 2]], T[:1, :2]), "SparseTarget.*list"),
    (lambda: kd.kl_div(S, T, [1, 2, 3, 4]), "labels.*list"),
    (lambda: kd.kl_div(S, T, token_weights=[1, 2, 3, 4]), "token_weights.*list"),
    (lambda: kd.kl_div(S, T, soft_weight="2"), "soft_weight.*'2'"),
    (lambda: kd.kl_div(S, T, temperature=None, temperature_squared=True), "temperature.*None"),
    (lambda: kd.kl_div(S, T, num_items="3"), "num_items.*'3'"),
    (lambda: kd.kl_div(S, T, vocab_size=3.0), "vocab_size.*3.0"),
    (lambda: kd.kl_div(S, T, chunk_bytes=1e6), "chunk_bytes.*1000000.0"),
    (lambda: kd.kl_div(S, T, Y, ignore_index=None), "ignore_index.*None"),
]


def autocast_head(dtype, weight_dtype=torch.float32):
    """Mixed dtypes, which autocast allows: but not beside fp64, and not once it has ended."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return kd.LinearHead(torch.randn(4, 8, dtype=dtype), torch.randn(10, 8, dtype=weight_dtype))


@pytest.mark.parametrize("call,message", BAD, ids=[m for _, m in BAD])
def test_bad_input(call, message):
    assert_refused(call, message)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int32, fractions.Fraction])
def test_numbers_of_other_libraries(kind):
    options = dict(temperature=kind(2), soft_weight=kind(3), num_items=kind(4), reduction="sum")
    plain = {name: 1.0 * int(value) for name, value in options.items() if name != "reduction"}
    assert torch.equal(kd.kl_div(S, T, **options), kd.kl_div(S, T, **{**options, **plain}))


@pytest.mark.parametrize("call,message", BAD_TYPES, ids=[m for _, m in BAD_TYPES])
def test_bad_type(call, message):
    with pytest.raises(TypeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_learn(backend, form, tokens):
    """Empty batches and fully masked ones: loss 0, gradient 0, never NaN."""
    problem = Problem(student=form, shape=(tokens,), ignored=0)
    problem.labels.fill_(-100)
    for reduction in ("mean", "sum", "batchmean", "none"):
        value, grads = problem.run(backend, reduction=reduction, hard_weight=1.0)
        assert value.sum() == 0
        assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, problem.student))


def test_nothing_to_learn_in_a_view(backend):
    """No sequences, in a layout that does not fold into rows; and a tensor that says there are 0 items."""
    leaf = torch.randn(2, 6, 50).requires_grad_()
    (grad,) = torch.autograd.grad(kd.kl_div(leaf[:0, :-1], torch.randn(0, 5, 50)), leaf)
    assert not grad.any()
    masked = torch.full((2, 6), -100)
    loss = kd.cross_entropy(leaf, masked, num_items=torch.tensor(0))
    assert loss == 0 and not torch.autograd.grad(loss, leaf)[0].any()


def test_masked_garbage_stays_out(backend):
    """NaN in masked rows reaches neither the loss nor the gradient."""
    student, labels = torch.randn(4, 50), torch.tensor([1, -100, 2, 3])
    student[1] = torch.nan
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf, torch.randn(4, 50), labels, divergence=kd.JSD(0.5), hard_weight=1.0)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all() and not leaf.grad[1].any()


def test_nan_is_not_hidden(backend, divergence):
    student = torch.randn(2, 50)
    student[0, 30] = torch.nan
    assert kd.distillation_loss(student, torch.randn(2, 50), divergence=divergence).isnan()


LAYOUTS = {
    "shifted": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "column stride": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "narrowed": lambda x: x[..., 3:90],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    view = LAYOUTS[layout]
    base, teacher = torch.randn(4, 6, 101), torch.randn(4, 6, 101)
    leaf, wide = base.clone().requires_grad_(), base.double().requires_grad_()
    loss = kd.kl_div(view(leaf), view(teacher))
    with kd.use_backend("reference"):
        truth = kd.kl_div(view(wide), view(teacher).double())
    (mine,), (true,) = (torch.autograd.grad(x, y) for x, y in ((loss, leaf), (truth, wide)))
    assert torch.isclose(loss.double(), truth) and relative(mine, true) < 1e-6


def test_row_offsets_beyond_32_bits(backend):
    """Rows 2^31 entries apart, made of one small buffer's address space: only the last is touched."""
    if backend == "eager":
        pytest.skip("the strides are torch's own there")
    width, rows = 2**16, 2**15 + 2
    storage = torch.empty(rows * width, dtype=torch.bfloat16)  # 4 GiB of untouched pages
    logits = storage.view(rows, width)
    logits[-2:] = torch.randn(2, width)
    teacher = torch.randn(1, width).bfloat16().expand(rows, width)
    labels = torch.full((rows,), -100)
    labels[-2:] = 5
    loss = kd.distillation_loss(logits, teacher, labels, reduction="none")
    expected = kd.distillation_loss(logits[-2:].float(), teacher[-2:].float(), reduction="none")
    assert torch.allclose(loss[-2:], expected, rtol=1e-5) and not loss[:-2].any()
