"""What the operators of all losses have in common."""

import subprocess
import sys

EVERY_KIND = """
import sys, torch, kdkernels as kd
from kdkernels.integrations import functional as F

student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
labels = torch.tensor([3, 8, -100, 5])
head = kd.LinearHead(torch.randn(4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True))
losses = [
    kd.kl_div(student, teacher, labels),
    kd.cross_entropy(student * 1.0, labels, inplace=True),
    kd.kl_div(head, kd.top_k_target(teacher, 4), temperature=torch.tensor(2.0)),
    kd.kl_div(head, teacher, reduction="none").sum(),
    kd.token_log_probs(student, labels).log_probs.sum(),
    kd.token_log_probs(student * 1.0, labels, inplace=True).log_probs.sum(),
    F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum"),
]
for loss in losses:
    loss.backward()
print("torch._dynamo" in sys.modules)
"""


def test_no_loss_imports_the_compiler():
    """It takes seconds."""
    done = subprocess.run([sys.executable, "-c", EVERY_KIND], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
