"""The services together: which there are, and in which order they come and go."""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from stack.cassandra import Cassandra
from stack.flink import JobManager, TaskManager
from stack.kafka import Kafka
from stack.postgres import Postgres
from stack.service import Service
from stack.settings import Settings, StackError
from stack.workers import Workers

# In the order of starting; stopped in the reverse.
SERVICES: tuple[type[Service], ...] = (
    Kafka,
    Postgres,
    Cassandra,
    JobManager,
    TaskManager,
    Workers,
)
ALIASES = {"flink": ("flink-jobmanager", "flink-taskmanager")}


class Stack:
    """One platform.

    Args:
      home, port_offset, small: See `Settings`; what isn't given is taken from the
        environment, as the command does.
      say: Is given a line for each thing done.
    """

    def __init__(
        self,
        home: Path | None = None,
        port_offset: int | None = None,
        small: bool | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        given = {"home": home and Path(home).resolve(), "port_offset": port_offset, "small": small}
        self.settings = replace(
            Settings.of_environment(),
            **{name: value for name, value in given.items() if value is not None},
        )
        self._say = say
        self._services = {each.name: each(self.settings) for each in SERVICES}

    def service(self, name: str) -> Service:
        """Return a service by name."""
        (service,) = self.services((name,))
        return service

    def services(self, names: Iterable[str] = ()) -> list[Service]:
        """Return the named services in the order of starting; without names, all.

        Raises:
          StackError: a name is unknown.
        """
        wanted: set[str] = set()
        for name in names:
            if name not in self._services and name not in ALIASES:
                known = ", ".join((*self._services, *ALIASES))
                raise StackError(f"there is no service {name!r}; there are {known}")
            wanted.update(ALIASES.get(name, (name,)))
        return [each for name, each in self._services.items() if not wanted or name in wanted]

    def up(self, *names: str) -> None:
        """Start services, all at once, and wait until each one serves.

        Raises:
          StackError: some don't; the others run.
        """
        services = self.services(names)
        with self._alone():
            self._each(services, lambda service: service.up())

    def down(self, *names: str) -> None:
        """Stop services, the last started first."""
        with self._alone():
            for service in reversed(self.services(names)):
                self._say(f"{service.name:<18} {service.down()}")

    def kill(self, name: str) -> None:
        """End a service as a crash would.

        Raises:
          StackError: it doesn't run.
        """
        for service in reversed(self.services((name,))):
            service.kill()

    def clean(self, *names: str) -> None:
        """Stop services and remove their data; without names, the lake's too."""
        self.down(*names)
        with self._alone():
            for service in self.services(names):
                service.clean()
            if not names:
                shutil.rmtree(self.settings.home / "lake", ignore_errors=True)

    def _each(self, services: list[Service], act: Callable[[Service], str]) -> None:
        def tell(service: Service) -> None:
            self._say(f"{service.name:<18} {act(service)}")

        with ThreadPoolExecutor(max_workers=max(1, len(services))) as threads:
            futures = [threads.submit(tell, service) for service in services]
        failures = []
        for future in futures:
            try:
                future.result()
            except StackError as error:
                failures.append(str(error))
        if failures:
            raise StackError("\n".join(failures))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for other commands on the same platform."""
        self.settings.home.mkdir(parents=True, exist_ok=True)
        with (self.settings.home / "lock").open("w") as lock:
            waiting_since = time.monotonic()
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (waited_s := time.monotonic() - waiting_since) > 1:
                self._say(f"waited {waited_s:.0f} s for another command on {self.settings.home}")
            yield
