"""What all services share: how one starts, is found healthy, and stops."""

import contextlib
import os
import shutil
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from stack.process import Process
from stack.settings import HOST, Settings, StackError

_POLL_S = 0.1
_TAIL_LINES = 25
_LINE_CHARACTERS = 400


class Service(ABC):
    """One process of the platform, with a folder, ports, a log and a health check."""

    name: ClassVar[str]
    # Only what runs and stays silent waits that long: what dies is noticed at once.
    start_timeout_s: ClassVar[float] = 180
    stop_timeout_s: ClassVar[float] = 30
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def ports(self) -> dict[str, int]:
        """Where it listens; the first one is what its clients connect to. Others it may choose."""

    @abstractmethod
    def fetch(self) -> None:
        """Get hold of its release."""

    @abstractmethod
    def prepare(self) -> list[str]:
        """Write configuration and empty data, and return the command that starts it."""

    @abstractmethod
    def answers(self) -> bool:
        """Ask the server itself whether it serves. Any OSError means no."""

    def furnish(self) -> None:  # noqa: B027 (most have nothing to add)
        """Create topics, users, tables: whatever is missing."""

    def environment(self) -> Mapping[str, str]:
        """Return the variables its process gets."""
        return os.environ

    @property
    def folder(self) -> Path:
        """Where its data, log and process id lie."""
        return self.settings.home / self.name

    @property
    def log(self) -> Path:
        """What it wrote since its last start; `log.1` beside it has the start before."""
        return self.folder / "log"

    @property
    def process(self) -> Process | None:
        """The process of the last start, dead or alive; None after it was stopped."""
        return Process.find(self._pid_file)

    @property
    def pid(self) -> int | None:
        """Its process id, if it runs."""
        process = self.process
        return process.pid if process and process.alive else None

    @property
    def healthy(self) -> bool:
        """Whether it runs and serves."""
        with contextlib.suppress(OSError):
            return self.pid is not None and self.answers()
        return False

    def up(self) -> str:
        """Start it unless it runs, and wait until it serves.

        Returns:
          What was found or done, in two words or three.

        Raises:
          StackError: it doesn't serve; the message ends with the tail of its log.
        """
        if self.pid is not None:
            self._await("runs, but gives no answer")
            self._furnish()
            return "runs already"
        begin = time.monotonic()
        self.fetch()
        fetched_s = time.monotonic() - begin
        self.folder.mkdir(parents=True, exist_ok=True)
        if process := self.process:
            process.kill()  # what a crash of the leader left of its group
        self._require_free_ports()
        command = self.prepare()
        if self.log.exists():
            self.log.rename(self.folder / "log.1")
        Process.start(command, self.environment(), self.log, self._pid_file)
        self._await("gave no answer")
        self._furnish()
        started_s = time.monotonic() - begin - fetched_s
        download = f", download {fetched_s:.1f} s" if fetched_s > 1 else ""
        return f"started in {started_s:.1f} s{download}"

    def down(self) -> str:
        """Stop it and all its children.

        Returns:
          What was found or done, in two words or three.
        """
        process = self.process
        if not process or not process.members:
            self._pid_file.unlink(missing_ok=True)
            return "was not running"
        begin = time.monotonic()
        graceful = process.stop(self.stop_signal, self.stop_timeout_s)
        self._pid_file.unlink(missing_ok=True)
        return f"{'stopped' if graceful else 'killed'} in {time.monotonic() - begin:.1f} s"

    def kill(self) -> None:
        """End it with all its children as a crash would.

        Raises:
          StackError: it doesn't run.
        """
        if self.pid is None:
            raise StackError(f"{self.name} can't be killed: it does not run")
        self.process.kill()

    def clean(self) -> None:
        """Remove its data and log."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the end of its log."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - lines * _LINE_CHARACTERS))
            text = log.read().decode(errors="replace")
        return "\n".join(line[:_LINE_CHARACTERS] for line in text.splitlines()[-lines:])

    @property
    def _pid_file(self) -> Path:
        return self.folder / "pid"

    def _furnish(self) -> None:
        try:
            self.furnish()
        except StackError:
            raise
        except Exception as error:  # of whichever client library
            raise StackError(self._failure(f"answers, but refused its set-up ({error})")) from error

    def _await(self, failure: str) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while not self.healthy:
            if self.pid is None:
                raise StackError(self._failure("ended while starting"))
            if time.monotonic() > deadline:
                raise StackError(self._failure(f"{failure} within {self.start_timeout_s:.0f} s"))
            time.sleep(_POLL_S)

    def _failure(self, what: str) -> str:
        tail = self.tail().replace("\n", "\n  ")
        return f"{self.name} {what}; the end of {self.log}:\n  {tail}"

    def _require_free_ports(self) -> None:
        for name, port in self.ports.items():
            with socket.socket() as probe:
                # As servers do: what closed connections left behind is no obstacle.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except OSError as error:
                    raise StackError(
                        f"{self.name} needs port {port} ({name}), but another program has it "
                        f"({error.strerror}); STACK_PORT_OFFSET=1000 moves all ports by 1000"
                    ) from error
