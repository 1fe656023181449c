"""What processes listen at, as the kernel tells it (proc(5))."""

import contextlib
import ipaddress
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_LISTEN = "0A"


class Listening(NamedTuple):
    """A TCP socket that takes connections, and the process that holds it."""

    pid: int
    command: str
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @property
    def is_here_only(self) -> bool:
        """Whether nobody but this machine reaches it: 127.0.0.0/8 or ::1."""
        mapped = getattr(self.address, "ipv4_mapped", None)
        return (mapped or self.address).is_loopback


def listening(pids: Iterable[int]) -> list[Listening]:
    """Return where these processes and all their descendants listen."""
    found, places = [], _places()
    for pid in sorted(_with_descendants(pids)):
        for inode in _sockets(pid):
            found += [Listening(pid, _command(pid), *each) for each in places.get(inode, ())]
    return found


def parsed(table: str) -> Iterator[tuple[str, tuple[ipaddress.IPv4Address, int]]]:
    """Read a table like /proc/net/tcp: yields (inode, (address, port)) of listeners.

    An address is written as 32-bit words in the byte order of the machine.
    """
    for line in table.splitlines()[1:]:
        fields = line.split()
        local, state = fields[1], fields[3]
        if state != _LISTEN:
            continue
        spelled, port = local.split(":")
        words = [bytes.fromhex(spelled[i : i + 8])[::-1] for i in range(0, len(spelled), 8)]
        yield fields[9], (ipaddress.ip_address(b"".join(words)), int(port, 16))


def _command(pid: int) -> str:
    """Return how a process was started, without the long lists of Java's options."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        return " ".join(word for word in words if not word.startswith("-"))[:300]
    return "(ended)"


def _places() -> dict[str, list]:
    places: dict[str, list] = {}
    for name in ("tcp", "tcp6"):
        path = Path("/proc/net", name)
        for inode, place in parsed(path.read_text()) if path.exists() else ():
            places.setdefault(inode, []).append(place)
    return places


def _sockets(pid: int) -> set[str]:
    inodes = set()
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{number}")
            except OSError:  # closed meanwhile
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    except FileNotFoundError:  # ended meanwhile
        pass
    return inodes


def _with_descendants(pids: Iterable[int]) -> set[int]:
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found
