"""The option of ``pytest benchmarks``."""

from benchmarks.cases import SUITES

#: Commands that need Triton to be imported at all; there is nothing in them to collect.
collect_ignore_glob = ["*_triton.py"]


def pytest_addoption(parser):
    parser.addoption("--suite", default="small", choices=SUITES, help="which cases to time; gpu needs one")
