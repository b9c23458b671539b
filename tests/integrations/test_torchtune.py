"""torchtune's losses beside its own, and the entropy that its forward KL leaves out."""

import inspect

import pytest
import torch
from compare import assert_same, outcome
from source import load

from kdkernels.integrations import torchtune as dropin

original = load("torchtune", "torchtune/modules/loss/kd_losses.py")
NAMES = ["ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss"]
CHUNKED = [name.replace("Loss", "WithChunkedOutputLoss") for name in NAMES]
B, T, V, CHUNKS = 3, 8, 33, 4


def batch(*, all_masked=False):
    labels = torch.randint(0, V, (B, T))
    labels[torch.rand(B, T) < (2.0 if all_masked else 0.3)] = -100
    return 3 * torch.randn(B, T, V), 3 * torch.randn(B, T, V), labels


def whole(module, name, student, teacher, labels, **options):
    loss = getattr(module, name)()
    return outcome(lambda s: loss(s.view(-1, V), teacher.view(-1, V), labels.view(-1), **options), [student])


def chunked(module, name, student, teacher, labels):
    loss = getattr(module, name)(num_output_chunks=CHUNKS)
    return outcome(lambda s: loss(s.chunk(CHUNKS, 1), teacher.chunk(CHUNKS, 1), labels), [student])


def entropy(teacher, labels):
    """The teacher's, summed over unmasked tokens."""
    log_p = teacher.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)[labels != -100].sum()


def missing(name, teacher, labels, *, normalize=True):
    """What torchtune's value has too much: the teacher's entropy, as often as the forward KL counts."""
    share = {"F": 1.0, "R": 0.0, "S": 0.5}[name[0]]
    return share * entropy(teacher, labels) / ((labels != -100).sum() if normalize else 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalize", [True, False])
def test_whole_losses(name, normalize):
    student, teacher, labels = batch()
    ours, theirs = (whole(m, name, student, teacher, labels, normalize=normalize) for m in (dropin, original))
    theirs[0][0] -= missing(name, teacher, labels, normalize=normalize)
    assert_same(ours, theirs, 2e-5)


@pytest.mark.parametrize("name", CHUNKED)
def test_chunked_losses(name):
    student, teacher, labels = batch()
    ours, theirs = (chunked(m, name, student, teacher, labels) for m in (dropin, original))
    theirs[0][0] -= missing(name, teacher, labels)
    assert_same(ours, theirs, 2e-5)


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize(
    "tokens, cut",
    [
        (50, lambda x: x.tensor_split(8, 1)),
        (7, lambda x: x.split([1, 4, 2], 1)),
        (9, lambda x: [y.flatten(0, 1) for y in x.chunk(2, 1)]),
        (3, lambda x: [x]),
        (3, lambda x: x.tensor_split(8, 1)),
    ],
)
def test_pieces_of_any_lengths(name, tokens, cut):
    student, teacher = 3 * torch.randn(2, B, tokens, V)
    labels = torch.randint(0, V, (B, tokens))
    labels[torch.rand(B, tokens) < 0.3] = -100
    loss = getattr(dropin, name)(num_output_chunks=8)
    ours = outcome(lambda s: loss(cut(s), cut(teacher), labels), [student])
    assert_same(ours, whole(dropin, name.replace("WithChunkedOutput", ""), student, teacher, labels), 1e-5)


@pytest.mark.parametrize("name", ["ForwardKLLoss", "ReverseKLLoss"])
@pytest.mark.parametrize("run", [whole, chunked])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_difference_minus_infinity_on_one_side(name, run, side):
    """Infinite where the other side gives the token mass; torchtune's loss is that without the token's term."""
    student, teacher, labels = batch()
    (student if side == "student" else teacher)[..., 3] = -torch.inf
    full = name.replace("Loss", "WithChunkedOutputLoss") if run is chunked else name
    (ours,), _ = run(dropin, full, student, teacher, labels)
    (theirs,), _ = run(original, full, student, teacher, labels)
    if (name[0], side) in (("F", "student"), ("R", "teacher")):
        p, q = (z.double().log_softmax(-1) for z in (teacher, student))
        terms = -p.exp() * q if name[0] == "F" else q.exp() * (q - p)
        rest = terms.masked_fill(terms.isinf(), 0.0).sum(-1)[labels != -100].mean()
        assert ours == torch.inf
        torch.testing.assert_close(theirs.double(), rest, rtol=1e-5, atol=1e-6)
    else:
        extra = missing(name, teacher.clamp(min=-1e4), labels)
        torch.testing.assert_close(ours, theirs - extra, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ForwardKLLoss", "SymmetricKLLoss"])
def test_difference_the_teachers_entropy(name):
    """A student that equals its teacher: 0 here, the whole entropy there."""
    student, _, labels = batch()
    (ours,), _ = whole(dropin, name, student, student, labels)
    (theirs,), _ = whole(original, name, student, student, labels)
    assert ours.abs() < 1e-6
    torch.testing.assert_close(theirs, missing(name, student, labels), rtol=1e-5, atol=1e-6)
    assert theirs > 0.3


@pytest.mark.parametrize("name", NAMES + CHUNKED)
def test_difference_all_masked(name):
    student, teacher, labels = batch(all_masked=True)
    run = chunked if name in CHUNKED else whole
    (ours,), (gradient,) = run(dropin, name, student, teacher, labels)
    assert ours == 0 and not gradient.any()
    if name in CHUNKED[1:]:
        assert run(original, name, student, teacher, labels)[0][0].isnan()
    elif name != "SymmetricKLLoss":
        with pytest.raises(RuntimeError, match="does not require grad"):
            run(original, name, student, teacher, labels)


@pytest.mark.parametrize("name", NAMES)
def test_padding_of_minus_infinity(name):
    student, teacher, labels = batch()
    cut = whole(dropin, name, student, teacher, labels)
    pad = torch.full((B, T, 3), -torch.inf)
    loss = getattr(dropin, name)()
    run = lambda s: loss(torch.cat([s, pad], -1), torch.cat([teacher, pad], -1), labels)  # noqa: E731
    assert_same(outcome(run, [student]), cut, 1e-6)


@pytest.mark.parametrize("name", NAMES + CHUNKED)
def test_signatures(name):
    for method in ("__init__", "forward"):
        ours, theirs = (
            [
                (p.name, p.default)
                for p in inspect.signature(getattr(getattr(m, name), method)).parameters.values()
            ]
            for m in (dropin, original)
        )
        assert ours == theirs
    made = getattr(dropin, name)()
    assert made.ignore_index == -100 and (name in NAMES or made.num_output_chunks == 8)


def test_refusals():
    student, teacher, labels = batch()
    with pytest.raises(ValueError, match="sym_kd_ratio"):
        dropin.SymmetricKLLoss(sym_kd_ratio=1.5)
    loss = dropin.ForwardKLWithChunkedOutputLoss(4)
    with pytest.raises(ValueError, match=r"pieces of \[4, 4\] tokens .* and \[2, 2, 2, 2\]"):
        loss(student.chunk(2, 1), teacher.chunk(4, 1), labels)
    with pytest.raises(ValueError, match=r"labels \(3, 8\) cannot be cut into pieces of \[4\]"):
        loss(student.chunk(2, 1)[:1], teacher.chunk(2, 1)[:1], labels)
