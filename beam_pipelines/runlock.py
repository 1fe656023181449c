"""One run at a time in a place: locks that last as long as the process that holds them."""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from beam_pipelines.io.publication import LOCK

_LOGGER = logging.getLogger(__name__)

_NO_LOCKS_HERE = (
    *(errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP),
    *(errno.ENOSYS, errno.EINVAL, errno.EBADF),
)


class PlaceInUse(ValueError):  # noqa: N818 (no fault of ours, so not an Error)
    """Another run that is still alive writes to a place."""


def lock_in(folder: str) -> Path:
    """Return the file that whoever writes to a folder holds locked."""
    return Path(folder, LOCK)


def lock_beside(file: str) -> Path:
    """Return the file that whoever writes a file holds locked; links to it share one."""
    path = Path(os.path.realpath(file))
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(paths: Iterable[Path]) -> Iterator[None]:
    """Hold files locked (`flock`) during a block, all of them or none.

    The kernel gives a lock back when its process ends, however it ends. The files, and
    folders that had to be made for them, are removed at the block's end; those that a
    killed process left are taken again. Where the filesystem has no locks (NFS without its
    lock service, some FUSE) a warning says so, and the block runs without.

    Args:
      paths: Files to lock; made where they are missing.

    Raises:
      PlaceInUse: another process holds one; the message says which process, since when.
      OSError: a file can't be made.
    """
    with ExitStack() as held:
        for path in sorted(set(paths)):
            held.enter_context(_locked(path))
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    made = [folder for folder in path.parents if not folder.exists()]
    descriptor = -1
    try:
        descriptor = _taken(path)
        _write_who(descriptor)
        yield
    finally:
        if descriptor >= 0:
            with suppress(OSError):  # a file that stays is taken again
                path.unlink()  # before the lock is free: who comes next makes another file
            os.close(descriptor)
        for folder in made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def _taken(path: Path) -> int:
    """Return a descriptor of the file that holds its lock."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            why = os.strerror(errno.ENOTDIR)
            raise NotADirectoryError(errno.ENOTDIR, why, str(path.parent)) from error
        descriptor = os.open(path, flags, 0o666)
        try:
            _lock(descriptor, path)
            if _is_still(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder has removed it meanwhile


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl  # Windows has none

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PlaceInUse(
            f"another run writes to {path.parent} ({_who(descriptor)}); wait until it ends, "
            "or choose another place"
        ) from None
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS_HERE:
            raise
        _LOGGER.warning(
            "%s can't be locked (%s): make sure that no other run writes there", path, error
        )


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _write_who(descriptor: int) -> None:
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", "Z")
    who = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(who).encode())


def _who(descriptor: int) -> str:
    try:
        who = json.loads(os.read(descriptor, 4096))
        return f"process {who['process']} on {who['host']}, since {who['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has just begun"
