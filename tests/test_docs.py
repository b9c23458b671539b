"""What README and docs say: examples run, pages build, and every public name is documented whole."""

import ast
import doctest
import inspect
import re
import subprocess
import sys

import pytest
from trainer_runs import ROOT

import kdkernels as kd

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What a docstring may say instead of its parameters and errors: whose they are.
POINTS = re.compile(
    r"(options|arguments|errors)\b[^.]*(as in|as of|are|kept|as)\b|with its (options|arguments)"
)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_say_what_they_print(page):
    """Sessions (``>>>``) run, a page's blocks one after the other; other Python at least parses."""
    session = "\n".join(blocks(page, "pycon"))
    test = doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0)
    report = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert report.failed == 0 and report.attempted == session.count(">>> ")
    for code in blocks(page, "python"):
        ast.parse(inspect.cleandoc(code))


def test_the_faq_shows_twenty_mistakes():
    assert (ROOT / "docs" / "faq.md").read_text().count("Error: ") >= 20


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 125


def test_pages_build(tmp_path):
    """Every link, every page of the API. Not with --quiet, under which --strict counts no warning."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ">>>" in (tmp_path / "api" / "index.html").read_text().replace("&gt;", ">")


PUBLIC = [name for name in kd.__all__ if callable(getattr(kd, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_whole(name):
    """An example, every parameter, and what is raised: there, or in the function that it points to."""
    thing = getattr(kd, name)
    said = inspect.getdoc(thing) or ""
    assert ">>> " in said, "an example"
    says_of_tensors(thing, said)
    if is_record(thing):
        return
    own = [p for p in inspect.signature(thing).parameters if p not in ("options", "args", "kwargs")]
    points = POINTS.search(said)
    assert points or [p for p in own if not re.search(rf"\b{p}\b", said)] == [], "its parameters"
    assert points or not own or re.search(r"Raises|Error", said), "what it raises"
    if isinstance(thing, type) and issubclass(thing, kd.Divergence) and own:
        assert re.search(r"arXiv|\((?:19|20)\d\d\)", said), "where the formula comes from"


SHAPE = re.compile(r"``\[[^\]]+\]``|\bscalars?\b|\bshapes?\b")
DTYPE = re.compile(r"fp64|fp32|int64|floating|dtype")
UNIT = re.compile(r"\bnats\b|log-probabilit|\blogits\b|bytes")


def says_of_tensors(thing, said):
    """Shapes, dtypes and units of what is tensors: there, or in the function that it points to."""
    prose, own = said.split(">>>")[0], inspect.signature(thing)
    types = [str(p.annotation) for p in own.parameters.values()] + [str(own.return_annotation)]
    types += [str(field) for field in vars(thing).get("__annotations__", {}).values()]
    if not re.search("Tensor|Logits|Teacher|Head", " ".join(types)) or POINTS.search(said):
        return
    for what, pattern in (("shapes", SHAPE), ("dtypes", DTYPE), ("units", UNIT)):
        assert pattern.search(prose), f"its {what}"


def is_record(thing):
    """What is returned and not made by a user."""
    return isinstance(thing, type) and issubclass(thing, tuple)


def test_every_public_name_is_in_the_api():
    page = (ROOT / "docs" / "api.md").read_text()
    paths = {f"{getattr(kd, name).__module__}.{name}" for name in PUBLIC}
    listed = set(re.findall(r"^::: (\S+)", page, re.M))
    missing = [name for name in PUBLIC if f"kdkernels.{name}" not in listed and not paths & listed]
    assert missing == []
