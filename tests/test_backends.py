"""Which backend serves: chosen for a block or from now on, in one thread, for compiled code too."""

import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import Problem
from sparse_problems import SparseProblem

import kdkernels as kd
from kdkernels import reference
from kdkernels.backends import chosen_backend
from kdkernels.core import tiles


@pytest.fixture
def served(monkeypatch):
    """The backends that the operators came to, in order."""
    names = []

    def spy(module, name, of):
        function = getattr(module, name)

        def recorded(*arguments, **options):
            result = function(*arguments, **options)
            names.append(of(result))
            return result

        monkeypatch.setattr(module, name, recorded)

    spy(tiles, "serving", lambda module: module.name)
    spy(reference, "compute", lambda _: "reference")
    return names


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_call_holds_until_the_next_one(served):
    before = chosen_backend()
    choice = kd.use_backend("eager")
    del choice
    gc.collect()
    kd.kl_div(torch.randn(2, 5), torch.randn(2, 5))
    assert served == ["eager"] and kd.explain(torch.randn(2, 5)).startswith("eager: serves")
    kd.use_backend("auto")
    assert chosen_backend() == before


def test_a_block_ends_its_choice():
    with kd.use_backend("eager"):
        with kd.use_backend("reference"):
            assert chosen_backend() == "reference"
        assert chosen_backend() == "eager"
        kd.use_backend("reference")  # inside a block it lasts as long as the block
    assert chosen_backend() == "auto"
    with pytest.raises(ZeroDivisionError), kd.use_backend("eager"):
        raise ZeroDivisionError
    assert chosen_backend() == "auto"


def test_an_unknown_name_is_an_error_at_once(monkeypatch):
    with pytest.raises(ValueError, match="'cuda'.*native, triton, eager, reference"):
        kd.use_backend("cuda")
    assert chosen_backend() == "auto"
    monkeypatch.setenv("KDKERNELS_BACKEND", "bogus")
    with pytest.raises(ValueError, match="^KDKERNELS_BACKEND: unknown backend 'bogus'; .*eager"):
        kd.kl_div(torch.randn(2, 5), torch.randn(2, 5))
    monkeypatch.setenv("KDKERNELS_BACKEND", "")
    assert chosen_backend() == "auto"


def test_threads_choose_for_themselves():
    """A enters, B enters, A leaves, B leaves: neither sees the other, and nothing stays behind."""
    entered, seen = threading.Barrier(2, timeout=10), {}

    def thread(name, first):
        seen[name] = [chosen_backend()]
        if not first:
            entered.wait()  # A has entered
        with kd.use_backend(name):
            if first:
                entered.wait()
            entered.wait()  # B has entered
            seen[name].append(chosen_backend())
            if not first:
                entered.wait()  # A has left
        if first:
            entered.wait()
        seen[name].append(chosen_backend())

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(thread, "eager", True), pool.submit(thread, "reference", False)]:
            future.result()
    assert seen == {"eager": ["auto", "eager", "auto"], "reference": ["auto", "reference", "auto"]}
    assert chosen_backend() == "auto"
    with kd.use_backend("eager"):
        assert in_thread(chosen_backend) == "auto"


@pytest.mark.parametrize("compiled", [False, True])
def test_the_backward_uses_what_the_forward_used(served, compiled):
    """On CUDA autograd's own threads run it; here any other thread, after the choice has ended."""
    torch._dynamo.reset()
    problem = Problem(student="head")
    leaves = [t.clone().requires_grad_() for t in problem.student]
    loss = lambda *s: kd.kl_div(problem.side(s), problem.teacher[0], problem.labels, reduction="none")  # noqa: E731
    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    with kd.use_backend("eager"):
        value = run(*leaves).sum()
    assert served == ["eager"]
    grads = in_thread(lambda: torch.autograd.grad(value, leaves))
    assert served == ["eager", "eager"] and all(g.norm() > 1e-3 for g in grads)


CALLS = {
    "logits": ({}, dict(hard_weight=0.3)),
    "head": (dict(student="head", teacher="head", softcap=20.0, logit_scale=0.5), dict(hard_weight=0.3)),
    "deferred": (dict(student="head"), dict(reduction="none")),
    "inplace": ({}, dict(inplace=True, vocab_size=250)),
    "sparse": (dict(tail="bucket"), dict(hard_weight=0.3)),
    "co": (dict(student="head", teacher="head"), {}),
}


@pytest.mark.parametrize("case", CALLS)
def test_compiled_code_asks_when_it_runs(served, case):
    torch._dynamo.reset()
    given, options = CALLS[case]
    problem = SparseProblem(**given) if case == "sparse" else Problem(**given)
    trained = problem.student + (problem.teacher if case == "co" else [])

    def loss(*leaves):
        student = problem.side([t * 1 for t in leaves[: len(problem.student)]])
        if case == "co":
            losses = kd.codistillation_loss(
                student, problem.side(leaves[len(problem.student) :]), problem.labels, divergence=kd.JSD(0.3)
            )
            return losses.student + 2 * losses.teacher
        return kd.distillation_loss(
            student,
            problem.side(problem.teacher),
            problem.labels,
            divergence=kd.JSD(0.3),
            temperature=1.5,
            **options,
        )

    def result(function):
        leaves = [t.clone().requires_grad_() for t in trained]
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value.sum() * 2, leaves)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    result(compiled)
    for name in ("eager", "reference", "auto"):
        served.clear()
        with kd.use_backend(name):
            mine, expected = result(compiled), result(loss)
        count = 2 if case == "deferred" else 1
        assert served[:count] == [name if name != "auto" else served[0]] * count
        assert name != "auto" or served[0] != "reference"
        for a, b in zip(mine, expected, strict=True):
            assert b.norm() > 1e-6
            # The same arithmetic: but for the order of a sum, bit for bit.
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_choosing_inside_compiled_code_is_not_compiled(served):
    torch._dynamo.reset()
    s, t = torch.randn(2, 5), torch.randn(2, 5)

    def loss(x):
        with kd.use_backend("eager"):
            return kd.kl_div(x, t)

    assert torch.equal(torch.compile(loss, backend="eager")(s), loss(s)) and set(served) == {"eager"}
    torch._dynamo.reset()
    with pytest.raises(Exception, match="around the compiled function"):
        torch.compile(loss, backend="eager", fullgraph=True)(s)
    assert chosen_backend() == "auto"


def test_explain_refuses_what_no_loss_takes():
    s = torch.randn(2, 5)
    assert "serves this call" in kd.explain(s, torch.randn(2, 7), vocab_size=5)
    with pytest.raises(ValueError, match="student has vocabulary 5, teacher 7"):
        kd.explain(s, torch.randn(2, 7))
    with pytest.raises(TypeError, match="divergence must be a kd.Divergence"):
        kd.explain(s, s, divergence="kl")
    with pytest.raises(TypeError, match="student must be a Tensor of logits"):
        kd.explain(kd.top_k_target(s, 2))


def test_a_missing_native_backend_is_said_once_at_import():
    code = "import sys; sys.modules['kdkernels._C'] = None; import kdkernels, kdkernels.backends.native"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("UserWarning: kdkernels._C is not built") == 1, (
        done.stderr
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import kdkernels"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
