"""Files that appear whole, in a local folder or on an object store.

A folder is a local path, or a URI of S3 or Google Cloud Storage as pyarrow reads it:
`s3://bucket/path`, `gs://bucket/path`, with options such as
`?region=eu-central-1` or `?scheme=http&endpoint_override=HOST:PORT`. Credentials come from
the environment of the worker (`AWS_ACCESS_KEY_ID`, an instance's role, …), never from here.
"""

import functools
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyarrow import fs

OBJECT_STORES = ("s3://", "gs://")

LOCK = ".run.lock"
"""Name of the file that a run holds locked in a folder it writes to; no result."""

_SCRATCH = "_tmp"


def scratch_path(folder: str | os.PathLike[str]) -> Path:
    """Return an unused path below a local folder for a file that isn't meant to be read yet.

    It ends in `.tmp`, so that patterns like `**/*.parquet` don't match it.

    Raises:
      ValueError: the folder isn't local.
    """
    if on_object_store(folder):
        raise ValueError(f"{folder} is no local folder, which scratch files need")
    scratch = Path(folder, _SCRATCH)
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch / f"{uuid.uuid4().hex}.tmp"


@contextmanager
def published(folder: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """Give a local path to write to; the file appears as `name` in the folder at the block's end.

    Readers see all of it or what was there before, never a part: locally it is renamed, on
    an object store sent as one object. Nothing appears when the block raises. `name` may
    lead through subfolders. Once the block has ended, the file outlives a power cut.
    """
    if on_object_store(folder):
        with tempfile.TemporaryDirectory(prefix="publish-") as scratch:
            path = Path(scratch, "file.tmp")
            yield path
            _send(path, folder, name)
        return
    path = scratch_path(folder)
    try:
        yield path
        put_in_place(path, Path(folder, name), Path(folder))
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def created(folder: str | os.PathLike[str], name: str, content: bytes) -> bool:
    """Write a file unless there is one; returns whether it was written.

    Of several that try at once one succeeds locally. An object store isn't asked to keep what
    it has (pyarrow can't): the last one may win, so read the file again.
    """
    if on_object_store(folder):
        with suppress(FileNotFoundError):
            stored(folder, name)
            return False
        with published(folder, name) as path:
            path.write_bytes(content)
        return True
    path, target = scratch_path(folder), Path(folder, name)
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(path, target)
    except FileExistsError:
        return False
    finally:
        path.unlink(missing_ok=True)
    _sync_names(target.parent)
    return True


def stored(folder: str | os.PathLike[str], name: str) -> bytes:
    """Return the content of a published file.

    Raises:
      FileNotFoundError: there is none.
    """
    store, root = filesystem(folder)
    with store.open_input_stream(f"{root}/{name}") as stream:
        content: bytes = stream.read()
    return content


def put_in_place(path: Path, target: Path, folder: Path) -> None:
    """Rename a local file, so that it and its name outlive a power cut.

    A rename alone may reach the disk before the file's content does: after a power cut there
    is an empty file then, while a checkpoint says that it is done.

    Args:
      path: A file that was written and closed.
      target: Where it goes, in the folder or below. Folders that are missing are made.
      folder: The folder, whose own name is made to last, too.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    _sync_names(target.parent)
    _sync_way(target.parent, folder, target.parent.stat().st_ino)


@functools.lru_cache(maxsize=1024)
def _sync_way(below: Path, folder: Path, inode: int) -> None:
    """Make a folder outlive a power cut, once per process: whoever made it may have crashed."""
    while below != folder:
        below = below.parent
        _sync_names(below)
    _sync_names(folder.absolute().parent)


def _sync_names(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows, where a folder can't be opened
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def listed(folder: str | os.PathLike[str], below: str = "") -> list[str]:
    """Return the names of the published files of a folder, sorted; none where it is missing.

    Names are relative to the folder, with `/` between their parts.

    Args:
      folder: Where the files are.
      below: A subfolder, to list only what is in there.
    """
    store, root = filesystem(folder)
    start = f"{root}/{below}" if below else root
    found = store.get_file_info(fs.FileSelector(start, allow_not_found=True, recursive=True))
    names = [info.path[len(root) + 1 :] for info in found if info.type == fs.FileType.File]
    return sorted(name for name in names if name != LOCK and not name.startswith(f"{_SCRATCH}/"))


def remove(folder: str | os.PathLike[str], name: str) -> None:
    """Remove a published file; one that is gone already is no error."""
    store, root = filesystem(folder)
    with suppress(FileNotFoundError):
        store.delete_file(f"{root}/{name}")


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what runs that crashed left unpublished in a folder.

    Call it while nothing writes there. On object stores nothing is ever left.
    """
    if not on_object_store(folder):
        shutil.rmtree(Path(folder, _SCRATCH), ignore_errors=True)


def on_object_store(folder: str | os.PathLike[str]) -> bool:
    """Tell a URI of an object store from a local path."""
    return str(folder).startswith(OBJECT_STORES)


def require_no_credentials(folder: str | os.PathLike[str]) -> None:
    """Refuse a URI that holds credentials: whatever fails later would show it.

    Raises:
      ValueError: it does; the message doesn't show it.
    """
    if not on_object_store(folder):
        return
    place, _, query = str(folder).partition("://")[2].partition("?")
    if re.search("[@:]", place.partition("/")[0]) or re.search(
        "key|secret|passw|token", query, re.I
    ):
        raise ValueError(
            "the URI of a folder on an object store holds credentials (and isn't shown): leave "
            "them to the workers' environment or role, such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )


def filesystem(folder: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a folder, and the folder's path there.

    Raises:
      ValueError: the folder is a URI of something else, none that pyarrow understands, or
        one with credentials in it.
    """
    require_no_credentials(folder)
    if not on_object_store(folder):
        if re.match(r"[a-z][a-z0-9+.-]*://", str(folder)):
            raise ValueError(f"{folder} is neither a local path nor {' or '.join(OBJECT_STORES)}…")
        return fs.LocalFileSystem(), os.path.abspath(folder)
    store, root = _opened(str(folder))
    return store, root.rstrip("/")


@functools.lru_cache(maxsize=16)
def _opened(uri: str) -> tuple[fs.FileSystem, str]:
    store, root = fs.FileSystem.from_uri(uri)
    return store, root


def _send(path: Path, folder: str | os.PathLike[str], name: str) -> None:
    store, root = filesystem(folder)
    # The whole file at once: closing the stream publishes it, so there must be no way to
    # the close that leads past an unwritten part.
    whole = path.read_bytes()
    stream = store.open_output_stream(f"{root}/{name}")
    stream.write(whole)
    stream.close()
