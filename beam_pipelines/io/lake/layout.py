"""How the lake's files are named, and which of them a reader takes.

    event_date=2026-01-05/TOPIC-HASH-PARTITION-START-END.parquet
    _open/event_date=2026-01-05/TOPIC-HASH-PARTITION-START-END-COVERED.parquet

The first holds the records of offsets [START, END) of one partition with that UTC date of
the event time. The second, of a range that isn't complete yet, those of [START, COVERED),
and no record of [COVERED, the end of any longer one of the range) has its date unless a
file of this date says so. A file is a pure function of its name and the topic.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

OPEN = "_open"

_FILE = re.compile(
    rf"(?:(?P<open>{OPEN})/)?(?P<date>event_date=[^/]+)/"
    r"(?P<range>(?:[^/]+-)?[0-9a-f]{12}-\d+-\d{12,}-\d{12,}?)(?:-(?P<covered>\d{12,}))?\.parquet"
)


class Range(NamedTuple):
    """Offsets [start, end) of one partition, which are published together."""

    topic: str
    partition: int
    start: int
    end: int

    def __str__(self) -> str:
        return f"offsets [{self.start}, {self.end}) of {self.topic}, partition {self.partition}"

    @property
    def name(self) -> str:
        """Its name, safe in a path; topics that read alike differ by their hash."""
        slug = re.sub(r"[^A-Za-z0-9._]+", "-", PurePath(self.topic).name)[-60:].strip("-.")
        digest = hashlib.sha256(self.topic.encode()).hexdigest()[:12]
        place = f"{digest}-{self.partition}-{self.start:012}-{self.end:012}"
        return f"{slug}-{place}" if slug else place


def published_name(of: Range, day: int) -> str:
    """Name the file of a complete range for a date, in days since 1970."""
    return f"{date_folder(day)}/{of.name}.parquet"


def open_name(of: Range, day: int, covered_end: int) -> str:
    """Name the file of a range that is known up to an offset, for a date."""
    return f"{OPEN}/{date_folder(day)}/{of.name}-{covered_end:012}.parquet"


def date_folder(day: int) -> str:
    """Name the folder of a date, in days since 1970."""
    return f"event_date={np.datetime64(day, 'D')}"


def to_read(names: Iterable[str]) -> list[str]:
    """Choose the files that hold each known record once.

    For each range and date: the published file if there is one, else the open one that
    covers most. Names that aren't the lake's are left out.
    """
    chosen: dict[tuple[str, str], tuple[float, str]] = {}
    for name in names:
        file = _FILE.fullmatch(name)
        if file and (file["open"] is None) == (file["covered"] is None):
            reach = float("inf") if file["open"] is None else int(file["covered"])
            key = (file["date"], file["range"])
            chosen[key] = max(chosen.get(key, (-1, "")), (reach, name))
    return sorted(name for _, name in chosen.values())


def open_files(names: Iterable[str], of: Range) -> dict[str, list[str]]:
    """Return the open files of a range by date folder, the one that covers most first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        file = _FILE.fullmatch(name)
        if file and file["open"] and file["covered"] and file["range"] == of.name:
            found.setdefault(file["date"], []).append((int(file["covered"]), name))
    return {date: [name for _, name in sorted(of_date)[::-1]] for date, of_date in found.items()}
