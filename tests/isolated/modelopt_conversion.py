"""``python modelopt_conversion.py OUTCOMES``: ModelOpt's own conversion, given its loss and ours.

A process of its own: importing the whole of ModelOpt changes other libraries. Distillation needs none of
these packages: what is not installed for the tests has an empty one in its place, and what ModelOpt would
extend is as good as not installed, which is quicker.
"""

import importlib.machinery
import sys
from types import ModuleType

import torch
from torch import nn

EMPTY = ("omegaconf", "pulp", "pynvml", "scipy")
HIDDEN = ("accelerate", "datasets", "deepspeed", "diffusers", "peft", "transformers", "trl")


class EmptyPackages:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EMPTY:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return ModuleType(spec.name)

    def exec_module(self, module):
        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 19)

    def forward(self, x):
        return self.head(x)


def run(mtd, criterion, *, per_layer):
    """(the loss, the gradient of the student's weight) of a model that ModelOpt converted."""
    torch.manual_seed(0)
    student, teacher, x = Model(), Model(), torch.randn(3, 4, 8)
    criterion = {("head", "head"): criterion} if per_layer else criterion
    config = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": None}
    model = mtd.convert(student, mode=[("kd_loss", config)])
    model.train()
    model(x)
    loss = model.compute_kd_loss()
    return loss.detach(), torch.autograd.grad(loss, model.head.weight)[0]


if __name__ == "__main__":
    sys.meta_path.append(EmptyPackages())
    sys.modules.update(dict.fromkeys(HIDDEN))
    import modelopt.torch.distill as mtd

    from kdkernels.integrations import modelopt as dropin

    torch.save(
        [
            [run(mtd, m.LogitsDistillationLoss(2.0), per_layer=layer) for m in (dropin, mtd)]
            for layer in (False, True)
        ],
        sys.argv[1],
    )
