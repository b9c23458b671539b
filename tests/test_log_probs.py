"""Token log-probabilities and entropies: every backend against the fp64 oracle, and values that must come out."""

import contextlib
import math

import pytest
import torch
from compiled import assert_compiled
from problems import BACKENDS, assert_exact, assert_refused, relative
from torch.autograd import grad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels.backends import eager
from kdkernels.backends.spec import Asked as Bits
from kdkernels.backends.spec import Spec, Tail
from kdkernels.core import checked, log_prob_operators, log_probs, tiles
from kdkernels.testing import compare

MAP = dict(logit_scale=0.7, softcap=6.0)
SHAPE, VOCAB, WIDTH = (2, 4), 300, 16


class Asked:
    """Students, ids and what arrives for their log-probabilities and entropies: a loss of both, as a policy's is."""

    def __init__(self, form="logits", *, slots=None, dtype=torch.float32, vocab=VOCAB, scale=2.0, **head):
        self.head, self.dtype, self.vocab = head, dtype, vocab
        made = [torch.randn(*SHAPE, vocab) * scale]
        if form != "logits":
            spread = scale / WIDTH**0.5
            made = [torch.randn(*SHAPE, WIDTH), torch.randn(vocab, WIDTH) * spread, torch.randn(vocab)]
        self.student, self.learns = [t.to(dtype) for t in made], [True, form != "frozen", form != "frozen"]
        self.ids = torch.randint(0, vocab, SHAPE if slots is None else (*SHAPE, slots))
        self.ids[0, 1], self.ids[1, 3] = -100, -1
        if slots:
            self.ids[0, 0] = self.ids[0, 0, 0]  # the same id in every slot
            self.ids[1, 0, 0] = -1
        self.arriving = torch.randn(self.ids.shape), torch.randn(SHAPE)
        self.arriving[0][1, 1] = 0.0  # of the log-probabilities only, then of both
        self.arriving[0][1, 2], self.arriving[1][1, 2] = 0.0, 0.0

    def of(self, function, *, double=False, entropy=True, **options):
        """(log-probabilities and entropy in one row each, gradients)."""
        leaves = [
            (t.double() if double else t.clone()).requires_grad_(learns)
            for t, learns in zip(self.student, self.learns)
        ]
        student = leaves[0] if len(leaves) == 1 else kd.LinearHead(*leaves, **self.head)
        made = function(student, self.ids, entropy=entropy, **options)
        parts = [made.log_probs, *([made.entropy] if entropy else [])]
        loss = sum((part * by).sum() for part, by in zip(parts, self.arriving))
        found = grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
        return torch.cat([part.detach().flatten() for part in parts]), found

    def run(self, backend, **options):
        with kd.use_backend(backend):
            return self.of(kd.token_log_probs, **options)

    def oracle(self, **options):
        return self.run("reference", double=True, **options)

    def plain(self, **options):
        return self.of(plain, **options)


def plain(student, ids, *, temperature=1.0, entropy=True):
    """What a trainer would write, in the tensors' own dtype."""
    z = student
    if isinstance(student, kd.LinearHead):
        z = torch.nn.functional.linear(student.hidden, student.weight, student.bias) * student.logit_scale
        if student.softcap:
            z = student.softcap * torch.tanh(z / student.softcap)
    at = (
        temperature[..., None] if isinstance(temperature, torch.Tensor) and temperature.dim() else temperature
    )
    log_q = (z.float() / at if z.dtype != torch.float64 else z / at).log_softmax(-1)
    asked = ids if ids.dim() == z.dim() else ids[..., None]
    found = log_q.gather(-1, asked.clamp(min=0)).masked_fill(asked < 0, 0.0).reshape(ids.shape)
    masked = (asked == -100).all(-1)
    return kd.TokenLogProbs(found, -(log_q.exp() * log_q).sum(-1).masked_fill(masked, 0.0))


TEMPERATURES = [1.0, 0.6, torch.tensor(1.7), "each"]


def temperature_of(given):
    return torch.rand(SHAPE) + 0.5 if isinstance(given, str) else given


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["logits", "head", "frozen"])
@pytest.mark.parametrize("slots", [None, 5])
def test_against_the_oracle(backend, form, slots, dtype):
    asked = Asked(form, slots=slots, dtype=dtype, **MAP)
    options = dict(temperature=torch.rand(SHAPE, dtype=torch.float64) + 0.5)
    assert_exact(
        asked.run(backend, **options),
        asked.oracle(**options),
        asked.plain(**options),
        dtype=dtype,
        projected=form != "logits",
    )


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("form", ["logits", "head", "frozen"])
@pytest.mark.parametrize("chunk_bytes", [None, 2_000, 20_000])
def test_options_and_budgets(backend, form, temperature, entropy, chunk_bytes):
    asked = Asked(form, slots=3, **({} if entropy else MAP))
    options = dict(temperature=temperature_of(temperature), entropy=entropy)
    values, grads = asked.run(backend, chunk_bytes=chunk_bytes, **options)
    truth, true_grads = asked.oracle(**options)
    assert torch.allclose(values.double(), truth, rtol=2e-6, atol=2e-6)
    for mine, true in zip(grads, true_grads, strict=True):
        assert true.norm() > 1e-3 and relative(mine, true) < 3e-6


@pytest.mark.parametrize("shape", [(), (3,), (2, 4), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("form", ["logits", "head", "frozen"])
@pytest.mark.parametrize("chunk_bytes", [None, 2_000])
def test_tokens_of_any_shape_of_which_none_is_masked(backend, form, shape, chunk_bytes):
    asked = Asked(form)
    asked.student[0] = torch.randn(*shape, asked.student[0].shape[-1])
    asked.ids, asked.arriving = torch.randint(0, VOCAB, shape), (torch.randn(shape), torch.randn(shape))
    values, grads = asked.run(backend, chunk_bytes=chunk_bytes)
    truth, true_grads = asked.oracle()
    assert torch.allclose(values.double(), truth, rtol=2e-6, atol=2e-6)
    for mine, true in zip(grads, true_grads, strict=True):
        assert mine.shape == true.shape and (0 in shape or true.norm() > 1e-3 > 3e2 * relative(mine, true))


@pytest.mark.parametrize("vocab", [1, 2, 129, 2049, 5000])
@pytest.mark.parametrize("slots", [None, 2])
def test_widths(backend, vocab, slots):
    asked = Asked(slots=slots, vocab=vocab)
    ours, truth = asked.run(backend), asked.oracle()
    if vocab == 1:
        assert not ours[0].any() and not ours[1][0].any()
    else:
        assert_exact(ours, truth, asked.plain(), dtype=torch.float32)


def test_statistics(backend):
    asked = Asked(slots=3)
    with kd.use_backend("reference"):
        truth = kd.token_log_probs(asked.student[0], asked.ids, temperature=1.3, return_stats=True)
    made = kd.token_log_probs(asked.student[0], asked.ids, temperature=1.3, return_stats=True)
    assert torch.equal(made.top1, truth.top1) and made.top1[0, 1] == -1
    assert torch.equal(made.top1[0, 2], asked.student[0][0, 2].argmax())
    torch.testing.assert_close(made.logsumexp, truth.logsumexp.float())
    assert not made.logsumexp.requires_grad and made.entropy is None
    first = kd.token_log_probs(torch.zeros(2, 40), torch.tensor([7, 0]), return_stats=True)
    assert first.top1.tolist() == [0, 0]  # of equal ones, stored or not
    for near in ([1e6, 1e6 + 0.4], [100.0, 100.00002]):  # a few ulps are a difference
        for asked_id in (-1, 0, 1):
            made = kd.token_log_probs(torch.tensor([near]), torch.tensor([asked_id]), return_stats=True)
            assert made.top1.item() == 1


def values_and_gradient(logits, ids, **options):
    leaf = logits.clone().requires_grad_()
    made = kd.token_log_probs(leaf, ids, entropy=True, **options)
    return made, [grad(part.sum(), leaf, retain_graph=True)[0] for part in (made.log_probs, made.entropy)]


def test_values_that_must_come_out(backend):
    made, (_, of_entropy) = values_and_gradient(torch.tensor([[0.0, math.log(3)]]), torch.tensor([0]))
    torch.testing.assert_close(made.entropy, torch.tensor([0.562335]), rtol=2e-6, atol=0)
    torch.testing.assert_close(of_entropy, torch.tensor([[0.205990, -0.205990]]), rtol=3e-6, atol=0)
    made, _ = values_and_gradient(torch.tensor([[-200.0, -201.0, -202.0]]), torch.tensor([0]))
    torch.testing.assert_close(made.log_probs, torch.tensor([-0.407606]), rtol=2e-6, atol=0)
    torch.testing.assert_close(made.entropy, torch.tensor([0.832396]), rtol=2e-6, atol=0)
    made, _ = values_and_gradient(torch.tensor([[1e8, 1e8]]), torch.tensor([1]))
    assert made.log_probs.item() == pytest.approx(-math.log(2), rel=1e-6)
    logits = torch.full((1, 129), -50.0)
    logits[0, 77] = -40.0
    made, _ = values_and_gradient(logits, torch.tensor([77]))
    torch.testing.assert_close(made.log_probs, torch.tensor([-0.0057944]), rtol=2e-5, atol=0)


@pytest.mark.parametrize("id", [0, 1, -1])
def test_one_token_has_all_the_mass(backend, id):
    half = torch.tensor([[65504.0, -65504.0]], dtype=torch.float16)
    for logits in (torch.tensor([[0.0, -torch.inf]]), half):
        made, gradients = values_and_gradient(logits, torch.tensor([id]))
        assert made.entropy.item() == 0 and not gradients[1].any() and gradients[0].isfinite().all()
        assert gradients[0].any() == (id == 1)
    assert values_and_gradient(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]))[0].log_probs.item() == 0


@pytest.mark.parametrize("form", ["logits", "head", "frozen"])
def test_sure_tokens_keep_their_digits(backend, form):
    """q is 1 - 6e-9: its log-probability, the entropy and every gradient are of that size, in fp32."""
    leaf = torch.tensor([[20.0, 0.0, 0.0, 0.0]], requires_grad=True)
    student = leaf if form == "logits" else kd.LinearHead(leaf, torch.eye(4).requires_grad_(form == "head"))
    made = kd.token_log_probs(student, torch.tensor([0]), entropy=True)
    wide = leaf.detach().double().requires_grad_()
    log_q = wide.log_softmax(-1)
    truth = log_q[:, 0], -(log_q.exp() * log_q).sum(-1)
    assert made.log_probs.item() == pytest.approx(-6.18346e-9, rel=1e-5)
    for mine, true in zip(made, truth):
        assert mine.item() == pytest.approx(true.item(), rel=1e-6)
        (ours,), (theirs,) = (grad(x.sum(), y, retain_graph=True) for x, y in ((mine, leaf), (true, wide)))
        assert relative(ours, theirs) < 1e-6


def test_padding_is_no_outcome(backend):
    asked = Asked(slots=2)
    asked.student[0][..., 100:150] = -torch.inf
    asked.ids = torch.where(asked.ids >= 0, asked.ids % 100, asked.ids)
    values, grads = asked.run(backend)
    truth, true_grads = asked.oracle()
    assert torch.allclose(values.double(), truth, rtol=2e-6, atol=2e-6)
    assert relative(grads[0], true_grads[0]) < 2e-6 and not grads[0][..., 100:150].any()


@pytest.mark.parametrize("form", ["logits", "head", "frozen"])
def test_masked_and_weightless_tokens_may_hold_anything(backend, form):
    asked = Asked(form, slots=2)
    asked.arriving[0][1, 2] = 0.0
    expected = asked.run(backend)
    asked.student[0][0, 1] = torch.nan  # masked
    asked.arriving[0][0, 1], asked.arriving[1][0, 1] = torch.inf, torch.inf
    values, grads = asked.run(backend)
    assert torch.equal(values, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[1])) and not grads[0][0, 1].any()
    asked.student[0][1, 2] = torch.nan  # nothing arrives for it
    values, grads = asked.run(backend)
    assert values.isnan().any() and all(torch.equal(a, b) for a, b in zip(grads, expected[1]))


def test_nan_logits_are_seen(backend):
    logits = torch.randn(3, 300)
    logits[1, 5] = torch.nan
    made, gradients = values_and_gradient(logits, torch.tensor([4, 4, 4]))
    for found in (made.log_probs, made.entropy, gradients[0].sum(-1), gradients[1].sum(-1)):
        assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("form", ["logits", pytest.param("head", marks=pytest.mark.slow), "frozen"])
def test_gradcheck(form):
    asked = Asked(form, slots=3, dtype=torch.float64, vocab=9, **MAP)
    asked.ids = torch.where(asked.ids >= 0, asked.ids % 9, asked.ids)
    leaves = [t.requires_grad_(learns) for t, learns in zip(asked.student, asked.learns)]

    def made(*tensors):
        student = tensors[0] if len(tensors) == 1 else kd.LinearHead(*tensors, **MAP)
        return kd.token_log_probs(student, asked.ids, temperature=1.3, entropy=True)[:2]

    assert torch.autograd.gradcheck(made, leaves)
    with kd.use_backend("reference"):
        assert torch.autograd.gradcheck(made, leaves)
        assert torch.autograd.gradgradcheck(made, leaves)


@pytest.mark.parametrize("form", ["logits", "head", "frozen"])
@pytest.mark.parametrize("name", ["eager", "reference"])
def test_compiled(form, name):
    asked = Asked(form, slots=3)
    fixed = asked.student[1:] if form == "frozen" else []
    leaves = asked.student[:1] if form == "frozen" else asked.student

    def made(*tensors):
        tensors = [*tensors, *fixed]
        student = tensors[0] if len(tensors) == 1 else kd.LinearHead(*tensors)
        found = kd.token_log_probs(
            student * 1 if form == "logits" else student,
            asked.ids,
            temperature=torch.tensor(1.4),
            entropy=True,
            return_stats=True,
            inplace=form == "logits",
        )
        return found.log_probs, found.entropy, found.logsumexp

    with kd.use_backend(name):
        assert_compiled(made, leaves)


@pytest.mark.parametrize("form", ["logits", "head", "frozen"])
def test_opcheck(form):
    asked = Asked(form, slots=3)
    asked.ids[1, 1] = -1
    student = [t.requires_grad_(learns) for t, learns in zip(asked.student, asked.learns)]
    ids, labels = checked.checked_ids(asked.ids.reshape(-1, 3), VOCAB, -100)
    torch.library.opcheck(checked.checked_ids, (asked.ids.reshape(-1, 3), VOCAB, -100))
    temperature = torch.ones(1, dtype=torch.float64)
    spec = Spec(tail=Tail.TRUNCATE, asked=Bits.ENTROPY, stats=1).text()
    needs_grad = [t.requires_grad for t in student]
    shared = spec, VOCAB, "", 2**20, needs_grad, 0.0
    given = *[*student, None, None][:3], ids, labels, temperature, *shared
    torch.library.opcheck(log_prob_operators.log_probs, (*given, form == "logits"))
    _, _, _, _, *finished, choice = (t.detach() for t in log_prob_operators.log_probs(*given, False))
    arriving = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    detached = [t.detach() for t in student]
    given = ids, *arriving, labels, temperature, finished
    torch.library.opcheck(log_prob_operators.log_probs_gradient, (detached, *given, *shared, choice))
    if form == "logits":
        torch.library.opcheck(
            log_prob_operators.log_probs_gradient_, (detached[0], *given, *shared[:-2], choice)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace_writes_the_gradient_in_the_backward(backend, dtype):
    base, ids = torch.randn(2, 3, 500).to(dtype), torch.randint(0, 490, (2, 3))
    arriving = torch.randn(2, 3)

    def loss(logits, **options):
        made = kd.token_log_probs(logits, ids, entropy=True, vocab_size=490, **options)
        return (made.log_probs * arriving).sum() - made.entropy.sum()

    leaf, source = base.clone().requires_grad_(), base.clone().requires_grad_()
    loss(leaf).backward()
    logits = source * 1
    made = loss(logits, inplace=True)
    assert torch.equal(logits, base)  # not yet
    made.backward(retain_graph=True)
    assert torch.equal(logits, leaf.grad) and torch.equal(source.grad, leaf.grad) and leaf.grad.any()
    assert not leaf.grad[..., 490:].any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.backward()


def test_upstream_gradients_of_any_layout(backend):
    """Expanded, strided and 0-dim, as the gradients of sums and slices are."""
    logits, ids = torch.randn(4, 50), torch.randint(0, 50, (4, 3))
    truth = logits.double().requires_grad_()
    leaf = logits.clone().requires_grad_()
    for take in (
        lambda x: x.sum(),
        lambda x: x.t()[1:].flatten()[::2].sum(),
        lambda x: x[:, 0].mean() * 0 + x[1, 2],
    ):
        with kd.use_backend("reference"):
            (theirs,) = grad(take(kd.token_log_probs(truth, ids).log_probs), truth)
        (ours,) = grad(take(kd.token_log_probs(leaf, ids).log_probs), leaf)
        assert relative(ours, theirs) < 1e-6


def test_same_inputs_same_bits(backend):
    asked = Asked("head", slots=3)
    first, second = (asked.run(backend, chunk_bytes=20_000) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


def test_empty_batches(backend):
    made = kd.token_log_probs(torch.randn(0, 7, requires_grad=True), torch.zeros(0, 2, dtype=torch.int64))
    assert made.log_probs.shape == (0, 2)
    made.log_probs.sum().backward()
    head = kd.LinearHead(torch.randn(2, 3, requires_grad=True), torch.randn(7, 3))
    masked = kd.token_log_probs(head, torch.tensor([-100, -100]), entropy=True)
    (masked.log_probs.sum() + masked.entropy.sum()).backward()
    assert not head.hidden.grad.any() and not masked.entropy.any()


def test_a_retained_graph_gives_the_same_gradient_twice(backend):
    for form in ("logits", "head", "frozen"):
        asked = Asked(form)
        leaf = asked.student[0].requires_grad_()
        student = leaf if form == "logits" else kd.LinearHead(*asked.student)
        loss = kd.token_log_probs(student, asked.ids).log_probs.sum()
        first, second = (grad(loss, leaf, retain_graph=keep)[0] for keep in (True, False))
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="create_graph"):
            grad(kd.token_log_probs(student, asked.ids).log_probs.sum(), leaf, create_graph=True)


def test_a_second_backward_over_overwritten_logits_is_an_error(backend):
    """torch sees the write itself, but not where hooks have saved the logits."""
    for hooks in (contextlib.nullcontext(), save_on_cpu(), saved_tensors_hooks(lambda t: t, lambda t: t)):
        leaf = torch.randn(4, 10, requires_grad=True)
        with hooks:
            loss = kd.token_log_probs(leaf * 1, torch.arange(4), inplace=True).log_probs.sum()
        assert grad(loss, leaf, retain_graph=True)[0].norm() > 0.1
        with pytest.raises(
            RuntimeError, match="modified by an inplace operation|has left the gradient where"
        ):
            grad(loss, leaf)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(backend, reentrant):
    for form in ("logits", "head", "frozen"):
        asked = Asked(form, slots=2)
        leaf, others = asked.student[0].requires_grad_(), asked.student[1:]

        def loss(x, asked=asked, others=others):
            of = kd.token_log_probs(kd.LinearHead(x, *others) if others else x, asked.ids, entropy=True)
            return of.log_probs.sum() + of.entropy.sum()

        expected = grad(loss(leaf), leaf)[0]
        checkpoint(loss, leaf, use_reentrant=reentrant).backward()
        assert torch.equal(leaf.grad, expected) and expected.norm() > 0.1


def test_what_is_saved_is_unpacked_once(backend):
    unpacked, leaf = [], torch.randn(4, 10, requires_grad=True)
    with saved_tensors_hooks(
        lambda t: (len(unpacked), t), lambda saved: unpacked.append(saved[1]) or saved[1]
    ):
        loss = kd.token_log_probs(leaf, torch.arange(4)).log_probs.sum()
    loss.backward()
    assert sum(t.data_ptr() == leaf.data_ptr() for t in unpacked) == 1


@pytest.mark.parametrize("ids", [[0], [1], [0, 1, 2], [2, 3]])
def test_an_infinite_logit_is_seen(backend, ids):
    of = kd.token_log_probs(torch.tensor([[math.inf, 1.0, 2.0, 3.0]]), torch.tensor([ids]), return_stats=True)
    assert of.log_probs.isnan().all() and of.logsumexp.isnan().all()


def test_a_frozen_head_is_projected_once(monkeypatch):
    asked, calls = Asked("frozen", slots=2), []
    tile = log_probs.HeadRows.tile
    monkeypatch.setattr(log_probs.HeadRows, "tile", lambda *given: calls.append(1) or tile(*given))
    live, waits = tiles.live_tokens, []
    monkeypatch.setattr(tiles, "live_tokens", lambda labels: waits.append(1) or live(labels))
    asked.run("auto")
    assert len(calls) == 1 and len(waits) == 1, "the backward asked which tokens are live"
    asked.learns[1] = True
    asked.run("auto")
    assert len(calls) == 3 and len(waits) == 3


REFUSED = {
    "float ids": (dict(ids=torch.zeros(3)), "ids must be int64, got torch.float32"),
    "shape": (dict(ids=torch.zeros(4, dtype=torch.int64)), r"ids must be \(3,\) or \(3, 'K'\).*got \(4,\)"),
    "no slots": (dict(ids=torch.zeros(3, 0, dtype=torch.int64)), "K >= 1"),
    "range": (dict(ids=torch.tensor([0, 10, 2])), r"ids must be in \[0, 10\).*found 10 at token 1"),
    "negative": (dict(ids=torch.tensor([0, -2, 2])), "found -2 at token 1"),
    "half masked": (dict(ids=torch.tensor([[0, 1], [-100, 1], [-1, 1]])), "1 of the ids of token 1"),
    "temperature": (dict(temperature=0.0), "temperature must be > 0"),
    "leaf": (dict(inplace=True), "leaf"),
    "vocab": (dict(vocab_size=11), "vocab_size=11"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, message = REFUSED[name]
    given = {"ids": torch.tensor([0, 1, 2])} | options
    leaf = torch.randn(3, 10, requires_grad=True)
    assert_refused(lambda: kd.token_log_probs(leaf, **given), message)


ACCUMULATE, DISTINCT, SPARSE = eager.accumulate, log_probs.distinct_ids, log_probs._sparse

MUTATIONS = {
    "no gradient of the entropy": (eager, "_entropy_gradient", lambda z, *args: torch.zeros_like(z)),
    "ids not left out": (
        eager,
        "accumulate",
        lambda tile, spec, state, skipped: ACCUMULATE(tile, spec, state),
    ),
    "duplicates counted once": (
        log_probs,
        "distinct_ids",
        lambda ids: (DISTINCT(ids)[0], torch.arange(ids.shape[1]).expand(ids.shape)),
    ),
    "only the ids' gradient": (
        log_probs,
        "_sparse",
        lambda ids, rest, *others: SPARSE(ids, rest * 0, *others),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("form", ["logits", "head", "frozen"])
def test_mutations_are_seen(monkeypatch, form, name):
    asked = Asked(form, slots=3)
    oracle, plain_result = asked.oracle(), asked.plain()

    def wrong():
        checks = compare(asked.run("eager"), oracle, plain_result, dtype=torch.float32)
        return [check for check in checks if not check.ok]

    assert not wrong()
    monkeypatch.setattr(*MUTATIONS[name])
    assert wrong()


@pytest.mark.skipif("native" not in BACKENDS, reason="native is not usable here")
def test_half_masses_across_blocks():
    """Ids in several blocks of a row, the label's neighbours and the ends."""
    asked = Asked(vocab=9001, slots=6)
    asked.ids[0, 0] = torch.tensor([0, 2047, 2048, 4095, 9000, 2047])
    assert_exact(asked.run("native"), asked.oracle(), asked.plain(), dtype=torch.float32)
