"""torchtitan's cross entropy beside its formula; beside its own operator on many ranks in test_shards.py."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, outcome

from kdkernels.integrations.torchtitan import cross_entropy_loss

LABELS = torch.tensor([[1, -100, 2, 5], [3, 4, -100, 28]])


def formula(pred, labels):
    return F.cross_entropy(
        pred.flatten(0, 1).float(), labels.flatten(0, 1), reduction="sum", ignore_index=-100
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_vocabularies(dtype):
    pred = (2 * torch.randn(2, 4, 29)).to(dtype)
    ours, theirs = outcome(cross_entropy_loss, [pred], LABELS), outcome(formula, [pred], LABELS)
    assert_same(ours, theirs, 1e-6 if dtype == torch.float32 else 4e-3)
    assert torch.equal(cross_entropy_loss(pred, LABELS, global_vocab_size=29), ours[0][0])


def test_a_part_that_does_not_say_whose():
    with pytest.raises(ValueError, match="global_vocab_size=58, but the logits have 29 columns"):
        cross_entropy_loss(torch.randn(2, 4, 29), LABELS, global_vocab_size=58)
