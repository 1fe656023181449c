"""Where a platform lives, which ports it takes, and what it is made of."""

import os
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

REPOSITORY = Path(__file__).parent.parent
HOST = "127.0.0.1"


class StackError(Exception):
    """Something the person at the keyboard has to know; the message says what to do."""


def versions() -> dict[str, Any]:
    """Return what `versions.toml` says."""
    return tomllib.loads((Path(__file__).parent / "versions.toml").read_text())


@dataclass(frozen=True)
class Settings:
    """One platform.

    Args:
      home: Folder of its data, logs and process ids.
      cache: Folder of downloads, shared by all platforms.
      port_offset: Added to every port, so that two platforms can run side by side.
      small: Take the memory figures for a machine of 8 GiB.
      postgres_password: Of the pipelines' own user; the superuser has none and is
        reachable through a Unix socket only.

    Raises:
      StackError: a port would lie outside 1024 to 32767. Above, Linux gives them to
        whoever opens a connection, and a server finds its own taken now and then.
    """

    home: Path
    cache: Path
    port_offset: int = 0
    small: bool = False
    postgres_password: str = "activity"

    def __post_init__(self) -> None:
        ports = [port for part in versions().values() for port in part.get("ports", {}).values()]
        for port in (min(ports) + self.port_offset, max(ports) + self.port_offset):
            if not 1024 <= port <= 32767:
                raise StackError(
                    f"a port offset of {self.port_offset} leads to port {port}; choose one "
                    f"between {1024 - min(ports)} and {32767 - max(ports)}"
                )

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Return the settings that STACK_… and POSTGRES_PASSWORD ask for."""
        offset = environment.get("STACK_PORT_OFFSET") or "0"
        try:
            port_offset = int(offset)
        except ValueError:
            raise StackError(
                f"STACK_PORT_OFFSET={offset!r} is not a whole number; e.g. 1000"
            ) from None
        return cls(
            home=Path(environment.get("STACK_HOME") or REPOSITORY / ".stack").resolve(),
            cache=Path(
                environment.get("STACK_CACHE") or Path.home() / ".cache/beam_pipelines"
            ).resolve(),
            port_offset=port_offset,
            small=environment.get("STACK_SMALL", "") not in ("", "0"),
            postgres_password=environment.get("POSTGRES_PASSWORD") or "activity",
        )

    def of(self, part: str) -> dict[str, Any]:
        """Return a part of `versions.toml`, its memory figures those of this machine."""
        values = dict(versions()[part])
        small = values.pop("small", {})
        return {**values, **small} if self.small else values

    def port(self, part: str, name: str) -> int:
        """Return where a part listens in this platform."""
        return self.of(part)["ports"][name] + self.port_offset

    def environment(self) -> dict[str, str]:
        """Return the variables by which pipelines and tools find this platform."""
        postgres, cassandra = self.of("postgres"), self.of("cassandra")
        return {
            "KAFKA_BOOTSTRAP_SERVERS": f"{HOST}:{self.port('kafka', 'broker')}",
            "ACTIVITY_DATABASE_URL": (
                f"postgresql://{postgres['user']}:{quote(self.postgres_password, safe='')}"
                f"@{HOST}:{self.port('postgres', 'sql')}/{postgres['database']}"
            ),
            "CASSANDRA": f"{HOST}:{self.port('cassandra', 'native')}/{cassandra['keyspace']}",
            "FLINK_MASTER": f"{HOST}:{self.port('flink', 'rest')}",
            "BEAM_WORKER_POOL": f"{HOST}:{self.port('workers', 'pool')}",
            "LAKE": str(self.home / "lake"),
        }

    def exports(self) -> str:
        """Return the same as lines for a shell's `eval`."""
        return "".join(
            f"export {name}={shlex.quote(value)}\n" for name, value in self.environment().items()
        )
