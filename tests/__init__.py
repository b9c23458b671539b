"""A package, so that ``python -m tests.fuzz`` finds it: a library that installs a ``tests`` of its own would hide it."""
