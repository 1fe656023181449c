"""Where a reader of Kafka partitions is: the restriction of the source, and its tracker."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from apache_beam import coders
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker

Partition = tuple[str, int]
"""Topic and partition number."""


@dataclass(frozen=True)
class Position:
    """How far one partition was read.

    Args:
      began: Where reading began.
      next: The next offset to read.
      stop: Where reading ends; None: never.
      watermark_us: Of the partition, in µs since 1970; None before anything is known. No
        record is judged by an earlier time than this and the out-of-orderness.
      leader_epoch: Of the last record read; None: not known. By it a broker can tell that
        its log was cut before `next` and grew again.
    """

    began: int
    next: int
    stop: int | None = None
    watermark_us: int | None = None
    leader_epoch: int | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is left to read."""
        return self.stop is not None and self.next >= self.stop


@dataclass(frozen=True)
class Positions:
    """The restriction of a reader: its partitions' positions and the ids of their topics.

    It holds all that reading goes on from after a restart, and the settings of the job that
    began. A reader that hasn't begun has none.
    """

    partitions: Mapping[Partition, Position] = field(default_factory=dict)
    topic_ids: Mapping[str, str] = field(default_factory=dict)
    begun: bool = False
    settings: str = ""

    @property
    def done(self) -> bool:
        """Whether nothing is left to read, now or ever."""
        return self.begun and all(position.done for position in self.partitions.values())

    def moved(self, partitions: Mapping[Partition, Position]) -> "Positions":
        """Return these positions with some replaced or added."""
        return replace(self, partitions={**self.partitions, **partitions})

    def watermark_us(self) -> int | None:
        """Return the least watermark of the partitions; None while one is unknown."""
        watermarks = [position.watermark_us for position in self.partitions.values()]
        known = [watermark for watermark in watermarks if watermark is not None]
        return min(known) if known and len(known) == len(watermarks) else None


class PositionsCoder(coders.Coder):
    """Encodes positions as JSON."""

    def encode(self, value: Positions) -> bytes:
        rows = [
            (topic, partition, p.began, p.next, p.stop, p.watermark_us, p.leader_epoch)
            for (topic, partition), p in sorted(value.partitions.items())
        ]
        ids = dict(sorted(value.topic_ids.items()))
        return json.dumps([rows, ids, value.begun, value.settings]).encode()

    def decode(self, encoded: bytes) -> Positions:
        rows, topic_ids, begun, settings = json.loads(encoded)
        return Positions(
            {(topic, partition): Position(*rest) for topic, partition, *rest in rows},
            topic_ids,
            begun,
            settings,
        )

    def is_deterministic(self) -> bool:
        return True


class PositionsTracker(RestrictionTracker):
    """Claims positions: whoever claims new ones has read what lies between.

    The only split is a checkpoint: what was claimed is done, the rest goes on later.
    """

    def __init__(self, positions: Positions, bounded: bool) -> None:
        self._positions = positions
        self._bounded = bounded
        self._checkpointed = False

    def current_restriction(self) -> Positions:
        return self._positions

    def current_progress(self) -> RestrictionProgress:
        done, left = (sum(counts) for counts in zip((0, 0), *self._counts(), strict=True))
        return RestrictionProgress(completed=done, remaining=left)

    def try_claim(self, positions: Positions) -> bool:
        """Claim what lies before these positions; False once a checkpoint was taken."""
        if self._checkpointed:
            return False
        self._positions = positions
        return True

    def try_split(self, fraction_of_remainder: float) -> tuple[Positions, Positions] | None:
        if fraction_of_remainder != 0 or self._checkpointed or self._done:
            return None
        self._checkpointed = True
        return self._positions, self._positions

    def check_done(self) -> bool:
        if not (self._checkpointed or self._done):
            raise ValueError(f"reading stopped at {self._positions}, before its end")
        return True

    def is_bounded(self) -> bool:
        return self._bounded

    @property
    def _done(self) -> bool:
        return self._bounded and self._positions.done

    def _counts(self) -> Iterator[tuple[int, int]]:
        for position in self._positions.partitions.values():
            left = 0 if position.stop is None else max(position.stop - position.next, 0)
            yield position.next - position.began, left
