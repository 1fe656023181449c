"""What processes use of cores and memory: services with all they started, and everybody else."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

OTHERS = "others"
"""Everything on the machine that is not measured: it should be idle."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Used(NamedTuple):
    """CPU seconds by name, up to a moment."""

    at_s: float
    seconds: dict[str, float]

    def since(self, before: "Used") -> dict[str, float]:
        """Return cores in use by name, on average since then; the largest first."""
        wall_s = self.at_s - before.at_s
        cores = {
            name: max(used - before.seconds.get(name, 0.0), 0.0) / wall_s
            for name, used in self.seconds.items()
        }
        return dict(sorted(cores.items(), key=lambda item: -item[1]))


class CpuClock:
    """Reads the CPU time of processes and all that descends from them.

    Args:
      leaders: Process id by name.
    """

    def __init__(self, leaders: Mapping[str, int]) -> None:
        self.leaders = dict(leaders)

    def read(self, proc: Path = Path("/proc")) -> Used:
        """Return the CPU seconds so far, `OTHERS` among them."""
        # Its own, and of children that ended.
        ticks = _by_leader(self.leaders, proc, lambda fields: sum(map(int, fields[11:15])))
        seconds = {name: used / _TICKS_PER_S for name, used in ticks.items()}
        busy = _busy_ticks((proc / "stat").read_text()) / _TICKS_PER_S
        return Used(time.monotonic(), {**seconds, OTHERS: busy - sum(seconds.values())})


def resident_bytes(leaders: Mapping[str, int], proc: Path = Path("/proc")) -> dict[str, int]:
    """Return the resident memory of processes and all that descends from them.

    Pages that processes share count once for each.
    """
    pages = _by_leader(leaders, proc, lambda fields: int(fields[21]))
    return {name: count * _PAGE_BYTES for name, count in pages.items()}


def _by_leader(
    leaders: Mapping[str, int], proc: Path, figure: Callable[[list[str]], int]
) -> dict[str, int]:
    """Sum a figure over each leader's family; it is given a line of `stat` after the name."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    figures: dict[int, int] = {}
    for entry in proc.glob("[0-9]*/stat"):
        try:
            text = entry.read_text()
        except OSError:  # it ended just now
            continue
        pid, fields = int(entry.parent.name), text.rpartition(")")[2].split()
        children[int(fields[1])].append(pid)
        figures[pid] = figure(fields)
    return {
        name: sum(figures.get(pid, 0) for pid in _family(leader, children))
        for name, leader in leaders.items()
    }


def _family(leader: int, children: Mapping[int, list[int]]) -> list[int]:
    found = [leader]
    for pid in found:
        found += children.get(pid, [])
    return found


def _busy_ticks(stat: str) -> int:
    user, nice, system, _idle, _wait, interrupts, soft = map(int, stat.split()[1:8])
    return user + nice + system + interrupts + soft
