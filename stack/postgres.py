"""Postgres, from the binaries that embedded servers use."""

import contextlib
import os
import platform
import pwd
import signal
import time
from pathlib import Path

from stack.downloads import release, run
from stack.service import Service
from stack.settings import HOST, REPOSITORY, StackError

SCHEMA = REPOSITORY / "init-db.sql"
_SUPERUSER = "postgres"
_SOCKET_PATH_CHARACTERS = 107  # what the kernel has room for
_MACHINES = {"x86_64": "x86_64", "aarch64": "arm_64"}


class Postgres(Service):
    """The server, the pipelines' user and database, and their tables.

    Over TCP everybody needs a password; the superuser comes in through the Unix socket.
    """

    name = "postgres"
    # The others wait for clients to leave, or for a recovery at the next start.
    stop_signal = signal.SIGINT

    @property
    def ports(self) -> dict[str, int]:
        return {"sql": self.settings.port("postgres", "sql")}

    def fetch(self) -> None:
        machine = platform.machine()
        if machine not in _MACHINES:
            raise StackError(
                f"there are no Postgres binaries for {machine}, only for {', '.join(_MACHINES)}"
            )
        self._bin = release("postgres", self.settings) / _MACHINES[machine] / "bin"

    def prepare(self) -> list[str]:
        socket = f"{self._sockets}/.s.PGSQL.{self.ports['sql']}"
        if len(socket) > _SOCKET_PATH_CHARACTERS:
            raise StackError(
                f"the socket's path {socket} has {len(socket)} characters, "
                f"{_SOCKET_PATH_CHARACTERS} are possible; choose a shorter STACK_HOME"
            )
        for folder in (self._data, self._sockets):
            folder.mkdir(mode=0o700, exist_ok=True)
            if os.geteuid() == 0:
                nobody = pwd.getpwnam("nobody")
                os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        if not (self._data / "PG_VERSION").exists():
            run(
                [
                    *(*self._as_user(), str(self._bin / "initdb"), "-D", str(self._data)),
                    *("-U", _SUPERUSER, "--auth-local=trust", "--auth-host=scram-sha-256"),
                    *("--encoding=UTF8", "--no-locale", "--no-sync"),
                ],
                what="initdb",
            )
        self._forget_crashed()
        part = self.settings.of("postgres")
        return [
            *(*self._as_user(), str(self._bin / "postgres"), "-D", str(self._data)),
            *("-h", HOST, "-p", str(self.ports["sql"]), "-k", str(self._sockets)),
            *("-c", f"shared_buffers={part['shared_buffers_mb']}MB"),
            *("-c", f"max_wal_size={part['max_wal_mb']}MB"),
        ]

    def answers(self) -> bool:
        import psycopg

        try:
            with self._superuser() as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def furnish(self) -> None:
        import psycopg
        from psycopg.sql import SQL, Identifier, Literal

        part = self.settings.of("postgres")
        user, database = Identifier(part["user"]), Identifier(part["database"])
        with self._superuser() as connection:
            if not _exists(connection, "pg_roles WHERE rolname = %s", part["user"]):
                connection.execute(SQL("CREATE ROLE {} LOGIN").format(user))
            password = Literal(self.settings.postgres_password)
            connection.execute(SQL("ALTER ROLE {} PASSWORD {}").format(user, password))
            if not _exists(connection, "pg_database WHERE datname = %s", part["database"]):
                connection.execute(SQL("CREATE DATABASE {} OWNER {}").format(database, user))
        if SCHEMA.exists():
            url = self.settings.environment()["ACTIVITY_DATABASE_URL"]
            try:
                with psycopg.connect(url, options="-c client_min_messages=warning") as connection:
                    connection.execute(SCHEMA.read_text())
            except psycopg.Error as error:
                raise StackError(f"{SCHEMA} failed in {part['database']}: {error}") from error

    def _superuser(self):
        import psycopg

        return psycopg.connect(
            host=str(self._sockets),
            port=self.ports["sql"],
            user=_SUPERUSER,
            dbname="postgres",
            connect_timeout=5,
            autocommit=True,
        )

    def _forget_crashed(self) -> None:
        """Remove the locks of a server that was killed.

        A server's processes work in its data folder, in sessions of their own, and end
        soon after the first of them. Only then is nobody left to be locked out.
        """
        deadline = time.monotonic() + self.stop_timeout_s
        while _somebody_works_in(self._data):
            if time.monotonic() > deadline:
                raise StackError(f"processes of an earlier server still work in {self._data}")
            time.sleep(0.05)
        for lock in (self._data / "postmaster.pid", *self._sockets.iterdir()):
            lock.unlink(missing_ok=True)

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _sockets(self) -> Path:
        return self.folder / "run"

    def _as_user(self) -> list[str]:
        """Postgres refuses to run as root: let it be nobody.

        Its files may lie where only root may go, as root's home: so it keeps root's way of
        passing over permissions, and the security bit by which access(2) knows of that.
        """
        if os.geteuid() != 0:
            return []
        nobody = pwd.getpwnam("nobody")
        return [
            *("setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"),
            *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
            "--securebits=+no_setuid_fixup",
            *("env", f"HOME={self.folder}"),
        ]


def _somebody_works_in(folder: Path) -> bool:
    for process in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # ended just now, or another user's
            if process.readlink() == folder:
                return True
    return False


def _exists(connection, where: str, value: str) -> bool:
    return connection.execute(f"SELECT 1 FROM {where}", (value,)).fetchone() is not None
