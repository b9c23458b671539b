"""Sparse targets to compare: every way to leave a slot empty, duplicates, and the plain formula."""

import torch
from problems import Problem

import kdkernels as kd
from kdkernels.testing import textbook

TAILS = ["bucket", "conditional", "renormalize", "truncate"]
#: tail, divergence: everything that is defined, for one divergence of each kind.
FORWARD_ONLY = ("renormalize", "truncate")


def make_target(teacher, slots, tail, *, given="logprobs", dtype=torch.float32, messy=True):
    """The teacher's top entries; ``messy``: split in two, shuffled, with empty slots of every kind."""
    logprobs = teacher.double().log_softmax(-1)
    values, ids = logprobs.topk(slots, -1)
    mask = None
    if messy:
        half = values[..., :1] - 0.5
        values = torch.cat([values, half, half + (torch.tensor(0.5).exp() - 1).log()], -1)
        values[..., :1] = -torch.inf  # the first is now in the two last ones
        ids = torch.cat([ids, ids[..., :1], ids[..., :1]], -1)
        order = torch.rand(ids.shape).argsort(-1)
        ids, values = ids.gather(-1, order), values.gather(-1, order)
        empty = torch.rand(ids.shape)
        ids = torch.where(empty < 0.1, -1, ids)
        values = torch.where((empty > 0.9) & (ids >= 0), -torch.inf, values)
        values = torch.where(ids < 0, torch.nan, values)  # whatever an empty slot holds
        mask = empty < 0.8
        ids[0, 0], mask[0, 1] = -1, False  # tokens without any slot
    if given == "weights":
        values = values.exp()
    return kd.SparseTarget(ids, **{given: values.to(dtype)}, mask=mask, tail=tail)


class SparseProblem(Problem):
    def __init__(
        self, *, slots=8, tail="bucket", given="logprobs", values=torch.float32, messy=True, **options
    ):
        super().__init__(**{"ignored": 3, **options})
        self.target = make_target(
            self.teacher[0].float(), slots, tail, given=given, dtype=values, messy=messy
        )
        self.labels.view(-1)[1] = 0  # the token without any slot counts
        self.teacher = [self.target]

    def side(self, tensors):
        return tensors[0] if isinstance(tensors[0], kd.SparseTarget) else super().side(tensors)

    def run(self, backend, *, double=False, loss=kd.distillation_loss, labels=True, target=None, **options):
        convert = (lambda t: t.double()) if double else (lambda t: t.clone())
        leaves = [convert(t).requires_grad_() for t in self.student]
        with kd.use_backend(backend):
            value = loss(self.side(leaves), target or self.target, self.labels if labels else None, **options)
        return value, torch.autograd.grad(value.sum(), leaves)

    def plain(self, divergence, *, temperature=1.0, hard_weight=0.0, **_):
        """The same in the tensors' own dtype, mean reduction, as a trainer would write it."""
        leaves = [t.clone().requires_grad_() for t in self.student]
        z = self._plain_logits(leaves)
        rows = self._plain_rows(z.flatten(0, -2), divergence, temperature).view(z.shape[:-1])
        if hard_weight:
            rows = rows + hard_weight * torch.nn.functional.cross_entropy(
                z.flatten(0, -2), self.labels.flatten(), reduction="none"
            ).view_as(rows)
        live = self.labels >= 0
        loss = torch.where(live, rows, 0.0).sum() / live.sum()
        return loss, torch.autograd.grad(loss, leaves)

    def _plain_rows(self, z, divergence, temperature):
        target, n = self.target, z.shape[0]
        ids, values = target.ids.reshape(n, -1), target.values.reshape(n, -1).to(z.dtype)
        empty = ids < 0 if target.mask is None else (ids < 0) | ~target.mask.reshape(n, -1)
        t = torch.where(empty, 0.0, values.exp() if target.weights is None else values)
        t = torch.zeros_like(z).scatter_add_(1, ids.clamp(min=0), t)
        kept, some = t > 0, (t > 0).any(-1)
        if target.tail in FORWARD_ONLY:
            if target.tail == "renormalize":
                t = t ** (1 / temperature)
                t = t / t.sum(-1, keepdim=True).clamp(min=1e-30)
            log_q = (z / temperature).log_softmax(-1)
            return torch.where(kept, t * (t.clamp(min=1e-30).log() - log_q), 0.0).sum(-1)
        log_p, hidden = t.log(), ~kept
        if target.tail == "bucket":
            others = z.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True)
            rest = (1 - t.sum(-1, keepdim=True)).clamp(min=2.0**-40)
            log_p = torch.cat([log_p, rest.log().to(z.dtype)], 1)
            z = torch.cat([z.masked_fill(hidden, -torch.inf), others], 1)
        else:
            hidden, log_p = hidden & some[:, None], log_p.masked_fill(~some[:, None], 0.0)
            z = z.masked_fill(hidden, -torch.inf)
        log_q, log_p = (z / temperature).log_softmax(-1), (log_p / temperature).log_softmax(-1)
        return torch.where(some, textbook(divergence, log_p.exp(), log_q.exp(), log_p, log_q).sum(-1), 0.0)
