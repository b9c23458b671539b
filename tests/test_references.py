"""What the suites of other frameworks hold their log-probabilities and draft losses against, derived again in fp64.

None of these shares a line with ``kdkernels.reference``: a log-probability by an online fold is another formula than one by
a softmax. The real packages are beside ours in ``tests/integrations``, where they can be installed.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import relative

import kdkernels as kd

N, V, H, PIECE = 7, 131, 12, 17
MASKED = 4


def fold(z, ids):
    """prime-rl, VeOmni: running maximum, sum of e^(z - m) and sum of z e^(z - m) over pieces of the vocabulary."""
    m = torch.full_like(z[:, 0], -math.inf)
    total, weighted = torch.zeros_like(m), torch.zeros_like(m)
    for piece in z.split(PIECE, 1):
        higher = torch.maximum(m, piece.detach().amax(1))
        e = (piece - higher[:, None]).exp()
        decay = (m - higher).exp()
        total, weighted, m = total * decay + e.sum(1), weighted * decay + (e * piece).sum(1), higher
    normaliser = m + total.log()
    return z.gather(1, ids[:, None])[:, 0] - normaliser, normaliser - weighted / total


def cross_entropy(z, ids):
    """Liger without Triton: a cross entropy of the divided logits, and the entropy's definition."""
    q = z.softmax(1)
    return -F.cross_entropy(z, ids, reduction="none"), torch.special.entr(q).sum(1)


def log_softmax(z, ids):
    """TRL: the log-softmax of every row."""
    log_q = z.log_softmax(1)
    return log_q.gather(1, ids[:, None])[:, 0], -(log_q.exp() * log_q).sum(1)


def ranks(z, ids):
    """slime: ranks share out the vocabulary unevenly; maxima, sums and the id's logit are reduced over them."""
    parts, starts = z.split([50, 50, V - 100], 1), (0, 50, 100)
    top = torch.stack([part.detach().amax(1) for part in parts]).amax(0)
    total = sum((part - top[:, None]).exp().sum(1) for part in parts)
    mean = sum(((part - top[:, None]).exp() / total[:, None] * part).sum(1) for part in parts)
    here = 0
    for part, start in zip(parts, starts):
        mine = (ids >= start) & (ids < start + part.shape[1])
        found = part.gather(1, (ids - start).clamp(0, part.shape[1] - 1)[:, None])[:, 0]
        here = here + torch.where(mine, found, 0.0)
    normaliser = total.log() + top
    return here - normaliser, normaliser - mean


def row_by_row(z, ids):
    """SkyRL: the id's logit less the row's logsumexp, one row after the other."""
    chosen = torch.stack([row[i] - row.logsumexp(0) for row, i in zip(z, ids)])
    return chosen, torch.stack([row.logsumexp(0) - (row.softmax(0) * row).sum() for row in z])


@pytest.mark.parametrize("formula", [fold, cross_entropy, log_softmax, ranks, row_by_row])
@pytest.mark.parametrize("form", ["logits", "head", "frozen"])
def test_log_probs_and_entropies(backend, form, formula):
    """At a temperature of each token, with another weight for each number, one token masked."""
    ids, temperature, weights = torch.randint(0, V, (N,)), torch.rand(N) + 0.5, torch.randn(2, N)
    given = [2 * torch.randn(N, V)] if form == "logits" else [torch.randn(N, H), torch.randn(V, H)]
    learns = [True, form == "head"][: len(given)]
    weights[:, MASKED] = 0.0

    def leaves(dtype):
        return [t.to(dtype).requires_grad_(learned) for t, learned in zip(given, learns)]

    def outcome(pair, tensors):
        loss = sum((part * by).sum() for part, by in zip(pair, weights))
        return torch.stack(pair).detach(), torch.autograd.grad(loss, [t for t in tensors if t.requires_grad])

    mine, theirs = leaves(torch.float32), leaves(torch.float64)
    student = mine[0] if len(mine) == 1 else kd.LinearHead(*mine, softcap=9.0)
    asked = ids.clone()
    asked[MASKED] = -100
    of = kd.token_log_probs(student, asked, temperature=temperature, entropy=True)
    z = theirs[0] if len(theirs) == 1 else 9 * torch.tanh(theirs[0] @ theirs[1].t() / 9)
    live = torch.arange(N) != MASKED
    truth = [part.where(live, 0.0) for part in formula(z / temperature.double()[:, None], ids)]
    (values, grads), (true_values, true_grads) = (
        outcome([of.log_probs, of.entropy], mine),
        outcome(truth, theirs),
    )
    torch.testing.assert_close(values.double(), true_values, rtol=2e-6, atol=2e-6)
    for ours, true in zip(grads, true_grads, strict=True):
        assert true.norm() > 1e-2 and relative(ours, true) < 3e-6


def lk_hybrid(draft, target, eta):
    both = (kd.ForwardKL(), kd.Overlap())
    kl, overlap = kd.distillation_loss(draft, target, divergence=both, reduction="none")
    weight = (-eta * overlap.detach()).exp()
    return weight * kl + (1 - weight) * (1 - overlap)


def of(divergence):
    return lambda draft, target: kd.distillation_loss(draft, target, divergence=divergence, reduction="none")


#: speculators' names.
DRAFT_LOSSES = {
    "kl_div": of(kd.ForwardKL()),
    "rkl": of(kd.ReverseKL()),
    "jsd": of(kd.JSD(0.5)),
    "tv": of(kd.TotalVariation()),
    "nla": lambda draft, target: -of(kd.Overlap())(draft, target).log(),
    "lk_hybrid": lambda draft, target: lk_hybrid(draft, target, 3.0),
}


def drafts(apart=1.0, dtype=torch.float32):
    target = 2 * torch.randn(2, 5, V)
    return (target + apart * torch.randn(2, 5, V)).to(dtype), target.to(dtype)


def textbook(name, draft, target):
    p, q = target.softmax(-1), draft.softmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    m, kl = (p + q) / 2, (p * (p / q).log()).sum(-1)
    weight = (-3 * overlap.detach()).exp()
    return {
        "kl_div": kl,
        "rkl": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / m).log()) + (q * (q / m).log())).sum(-1) / 2,
        "tv": (p - q).abs().sum(-1) / 2,
        "nla": -overlap.log(),
        "lk_hybrid": weight * kl + (1 - weight) * (1 - overlap),
    }[name]


@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-5), (torch.bfloat16, 5e-3)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", DRAFT_LOSSES)
def test_draft_losses_near_their_target(backend, name, dtype, most):
    """speculators: where p is nearly q their difference must keep its digits; a softmax in bf16 is off by 8 to 23%."""
    draft, target = drafts(0.1, dtype)
    leaf, wide = draft.clone().requires_grad_(), draft.double().requires_grad_()
    mine, true = DRAFT_LOSSES[name](leaf, target), textbook(name, wide, target.double())
    torch.testing.assert_close(mine.double(), true, rtol=1e-3, atol=1e-6)
    (ours,), (theirs,) = (torch.autograd.grad(x.sum(), y) for x, y in ((mine, leaf), (true, wide)))
    assert theirs.norm() > 1e-2 and relative(ours, theirs) < most


def test_laws_of_draft_losses(backend):
    """speculators' own: equal models, exchanged models, nothing in common, one certain token, and both ends of eta."""
    losses, (draft, target) = DRAFT_LOSSES, drafts()
    for name, loss in losses.items():
        leaf = target.clone().requires_grad_()
        value = loss(leaf, target)
        assert value.abs().max() < 1e-6 and not (
            name != "nla" and torch.autograd.grad(value.sum(), leaf)[0].any()
        )
        assert (loss(draft, target) > 0).all()
    torch.testing.assert_close(losses["rkl"](draft, target), losses["kl_div"](target, draft))
    torch.testing.assert_close(losses["jsd"](draft, target), losses["jsd"](target, draft))
    torch.testing.assert_close(losses["nla"](draft, target), -(1 - losses["tv"](draft, target)).log())
    torch.testing.assert_close(lk_hybrid(draft, target, 0.0), losses["kl_div"](draft, target))
    torch.testing.assert_close(lk_hybrid(draft, target, 1e6), losses["tv"](draft, target))
    apart = torch.full((2, 1, 4), -30.0)
    apart[0, 0, 0] = apart[1, 0, 1] = 30.0
    assert losses["jsd"](*apart).item() == pytest.approx(math.log(2)) and losses["tv"](*apart).item() == 1
    assert losses["nla"](*apart).item() == pytest.approx(60 - math.log(4), rel=1e-6)
    sure = torch.full_like(draft, -math.inf)
    sure[..., 7] = 0.0
    for name in ("kl_div", "nla"):
        torch.testing.assert_close(losses[name](draft, sure), -draft.log_softmax(-1)[..., 7])


def test_lk_hybrids_weight_is_a_constant(backend):
    draft, target = drafts()
    leaf, wide = draft.clone().requires_grad_(), draft.double().requires_grad_()
    (ours,) = torch.autograd.grad(DRAFT_LOSSES["lk_hybrid"](leaf, target).sum(), leaf)
    p, q = target.double().softmax(-1), wide.softmax(-1)
    overlap, kl = torch.minimum(p, q).sum(-1), (p * (p / q).log()).sum(-1)

    def slope(weight):
        return torch.autograd.grad(
            (weight * kl + (1 - weight) * (1 - overlap)).sum(), wide, retain_graph=True
        )[0]

    assert relative(ours, slope((-3 * overlap.detach()).exp())) < 2e-5
    assert relative(ours, slope((-3 * overlap).exp())) > 1e-2


@pytest.mark.parametrize("form", ["logits", "head"])
def test_the_three_terms_of_dspark(backend, form):
    """Megatron-Bridge, DeepSpec: cross entropy and L1 distance over blocks of drafted tokens, a position weighs e^(-k /
    gamma), each sum is divided by its own weights; and a confidence that is taught the acceptance."""
    blocks, gamma, (alpha, beta, share) = (3, 4), 2.0, (0.1, 0.9, 0.5)
    given = [torch.randn(*blocks, H), torch.randn(V, H)]
    target, ids, confidence = 2 * torch.randn(*blocks, V), torch.randint(0, V, blocks), torch.randn(blocks)
    live = torch.rand(blocks) < 0.7
    live[:, 0] = True
    decay = (-torch.arange(4) / gamma).exp().expand(blocks) * live

    def truth(hidden, weight, score):
        z, p = hidden @ weight.t(), target.double().softmax(-1)
        distance, by = (z.softmax(-1) - p).abs().sum(-1), decay.double() / decay.sum()
        hard = -z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        taught = F.binary_cross_entropy_with_logits(score, 1 - distance.detach() / 2, reduction="none")
        return ((alpha * hard + beta * distance + share * taught) * by).sum()

    def ours(hidden, weight, score):
        draft = kd.LinearHead(hidden, weight) if form == "head" else hidden @ weight.t()
        shared = dict(mask=live, token_weights=decay, reduction="sum", num_items=decay.sum())
        loss = kd.distillation_loss(
            draft,
            target,
            ids,
            divergence=kd.TotalVariation(),
            soft_weight=2 * beta,
            hard_weight=alpha,
            **shared,
        )
        with torch.no_grad():
            acceptance = kd.distillation_loss(draft, target, divergence=kd.Overlap(), reduction="none")
        taught = F.binary_cross_entropy_with_logits(score, acceptance, reduction="none")
        return loss + share * (taught * decay).sum() / decay.sum()

    leaves = [t.clone().requires_grad_() for t in (*given, confidence)]
    wide = [t.double().requires_grad_() for t in (*given, confidence)]
    mine, true = ours(*leaves), truth(*wide)
    assert mine.item() == pytest.approx(true.item(), rel=1e-5)
    for found, right in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(true, wide)):
        assert right.norm() > 1e-3 and relative(found, right) < 1e-5
