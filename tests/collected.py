"""What pytest finds under the ids of tests."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def missing(ids: Iterable[str]) -> set[str]:
    """Return those of some tests' ids (`file::name`) that pytest doesn't collect."""
    asked = set(ids)
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "--servers", *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = [line for line in listed.stdout.splitlines() if "::" in line]
    return asked - {name for line in found for name in (line, line.partition("[")[0])}
