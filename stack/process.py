"""A process that outlives who started it, found again by its id and start time."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.05
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """A session leader and the processes of its group.

    Args:
      pid: Its process id, which is also the id of its group.
      started: When it started, in clock ticks since boot: a process that was given the
        same id later has another.
    """

    pid: int
    started: int

    @classmethod
    def start(
        cls, command: Sequence[str], environment: Mapping[str, str], log: Path, pid_file: Path
    ) -> "Process":
        """Start a command in a session of its own; its output is appended to `log`."""
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = _stat(popen.pid).started
        # Reaped at once when it ends, so that a dead one is never taken for a zombie.
        threading.Thread(target=popen.wait, daemon=True).start()
        process = cls(popen.pid, started)
        pid_file.write_text(f"{process.pid} {process.started}\n")
        return process

    @classmethod
    def find(cls, pid_file: Path) -> "Process | None":
        """Return the process a file tells of, dead or alive; None if it tells of none."""
        try:
            pid, started = map(int, pid_file.read_text().split())
        except (FileNotFoundError, ValueError):
            return None
        return cls(pid, started)

    @property
    def alive(self) -> bool:
        """Whether the leader runs."""
        try:
            stat = _stat(self.pid)
        except ProcessLookupError:
            return False
        return stat.started == self.started and not stat.ended

    @property
    def members(self) -> list[int]:
        """The living processes of the group: the leader, if it lives, and its children.

        An id isn't given out again while it names a group: as long as no other process
        has the leader's, the group is ours.
        """
        with contextlib.suppress(ProcessLookupError):
            if _stat(self.pid).started != self.started:
                return []
        members = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(ProcessLookupError):
                if entry.isdigit():
                    stat = _stat(int(entry))
                    if stat.group == self.pid and not stat.ended:
                        members.append(int(entry))
        return sorted(members)

    @property
    def resident_bytes(self) -> int:
        """The memory of the group."""
        total = 0
        for pid in self.members:
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
        return total

    @property
    def age_s(self) -> float:
        """Seconds since it started."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.started / _TICKS_PER_S

    def kill(self) -> None:
        """End the whole group at once, as a crash would, and wait until it is gone."""
        self._signal(signal.SIGKILL)
        self._wait(30)

    def stop(self, stop_signal: signal.Signals, timeout_s: float) -> bool:
        """Ask the group to end, and make it after a while.

        The leader is asked alone: what it started is its own to end.

        Returns:
          Whether it ended by itself.
        """
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, stop_signal)
            deadline = time.monotonic() + timeout_s
            while self.alive and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        graceful = not self.alive
        if self.members:
            self._signal(signal.SIGTERM if graceful else signal.SIGKILL)
            if not self._wait(5):
                self.kill()
        return graceful

    def _signal(self, number: signal.Signals) -> None:
        if self.members:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _wait(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.members:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


@dataclass(frozen=True)
class _Stat:
    state: str
    group: int
    threads: int
    started: int

    @property
    def ended(self) -> bool:
        """Whether only its entry is left: while a thread lives, so do its open ports."""
        return self.state in "ZX" and self.threads <= 1


def _stat(pid: int) -> _Stat:
    """Read what the kernel says of a process (proc(5), /proc/PID/stat)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(pid) from None
    # The second field is the command's name in brackets, and may hold any character.
    fields = text.rpartition(")")[2].split()
    return _Stat(
        state=fields[0], group=int(fields[2]), threads=int(fields[17]), started=int(fields[19])
    )
