"""Options of ``pytest benchmarks``."""

from benchmarks.cases import SUITES


def pytest_addoption(parser):
    parser.addoption("--suite", default="small", choices=SUITES, help="which cases to time")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))
