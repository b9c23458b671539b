"""``python -m tests.fuzz``: random calls until the time is over; the seed and call of each failure."""

import argparse
import os
import sys
import time
from pathlib import Path

if "triton" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path.append(str(Path(__file__).parents[1] / "support"))
    import interpreter  # noqa: F401

from . import BACKENDS, judge  # noqa: E402

parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
parser.add_argument("--backend", choices=BACKENDS, default="native")
parser.add_argument("--seconds", type=float, default=60.0)
parser.add_argument("--first", type=int, default=0, help="the first seed; each call has the next one")
parser.add_argument("--only", type=int, help="this seed alone")
args = parser.parse_args()

seed, failed, end = args.first, 0, time.monotonic() + args.seconds
if args.only is not None:
    judge.check(args.only, args.backend, BACKENDS[args.backend])
    sys.exit()
while time.monotonic() < end:
    try:
        judge.check(seed, args.backend, BACKENDS[args.backend])
    except AssertionError as error:
        failed += 1
        print(error, flush=True)
    seed += 1
print(f"{seed - args.first} calls on {args.backend} from seed {args.first}, {failed} failed")
sys.exit(failed > 0)
