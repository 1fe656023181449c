"""How the lake's files are named, and which of them a reader takes.

    event_date=2026-01-05/TOPIC-HASH-PARTITION-START-END.parquet
    _open/TOPIC-HASH-PARTITION/event_date=2026-01-05/TOPIC-…-START-END-FROM-COVERED.parquet
    _open/TOPIC-HASH-PARTITION/TOPIC-…-START-END-FROM-UPTO.arrow

The first holds the records of offsets [START, END) of one partition with that UTC date of
the event time. The second, of a range that isn't complete yet, those of [FROM, COVERED),
which lie within one eighth of the range that begins at FROM, and no record of [COVERED, the
end of any longer one of the eighth) has its date unless a file of this date says so. A file
is a pure function of its name and the topic. The third is no reader's: it holds rows that are
too large for the writer's state until their range is published.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

OPEN = "_open"

EIGHTHS = 8
"""Parts of a range, each shown by files of its own while the range isn't complete."""

_RANGE = r"(?P<date>event_date=[^/]+)/(?P<range>(?:[^/]+-)?[0-9a-f]{12}-\d+-\d{12,}-\d{12,})"
_PUBLISHED_FILE = re.compile(rf"{_RANGE}\.parquet")
_PART = r"-(?P<start>\d{12,})-(?P<covered>\d{12,})"
_OPEN_FILE = re.compile(rf"{OPEN}/[^/]+/{_RANGE}{_PART}\.parquet")


class Range(NamedTuple):
    """Offsets [start, end) of one partition, which are published together."""

    topic: str
    partition: int
    start: int
    end: int

    def __str__(self) -> str:
        return f"offsets [{self.start}, {self.end}) of {self.topic}, partition {self.partition}"

    @property
    def place(self) -> str:
        """Its partition's name, safe in a path; topics that read alike differ by their hash."""
        slug = re.sub(r"[^A-Za-z0-9._]+", "-", PurePath(self.topic).name)[-60:].strip("-.")
        digest = hashlib.sha256(self.topic.encode()).hexdigest()[:12]
        place = f"{digest}-{self.partition}"
        return f"{slug}-{place}" if slug else place

    @property
    def name(self) -> str:
        """Its own name: that of its partition, and its offsets."""
        return f"{self.place}-{self.start:012}-{self.end:012}"


def eighth_of(offset: int, of: Range) -> int:
    """Return which eighth of a range an offset lies in."""
    return (offset - of.start) * EIGHTHS // (of.end - of.start)


def eighth(number: int, of: Range) -> tuple[int, int]:
    """Return where an eighth of a range starts and ends; one of a short range may be empty."""
    length = of.end - of.start
    start, end = (of.start - (-part * length // EIGHTHS) for part in (number, number + 1))
    return start, end


def published_name(of: Range, day: int) -> str:
    """Name the file of a complete range for a date, in days since 1970."""
    return f"{date_folder(day)}/{of.name}.parquet"


def open_name(of: Range, day: int, start: int, covered_end: int) -> str:
    """Name the file of a range's eighth that is known up to an offset, for a date."""
    return f"{open_folder(of)}/{date_folder(day)}/{of.name}-{start:012}-{covered_end:012}.parquet"


def spilled_name(of: Range, start: int, end: int) -> str:
    """Name the file of rows of [start, end) that wait for the rest of their range."""
    return f"{open_folder(of)}/{of.name}-{start:012}-{end:012}.arrow"


def open_folder(of: Range) -> str:
    """Name the folder of all files of a partition's open ranges."""
    return f"{OPEN}/{of.place}"


def date_folder(day: int) -> str:
    """Name the folder of a date, in days since 1970."""
    return f"event_date={np.datetime64(day, 'D')}"


def to_read(names: Iterable[str]) -> list[str]:
    """Choose the files that hold each known record once.

    For each range and date: the published file if there is one, else of each eighth the open
    one that covers most. Names that aren't the lake's are left out.
    """
    names = list(names)
    published = {
        (file["date"], file["range"]): name
        for name in names
        if (file := _PUBLISHED_FILE.fullmatch(name))
    }
    longest: dict[tuple[str, str, int], tuple[int, str]] = {}
    for name in names:
        file = _OPEN_FILE.fullmatch(name)
        if file and (file["date"], file["range"]) not in published:
            key = (file["date"], file["range"], int(file["start"]))
            longest[key] = max(longest.get(key, (-1, "")), (int(file["covered"]), name))
    return sorted([*published.values(), *(name for _, name in longest.values())])


def open_files(names: Iterable[str], of: Range) -> dict[tuple[str, int], list[str]]:
    """Return the open files of a range by (date folder, start), the longest ones first."""
    found: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for name in names:
        file = _OPEN_FILE.fullmatch(name)
        if file and file["range"] == of.name:
            key = (file["date"], int(file["start"]))
            found.setdefault(key, []).append((int(file["covered"]), name))
    return {key: [name for _, name in sorted(files)[::-1]] for key, files in found.items()}


def spilled_files(names: Iterable[str], of: Range) -> list[str]:
    """Return the files of a range that hold rows for its writer."""
    start = f"{open_folder(of)}/{of.name}-"
    return [name for name in names if name.startswith(start) and name.endswith(".arrow")]


def is_published(names: Iterable[str], of: Range) -> bool:
    """Tell whether there is a published file of a range, of any date."""
    files = (_PUBLISHED_FILE.fullmatch(name) for name in names)
    return any(file and file["range"] == of.name for file in files)
