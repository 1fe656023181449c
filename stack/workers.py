"""Beam's worker pool: the processes that run the Python of jobs on Flink."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from stack.service import Service
from stack.settings import HOST, REPOSITORY, StackError


class Workers(Service):
    """The pool; it starts workers as jobs ask for them, and they outlive the driver.

    Workers inherit the environment of `up`, and beneath it the addresses of this
    platform: what jobs name as env:NAME is found there.
    """

    name = "workers"

    @property
    def ports(self) -> dict[str, int]:
        return {"pool": self.settings.port("workers", "pool")}

    def fetch(self) -> None:
        if not self._python.exists():
            raise StackError(f"{self._python} does not exist; make it with `make .venv/.runtime`")

    def prepare(self) -> list[str]:
        pool = Path(__file__).with_name("worker_pool.py")
        return [str(self._python), "-P", str(pool), HOST, str(self.ports["pool"])]

    def environment(self) -> Mapping[str, str]:
        # Beam starts workers as plain `python`.
        path = f"{self._python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return {**self.settings.environment(), **os.environ, "PATH": path}

    def answers(self) -> bool:
        with socket.create_connection((HOST, self.ports["pool"]), timeout=1):
            return True

    @property
    def _python(self) -> Path:
        """The repository's environment; elsewhere the one that runs this."""
        own = REPOSITORY / ".venv/bin/python"
        return own if own.exists() else Path(sys.executable)
