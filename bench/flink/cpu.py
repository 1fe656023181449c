"""What processes use of the cores: services with all they started, and everybody else."""

import os
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

OTHERS = "others"
"""Everything on the machine that is not measured: it should be idle."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


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
        children: defaultdict[int, list[int]] = defaultdict(list)
        ticks: dict[int, int] = {}
        for entry in proc.glob("[0-9]*/stat"):
            try:
                text = entry.read_text()
            except OSError:  # it ended just now
                continue
            pid, fields = int(entry.parent.name), text.rpartition(")")[2].split()
            children[int(fields[1])].append(pid)
            ticks[pid] = sum(map(int, fields[11:15]))  # its own, and of children that ended
        seconds = {
            name: sum(ticks.get(pid, 0) for pid in _family(leader, children)) / _TICKS_PER_S
            for name, leader in self.leaders.items()
        }
        busy = _busy_ticks((proc / "stat").read_text()) / _TICKS_PER_S
        return Used(time.monotonic(), {**seconds, OTHERS: busy - sum(seconds.values())})


def _family(leader: int, children: Mapping[int, list[int]]) -> list[int]:
    found = [leader]
    for pid in found:
        found += children.get(pid, [])
    return found


def _busy_ticks(stat: str) -> int:
    user, nice, system, _idle, _wait, interrupts, soft = map(int, stat.split()[1:8])
    return user + nice + system + interrupts + soft
