"""Whose lake it is: `_lake.json` tells what it is written from, and by which decisions.

Files of a lake are pure functions of their names and the input only as long as all who write
there read the same input and judge it alike. So each run claims the lake before it writes: the
first leaves `_lake.json`, and later ones must agree with it. Readers pass over that file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beam_pipelines.io.publication import created, listed, published, stored
from beam_pipelines.runfolder import differences

LAKE = "_lake.json"

_OF_TABLES = ("window_s", "users_window_s", "users_period_s", "session_gap_s")
"""Settings of windows and sessions, which no row of the lake depends on."""


class LakeMismatch(ValueError):  # noqa: N818 (no fault of ours, so not an Error)
    """The lake is of other input, or of other decisions."""


def lake_identity(
    source: Mapping[str, Any], settings: Mapping[str, Any], record_format: str
) -> dict[str, Any]:
    """Return what decides the rows of a lake, as JSON values.

    Args:
      source: What tells the input from another (`Source.identity`). Where the reading of
        topics starts doesn't count: a run may go on from any offset.
      settings: What decides the results of a run besides the input
        (`ActivityConfig.settings_identity`).
      record_format: How the records are written, as it was found.
    """
    read = {name: value for name, value in source.items() if name != "start"}
    decisions = {name: value for name, value in settings.items() if name not in _OF_TABLES}
    if read.get("append_time", "none") != "none":
        decisions.pop("as_of_us", None)  # records are judged by their append time
    if "topics" in read:
        read["topics"] = sorted(set(read["topics"]))
    identity = {"input": read, "settings": {**decisions, "format": record_format}}
    normal: dict[str, Any] = json.loads(json.dumps(identity))
    return normal


@dataclass(frozen=True)
class LakeClaim:
    """A run's claim to a lake.

    The same input may be written there again: by a repeated run, one that goes on, or one
    that reads more topics. Of two that begin at once and differ, one is refused; on object
    stores, which can't be asked to keep what is there, both may pass in the tenth of a second
    in which both look.

    Args:
      folder: The lake, local or on an object store.
      identity: What decides its rows, see `lake_identity`.
    """

    folder: str
    identity: Mapping[str, Any]

    def check(self) -> Mapping[str, Any] | None:
        """Return what the lake was claimed by, if it was: a run that agrees with this one.

        Raises:
          LakeMismatch: by one that differs, or there are files that nobody claimed.
          ValueError: the folder can't be used.
        """
        try:
            return self._agreed()
        except OSError as error:
            raise ValueError(f"--lake={self.folder} can't be used: {error}") from error

    def take(self) -> None:
        """Claim the lake.

        Raises:
          LakeMismatch, ValueError: as `check` does; nothing is written then.
        """
        earlier = self.check()
        text = (json.dumps(self.identity, indent=2, ensure_ascii=False) + "\n").encode()
        try:
            if earlier is None:
                created(self.folder, LAKE, text)
                self._agreed()  # another run may have been first
            elif earlier != self.identity:  # it reads more topics
                with published(self.folder, LAKE) as path:
                    path.write_bytes(text)
        except OSError as error:
            raise ValueError(f"--lake={self.folder} can't be used: {error}") from error

    def _agreed(self) -> Mapping[str, Any] | None:
        try:
            text = stored(self.folder, LAKE)
        except FileNotFoundError:
            if files := listed(self.folder):
                raise LakeMismatch(
                    f"--lake={self.folder} has no {LAKE}, so nobody knows what {files[0]} and "
                    "other files there were written from; choose another --lake, or remove them"
                ) from None
            return None
        try:
            earlier = json.loads(text)
            wider = {**earlier, "input": self._with_topics_of(earlier["input"])}
        except (ValueError, KeyError, TypeError) as error:
            raise LakeMismatch(
                f"{LAKE} of --lake={self.folder} was not written by a run ({error!r}); choose "
                "another --lake"
            ) from error
        if wider != self.identity:
            raise LakeMismatch(
                f"--lake={self.folder} holds the records of another run: "
                f"{differences(earlier, self.identity)}; choose another --lake"
            )
        return {**earlier}

    def _with_topics_of(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """Return the earlier input, with topics of this run where it merely reads more."""
        now = self.identity["input"].get("topics", ())
        more = "topics" in earlier and set(earlier["topics"]) <= set(now)
        return {**earlier, "topics": now} if more else dict(earlier)
