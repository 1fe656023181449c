"""The folder a run writes to, and whose results lie there."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

from beam_pipelines.io.publication import LOCK, put_in_place

RUN = "run.json"
SUMMARY = "summary.json"

_DIFFERENCES_SHOWN = 5
_VALUE_CHARACTERS = 60


class RunMismatch(ValueError):  # noqa: N818 (no fault of ours, so not an Error)
    """The folder holds something other than an earlier run of the same thing."""


@dataclass(frozen=True)
class RunFolder:
    """A folder whose `run.json` tells which run its results came from.

    The same run may be repeated there, also after a crash: sinks repeat without effect.
    A run with another identity is refused unless it overwrites. Whatever else lies in
    the folder is never touched.

    Args:
      path: The folder; `run.json` and `summary.json` lie in it.
      owns: Files and folders that a run writes, the database's write-ahead log
        included. They may lie elsewhere.

    Raises:
      ValueError: one of them contains another, or the folder itself: removing it would
        take along what isn't its own.
    """

    path: str
    owns: tuple[str, ...]

    def __post_init__(self) -> None:
        kept = (self.path, str(self._run), str(self._summary))
        for outer, inner in (*permutations(self.owns, 2), *product(self.owns, kept)):
            if Path(os.path.abspath(inner)).is_relative_to(os.path.abspath(outer)):
                raise ValueError(f"{outer} can't be written to: {inner} lies there")

    def begin(self, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Claim the folder for a run, and remember the run in `run.json`.

        Args:
          identity: All that decides the results, as JSON values: two runs with the same
            identity leave the same results. Nested mappings are told apart by name.
          overwrite: First remove what earlier runs left: what `run.json` says they
            wrote, in the folder or at a place that this run writes to, too.

        Raises:
          RunMismatch: an earlier run had another identity and `overwrite` isn't set, or
            something stands where this run would write and no earlier run wrote it
            (that is never removed).
        """
        identity = json.loads(json.dumps(identity))
        earlier = self._earlier()
        written = {self._stored(path) for path in (*self.owns, str(self._summary))}
        wrote = set(earlier["owns"]) if earlier else set()

        for path in sorted(written - wrote):
            if _holds_something(self._path(path)):
                raise RunMismatch(
                    f"{self._path(path)} exists and was written by no run that {self._run} "
                    "knows of; remove it yourself, or choose another place"
                )
        if earlier and not overwrite and earlier["sha256"] != _sha256(identity):
            raise RunMismatch(
                f"{self.path} holds the results of another run: "
                f"{differences(earlier['identity'], identity)}; choose another --output, "
                "or replace them with --overwrite"
            )
        if earlier and overwrite:
            for path in sorted(wrote):
                if path in written or not os.path.isabs(path):
                    _remove(self._path(path))
            wrote = set()
            self._run.unlink()

        run = {"sha256": _sha256(identity), "identity": identity, "owns": sorted(written | wrote)}
        _write_json(self._run, run)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, atomically replacing an earlier one."""
        _write_json(self._summary, summary)

    @property
    def _run(self) -> Path:
        return Path(self.path, RUN)

    @property
    def _summary(self) -> Path:
        return Path(self.path, SUMMARY)

    def _earlier(self) -> dict[str, Any] | None:
        try:
            run = json.loads(self._run.read_bytes())
            return {key: run[key] for key in ("sha256", "identity", "owns")}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise RunMismatch(
                f"{self._run} was not written by a run ({error!r}); remove it yourself, "
                "or choose another --output"
            ) from error

    def _stored(self, path: str) -> str:
        """Return a path as run.json keeps it: relative in the folder, so that it may move."""
        absolute, folder = Path(os.path.abspath(path)), os.path.abspath(self.path)
        return str(absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute)

    def _path(self, stored: str) -> Path:
        return Path(self.path, stored)


def _sha256(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return any(child.name != LOCK for child in path.iterdir())
    return path.exists()


def _remove(path: Path) -> None:
    """Remove a file, or a folder; one that this run holds locked stays, with its lock alone."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
    elif not (path / LOCK).exists():
        shutil.rmtree(path)
    else:
        for child in path.iterdir():
            if child.name != LOCK:
                _remove(child)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    put_in_place(temporary, path, path.parent)


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what of nested mappings of JSON values was and is now, shortened."""
    was, is_now = dict(_leaves(earlier)), dict(_leaves(now))
    differences = [
        f"{name} was {_shown(was, name)}, is {_shown(is_now, name)}"
        for name in sorted({*was, *is_now})
        if was.get(name, _ABSENT) != is_now.get(name, _ABSENT)
    ]
    more = len(differences) - _DIFFERENCES_SHOWN
    shown = differences[:_DIFFERENCES_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    return "; ".join(shown)


_ABSENT = object()


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else key)


def _shown(leaves: Mapping[str, Any], name: str) -> str:
    if name not in leaves:
        return "absent"
    text = json.dumps(leaves[name], ensure_ascii=False)
    return text if len(text) <= _VALUE_CHARACTERS else f"{text[:_VALUE_CHARACTERS]}…"
