"""What the benchmarks' commands have in common: their flags, what they say, where they ran."""

import argparse
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    """Parse the value of a flag.

    Raises:
      ArgumentTypeError: it isn't positive.
    """
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def say(words: str) -> None:
    """Tell what goes on."""
    print(f"bench: {words}", file=sys.stderr, flush=True)


def this_machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("apache-beam", "pyarrow", "numpy", "duckdb", "orjson")},
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
