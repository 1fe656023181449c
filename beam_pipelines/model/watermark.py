"""The watermark of one partition of an endless source."""

from dataclasses import dataclass

CLOCK_SKEW_US = 5_000_000
"""How far the clocks of brokers may lie apart."""

SILENCE_US = 600_000_000
"""How long the newest record alone tells how late it is for the brokers."""


@dataclass
class BrokersClock:
    """How late it is for the brokers, as far as a worker can know; times in µs.

    No broker tells its time. A record's append time tells how late it was at the least when
    the record was seen, and the worker's monotonic clock counts on from there. The newest
    record of an idle topic may have been old when it was seen: after `SILENCE_US` without a
    newer one the worker's clock, less `SILENCE_US`, counts as well. So an empty or idle topic
    holds nothing back for ever, and a worker's clock that is ahead is believed only in that
    case, and by that much less.

    Args:
      heard_at_us: The monotonic clock when a newer record was last seen; at first: now.
    """

    heard_at_us: int
    _newest_us: int | None = None
    _ahead_us: int | None = None  # of the monotonic clock, at least

    def seen(self, append_time_us: int, monotonic_us: int) -> None:
        """Take in that a record of this append time is there."""
        if self._newest_us is None or append_time_us > self._newest_us:
            self._newest_us, self.heard_at_us = append_time_us, monotonic_us
        ahead_us = append_time_us - monotonic_us
        if self._ahead_us is None or ahead_us > self._ahead_us:
            self._ahead_us = ahead_us

    def now(self, clock_us: int, monotonic_us: int) -> int | None:
        """Return how late it is at least, and no later than the worker's clock; None: unknown.

        Args:
          clock_us: The worker's clock.
          monotonic_us: Its monotonic clock.
        """
        told = [] if self._ahead_us is None else [monotonic_us + self._ahead_us]
        if monotonic_us - self.heard_at_us >= SILENCE_US:
            told.append(clock_us - SILENCE_US)
        return min(clock_us, max(told)) if told else None


@dataclass
class PartitionWatermark:
    """Watermark of a partition whose records carry append times.

    It follows the greatest append time seen, less the out-of-orderness. Event times play
    no part, so a record from the year 3000 moves nothing. While the partition is idle it
    follows the brokers' clock, but only when known to be caught up: the broker answered an
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
          asked_at_us: The brokers' clock (`BrokersClock`) when the request was sent: later
            records will be stored after it.
          end_offset: The answer; None where there was none, or an error.
          position: The next offset to read.
        """
        if end_offset is not None and end_offset == position:
            self._raise_to(asked_at_us - CLOCK_SKEW_US - self.out_of_orderness_us)

    def _raise_to(self, watermark_us: int) -> None:
        if self._now_us is None or watermark_us > self._now_us:
            self._now_us = watermark_us
