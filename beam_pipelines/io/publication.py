"""Files that appear whole: written aside, then renamed into place."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SCRATCH = "_tmp"


def scratch_path(folder: str | os.PathLike[str]) -> Path:
    """Return an unused path below `folder` for a file that isn't meant to be read yet.

    It ends in `.tmp`, so that patterns like `**/*.parquet` don't match it.
    """
    scratch = Path(folder, _SCRATCH)
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch / f"{uuid.uuid4().hex}.tmp"


@contextmanager
def published(folder: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """Give a path to write to; the file appears as `name` in the folder when the block ends.

    Readers see all of it or what was there before, never a part. Nothing appears when the
    block raises. `name` may lead through subfolders.
    """
    path = scratch_path(folder)
    try:
        yield path
        target = Path(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what runs that crashed left unpublished in a folder.

    Call it while nothing writes there.
    """
    shutil.rmtree(Path(folder, _SCRATCH), ignore_errors=True)
