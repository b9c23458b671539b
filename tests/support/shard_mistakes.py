"""Code that is broken on purpose: what others got wrong about shards."""

import torch.distributed as dist
from shard_cases import Case, sharded
from shard_processes import patched

from kdkernels.backends import row_state
from kdkernels.backends.row_state import hard_results
from kdkernels.core import exchange, shards

BROKEN = Case(
    "broken",
    dict(student="head", teacher="head"),
    dict(hard_weight=0.5, label_smoothing=0.2, soft_weight=0.5),
    ranks=3,
)


def rank_times_width(given):
    widths = [width for _, width in given]
    return tuple((rank * width, rank * width + width) for rank, width in enumerate(widths))


def mean_of_the_shard(results, side, at_1, asked, vocab):
    return hard_results(results, side, at_1, asked, 20)


def summed_twice(self, total):
    for _ in range(2):
        dist.all_reduce(total, group=self.group)


#: What others got wrong: (owner, name, what it is replaced by).
MISTAKES = {
    "dH is not summed": (exchange.Exchange, "start_sum", lambda self, total: None),
    "dH is summed twice": (exchange.Exchange, "start_sum", summed_twice),
    "smoothing over the local vocabulary": (row_state, "hard_results", mean_of_the_shard),
    "the first id is rank times width": (shards, "_joined", rank_times_width),
    "the states of one rank": (row_state, "in_order", lambda parts: parts[0]),
}


BROKEN_SPARSE = Case("broken too", {}, dict(hard_weight=0.5), tail="bucket", ranks=3)


def own_stored_logits(self, here, ids, dtype, rows):
    return here()


def mistaken_sparse(group):
    """The stored logits are not summed: each rank has its own and -inf."""
    with patched(exchange.Exchange, "logits_at", own_stored_logits):
        return sharded(BROKEN_SPARSE, group)


def mistaken(mistake, group):
    owner, name, value = MISTAKES[mistake]
    with patched(owner, name, value):
        return sharded(BROKEN, group)
