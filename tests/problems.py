"""Losses to compare: inputs in every form, and the oracle's answer in fp64."""

import torch

import kdkernels as kd
from kdkernels.divergences import simplified


class Problem:
    """Student and teacher as logits or heads, with labels; leaves are what gets a gradient."""

    def __init__(self, *, student="logits", teacher="logits", dtype=torch.float32, vocab=257,
                 shape=(3, 5), width=16, teacher_dtype=None, scale=3.0, ignored=2, **head):  # fmt: skip
        self.head = head
        self.student = self._tensors(student, shape, vocab, width, scale, dtype)
        self.teacher = self._tensors(teacher, shape, vocab, 2 * width, scale, teacher_dtype or dtype)
        self.labels = torch.randint(0, vocab, shape)
        self.labels.view(-1)[:ignored] = -100

    @staticmethod
    def _tensors(form, shape, vocab, width, scale, dtype):
        if form == "logits":
            return [(torch.randn(*shape, vocab) * scale).to(dtype)]
        spread = scale / width**0.5
        made = [torch.randn(*shape, width), torch.randn(vocab, width) * spread, torch.randn(vocab)]
        return [t.to(dtype) for t in made]

    def side(self, tensors):
        return tensors[0] if len(tensors) == 1 else kd.LinearHead(*tensors, **self.head)

    def run(self, backend, *, double=False, loss=kd.distillation_loss, labels=True, **options):
        """(loss, gradients of the student's tensors)."""
        convert = (lambda t: t.double()) if double else (lambda t: t.clone())
        leaves = [convert(t).requires_grad_() for t in self.student]
        teacher = self.side([convert(t) for t in self.teacher])
        with kd.use_backend(backend):
            value = loss(self.side(leaves), teacher, self.labels if labels else None, **options)
        return value, torch.autograd.grad(value.sum(), leaves)

    def oracle(self, **options):
        return self.run("reference", double=True, **options)

    def plain(self, divergence, *, temperature=1.0, hard_weight=0.0, **_):
        """What a trainer would write: the same formula in the tensors' own dtype, mean reduction."""
        leaves = [t.clone().requires_grad_() for t in self.student]
        s, t = self._plain_logits(leaves), self._plain_logits(self.teacher)
        log_q, log_p = ((z / temperature).log_softmax(-1) for z in (s, t))
        dtype = torch.promote_types(log_p.dtype, log_q.dtype)
        log_q, log_p = log_q.to(dtype), log_p.to(dtype)
        rows = simplified(divergence).phi(log_p.exp(), log_q.exp(), log_p, log_q).sum(-1)
        if hard_weight:
            rows = rows + hard_weight * torch.nn.functional.cross_entropy(
                s.flatten(0, -2), self.labels.flatten(), reduction="none"
            ).view_as(rows)
        live = self.labels >= 0
        loss = torch.where(live, rows, 0.0).sum() / live.sum()
        return loss, torch.autograd.grad(loss, leaves)

    def _plain_logits(self, tensors):
        if len(tensors) == 1:
            return tensors[0]
        z = torch.nn.functional.linear(*tensors) * self.head.get("logit_scale", 1.0)
        cap = self.head.get("softcap")
        return cap * torch.tanh(z / cap) if cap else z


def relative(ours, oracle):
    scale = oracle.double().norm().item()
    return (ours.double() - oracle.double()).norm().item() / max(scale, 1e-300)


def assert_exact(ours, oracle, plain, *, dtype, projected=False):
    """At most twice the plain formula's error plus a few ulp, in the norm of the oracle's result.

    ``projected``: logits were rounded to ``dtype`` by a GEMM on the way, so the loss is known to one
    ulp of it only; the plain formula's error is then as much a matter of luck as ours.
    """
    (value, grads), (true_value, true_grads), (plain_value, plain_grads) = ours, oracle, plain
    ulp = torch.finfo(dtype).eps
    wide = torch.finfo(value.dtype).eps
    # The loss is a sum whose terms cancel: its ulp is that of the log-probabilities it is made of.
    error, plain_error = (abs(v.detach().double() - true_value).item() for v in (value, plain_value))
    few_ulp = 64 * wide * (1 + abs(true_value.item())) + projected * ulp * abs(true_value.item())
    if plain_error != plain_error:
        plain_error = 0.0  # the plain formula overflowed; ours has no excuse to
    assert error <= 2 * plain_error + few_ulp, (error, plain_error)
    for mine, truth, theirs in zip(grads, true_grads, plain_grads):
        # The plain formula can be useless in half precision: that is no licence to be so too. A
        # zero gradient has the relative error 1.
        plain_error = relative(theirs, truth) if theirs.isfinite().all() else 1.0
        # In fp64 the plain formula is the oracle itself, its error 0: only the ulps are left there.
        tolerance = min(2 * plain_error, 0.1) + (16 if dtype == torch.float64 else 4) * ulp
        assert truth.norm() > 1e-6
        assert relative(mine, truth) <= tolerance, (relative(mine, truth), plain_error)
