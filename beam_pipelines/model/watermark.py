"""The watermark of one partition of an endless source."""

from dataclasses import dataclass

CLOCK_SKEW_US = 5_000_000
"""How far broker and worker clocks may lie apart."""


@dataclass
class PartitionWatermark:
    """Watermark of a partition whose records carry append times.

    It follows the greatest append time seen, less the out-of-orderness. Event times play
    no part, so a record from the year 3000 moves nothing. While the partition is idle it
    follows the clock, but only when known to be caught up: the broker answered an
    end-offset request, and the answer equals our position. Without an answer, or with a
    backlog, it stands still: records that were stored on time may still be to come.

    It never goes back; `now` is in µs since 1970.
    """

    out_of_orderness_us: int
    _now_us: int | None = None

    def now(self) -> int | None:
        """Return the watermark in µs since 1970; None before anything is known."""
        return self._now_us

    def appended(self, append_time_us: int) -> None:
        """Take in the greatest append time of a batch that was read."""
        self._raise_to(append_time_us - self.out_of_orderness_us)

    def asked_for_end(self, asked_at_us: int, end_offset: int | None, position: int) -> None:
        """Take in the broker's answer to an end-offset request.

        Args:
          asked_at_us: Our clock when the request was sent: later records will be stored
            after it.
          end_offset: The answer; None where there was none, or an error.
          position: The next offset to read.
        """
        if end_offset is not None and end_offset == position:
            self._raise_to(asked_at_us - CLOCK_SKEW_US - self.out_of_orderness_us)

    def _raise_to(self, watermark_us: int) -> None:
        if self._now_us is None or watermark_us > self._now_us:
            self._now_us = watermark_us
