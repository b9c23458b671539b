"""The commands of ``python -m kdkernels``; :mod:`kdkernels.__main__` lists them."""

from __future__ import annotations

import sys


def say_at_exit(line: str) -> None:
    """Of the exception that ends this process, in the place of its traceback. After a KeyboardInterrupt Python ends itself
    by SIGINT, so that a shell's loop ends too."""
    sys.excepthook = lambda *_: print(line, file=sys.stderr)
