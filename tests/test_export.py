"""torch.export: what is recorded with one size, and with examples that need no gradient, serves others."""

import pytest
import torch
from problems import relative
from torch.export import Dim, export

import kdkernels as kd

H, V = 6, 10


class Exported(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.head = torch.nn.Linear(H, V) if form == "head" else None

    def forward(self, student, teacher, labels):
        if self.head is not None:
            student = kd.LinearHead(student, self.head.weight, self.head.bias)
        losses = kd.distillation_loss(student, teacher, labels, hard_weight=0.5, reduction="none")
        log_probs = kd.token_log_probs(student, labels).log_probs
        batchmean = kd.kl_div(student, teacher, reduction="batchmean")
        return losses, log_probs, kd.kl_div(student, teacher), kd.cross_entropy(student, labels), batchmean


def given(form, tokens, vocab=V, **options):
    student = torch.randn(tokens, H if form == "head" else vocab, **options)
    return student, torch.randn(tokens, vocab), torch.arange(tokens) % vocab


def assert_same(program, module, arguments):
    for mine, expected in zip(program(*arguments), module(*arguments), strict=True):
        assert torch.equal(mine, expected)
        grads = [torch.autograd.grad(each.sum(), arguments[0])[0] for each in (mine, expected)]
        assert torch.equal(*grads)
        assert not len(arguments[0]) or (expected.norm() > 1e-3 and grads[0].norm() > 1e-3)


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("strict", [False, True])
def test_any_number_of_tokens(form, strict):
    module, shapes = Exported(form), ({0: Dim("tokens", min=0)},) * 3
    example = given(form, 4, requires_grad=True)
    program = export(module, example, dynamic_shapes=shapes, strict=strict).module()
    for tokens in (0, 1, 3, 17):
        assert_same(program, module, given(form, tokens, requires_grad=True))


@pytest.mark.parametrize("strict", [False, True])
def test_any_vocabulary(strict):
    module, vocab = Exported("logits"), Dim("vocab")
    shapes = {1: vocab}, {1: vocab}, None
    program = export(module, given("logits", 4), dynamic_shapes=shapes, strict=strict).module()
    for size in (7, V, 33):
        assert_same(program, module, given("logits", 4, size, requires_grad=True))


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("strict", [False, True])
def test_examples_need_no_gradient(form, strict):
    """A body is trained through the program, whatever its examples required. Losses that were recorded without gradients
    have none, and say so; log-probabilities make theirs in the backward."""
    module, arguments = Exported(form), given(form, 4, requires_grad=True)
    assert_same(export(module, given(form, 4), strict=strict).module(), module, arguments)
    with torch.no_grad():
        program = export(module, given(form, 4), strict=strict).module()
    _, log_probs, *losses = program(*arguments)
    assert not any(loss.requires_grad for loss in losses)
    grads = [torch.autograd.grad(each.sum(), arguments[0])[0] for each in (log_probs, module(*arguments)[1])]
    assert torch.equal(*grads) and grads[0].norm() > 1e-3


def asked_of(node):
    """The ``needs_grad`` of a graph's node, if it is an operator that has one."""
    schema = getattr(node.target, "_schema", None)
    arguments = [] if schema is None else zip(schema.arguments, node.args)
    return [given for argument, given in arguments if argument.name == "needs_grad"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_frozen_parameter_stays_frozen(strict):
    module = Exported("head").requires_grad_(False)
    program = export(module, given("head", 4), strict=strict)
    found = [needs_grad for node in program.graph.nodes for needs_grad in asked_of(node)]
    assert len(found) >= 5 and all(needed[0] and not any(needed[1:3]) for needed in found)
    assert_same(program.module(), module, given("head", 4, requires_grad=True))


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_is_overwritten(strict):
    class InPlace(torch.nn.Module):
        def forward(self, logits, teacher, labels):
            log_probs = kd.token_log_probs(logits, labels, inplace=True).log_probs
            return kd.kl_div(logits, teacher, inplace=True) + log_probs.sum()

    program = export(InPlace(), given("logits", 4), strict=strict).module()
    for learns in (False, True):
        arguments = given("logits", 4, requires_grad=learns)
        before = arguments[0].detach().clone()
        loss = program(*arguments)
        if learns:
            assert torch.autograd.grad(loss, arguments[0])[0].norm() > 0.1
        assert torch.equal(arguments[0], before)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["logits", "head"])
def test_ahead_of_time(form, tmp_path):
    """AOTInductor's shared object, which calls the operators from C++."""
    module, arguments = Exported(form), given(form, 4)
    with torch.no_grad():
        program = export(module, arguments)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "losses.pt2"))
        made = torch._inductor.aoti_load_package(path)(*arguments)
        for mine, expected in zip(made, module(*arguments), strict=True):
            assert relative(mine, expected) < 1e-6
