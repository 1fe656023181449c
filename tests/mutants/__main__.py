"""The command: `python -m tests.mutants`, or `make mutants`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.run import KILLED, judged, read, table

_HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """Judge mutants; returns the exit code: 0 all are killed, 1 some aren't, 2 misuse."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description="Plant each defect of tests/mutants, and see the test that it names fail.",
    )
    parser.add_argument(
        "patches", nargs="*", type=Path, metavar="PATCH", help="only these (default: all)"
    )
    parser.add_argument("--root", type=Path, default=_HERE.parents[1], help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    try:
        mutants = [read(patch) for patch in flags.patches or sorted(_HERE.glob("*.patch"))]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    began = time.monotonic()
    verdicts = judged(
        flags.root, mutants, os.cpu_count() or 1, lambda line: print(line, flush=True)
    )
    killed = sum(each.outcome == KILLED for each in verdicts)
    print("", *table(verdicts), sep="\n")
    print(f"\n{killed} of {len(verdicts)} killed, in {time.monotonic() - began:.0f} s")
    return 0 if killed == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
