"""``python liger_originals.py CASES OUTCOMES``: Liger's own modules on the CPU, by Triton's interpreter.

A process of its own: the interpreter is chosen when a kernel is defined, for the whole process.
"""

import importlib
import sys

import torch
from compare import outcome


def run(case):
    module, name = case["original"].split(":")
    loss = getattr(importlib.import_module(module), name)(**case["options"])
    return outcome(lambda *leaves: call(loss, case, leaves), [case["arguments"][i] for i in case["leaves"]])


def call(loss, case, leaves):
    arguments = list(case["arguments"])
    for i, leaf in zip(case["leaves"], leaves):
        arguments[i] = leaf
    result = loss(*arguments)
    if case.get("both"):  # two per-token results: weigh them, so that each has its own gradient
        return (result[0] + 2 * result[1]), result[0], result[1]
    return result


if __name__ == "__main__":
    torch.save([run(case) for case in torch.load(sys.argv[1])], sys.argv[2])
