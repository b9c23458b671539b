"""``python -m kdkernels COMMAND``: each command is a module with a ``main(arguments)``."""

from __future__ import annotations

import argparse
import importlib
import io
import sys

from .backends import chosen_backend, native

#: Command -> (module, what it does). Imported when called: a command may need an extra.
COMMANDS = {
    "info": ("kdkernels.commands.info", "which backends are usable here, and why the others are not"),
    "verify": (
        "kdkernels.commands.verify",
        "every usable backend against the fp64 oracle: errors, exit code",
    ),
    "train": (
        "kdkernels.commands.train",
        "soft, hard, co- or on-policy distillation of a language model, or all beside each other (needs kdkernels[trainer])",
    ),
    "cache": (
        "kdkernels.commands.cache",
        "a teacher's top-k or samples on disk (needs kdkernels[cache])",
    ),
    "make-student": (
        "kdkernels.commands.make_student",
        "a smaller model from a trained one, without some layers (needs kdkernels[trainer])",
    ),
}


def main(arguments: list[str]) -> None:
    lines = "\n".join(f"  {name:<13} {what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels",
        usage="%(prog)s COMMAND [-h] ...",
        epilog=f"commands:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    command = parser.parse_args(arguments[:1]).command
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a path's name ends no run
            stream.reconfigure(errors="backslashreplace")
    try:
        chosen_backend()
        native.instruction_set()
    except (ValueError, RuntimeError) as error:
        if command != "info" or isinstance(error, ValueError):  # it says what is not usable, and why
            sys.exit(f"error: {error}")
    importlib.import_module(COMMANDS[command][0]).main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
