"""``python -m kdkernels train MODE``: the command. Everything that a user can put right is one line."""

from __future__ import annotations

import argparse
import atexit
import sys
from typing import Any

import torch.distributed

from . import say_at_exit


def main(arguments: list[str]) -> None:
    from transformers.utils import logging

    from ..trainer.command_line import parse
    from ..trainer.errors import UserError
    from ..trainer.settings import MODES

    logging.disable_progress_bar()  # those of loading and writing models; training has its own

    modes = "\n".join(f"  {name:<9} {what}" for name, what in MODES.items())
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels train",
        usage="%(prog)s MODE --output_dir DIR [--config FILE.yaml] [options]",
        epilog=f"modes:\n{modes}\n\n%(prog)s MODE --help shows a mode's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mode", choices=MODES, metavar="MODE", help="one of the modes below")
    mode = parser.parse_args(arguments[:1] or ["--help"]).mode
    settings = None
    try:
        settings = parse(mode, arguments[1:])
        if mode == "compare":
            from ..trainer.compare import compare

            compare(settings)
        else:
            from ..trainer.train import run

            run(settings)
            atexit.register(leave_group)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        say_at_exit(f"interrupted{going_on(settings)}")
        raise


def going_on(settings: Any) -> str:
    """How an interrupted command is gone on with, if it can be."""
    from ..trainer.reliable import checkpoints

    if settings is None:
        return ""
    if settings.mode == "compare":
        return "; the same command goes on with it"
    resumable = not settings.run.save_only_model and settings.model.tensor_parallel == 1
    return "; --resume goes on with it" if resumable and checkpoints(settings.output_dir) else ""


def leave_group() -> None:
    """Destroys the process group at the end of a process whose runs went well.

    Otherwise a thread of the group may report that a peer has closed its connection. After an error this is not
    called: the other processes may be waiting in a collective, and this one would wait for them.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
