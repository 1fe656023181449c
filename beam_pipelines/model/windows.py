"""How rows are windowed: one policy, repeated at every WindowInto of a transform."""

import math
from dataclasses import dataclass, replace

import apache_beam as beam
from apache_beam.transforms import trigger
from apache_beam.transforms.window import FixedWindows, Sessions, SlidingWindows, WindowFn

from beam_pipelines.model.time_rule import SLACK_S


@dataclass(frozen=True)
class WindowPolicy:
    """Event-time windows, and when they fire.

    Make one with `fixed`, `sliding` or `session`. A window fires when the watermark
    passes its end, and again for late rows. With `early_s` it fires that often (processing
    time) while it is open, and no more often for late rows; without, for every batch of
    late rows. How late rows may be is no part of the policy: the stage that judged them
    says so (`ClassifyLateness`), and transforms read it from the batches' type hint.

    Beam doesn't hand lateness, triggers and accumulation down to a second WindowInto
    (its default lateness is 0, and late rows vanish there): transforms repeat the policy.

    Args:
      kind: `fixed`, `sliding` or `session`.
      size_s: Length of a window, or the gap of a session, in seconds.
      period_s: Seconds between the starts of two sliding windows.
      early_s: Seconds of processing time between early firings; None: none.
      accumulating: Whether every firing carries all of the window so far (True), or only
        what came since the one before. Tables that keep the greatest value need True.
      offset_s: Where after 1970 fixed windows start.

    Raises:
      ValueError: a length isn't positive, or the period exceeds the size.
    """

    kind: str
    size_s: int
    period_s: int
    early_s: int | None = None
    accumulating: bool = True
    offset_s: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("fixed", "sliding", "session"):
            raise ValueError(f"windows are fixed, sliding or session, not {self.kind!r}")
        if self.size_s <= 0 or self.period_s <= 0:
            raise ValueError(f"windows need positive lengths, got {self.size_s}, {self.period_s}")
        if self.period_s > self.size_s:
            raise ValueError(f"period {self.period_s} s leaves holes between {self.size_s} s")
        if self.early_s is not None and self.early_s <= 0:
            raise ValueError(f"early firings need a positive period, got {self.early_s} s")

    @classmethod
    def fixed(
        cls,
        size_s: int,
        *,
        early_s: int | None = None,
        accumulating: bool = True,
    ) -> "WindowPolicy":
        """Windows of one length, side by side, aligned to 1970."""
        return cls("fixed", size_s, size_s, early_s, accumulating)

    @classmethod
    def sliding(
        cls,
        size_s: int,
        period_s: int,
        *,
        early_s: int | None = None,
        accumulating: bool = True,
    ) -> "WindowPolicy":
        """Windows of `size_s`, one starting every `period_s`."""
        return cls("sliding", size_s, period_s, early_s, accumulating)

    @classmethod
    def session(
        cls,
        gap_s: int,
        *,
        early_s: int | None = None,
        accumulating: bool = True,
    ) -> "WindowPolicy":
        """Beam's merging windows per key, for `into()`; for exact, fast ones: `Sessionize`."""
        return cls("session", gap_s, gap_s, early_s, accumulating)

    @property
    def slice_s(self) -> int:
        """Length of the largest slices that every window is made of."""
        return math.gcd(self.size_s, self.period_s)

    def slices(self) -> "WindowPolicy":
        """Return fixed windows of one slice, with the same firings."""
        return replace(self, kind="fixed", size_s=self.slice_s, period_s=self.slice_s)

    def ends_of(self, slice_start_s: int) -> range:
        """Return the ends (s) of the windows that contain a slice."""
        first = slice_start_s + self.period_s - (slice_start_s - self.size_s) % self.period_s
        return range(first, slice_start_s + self.size_s + 1, self.period_s)

    def closings(self) -> "WindowPolicy":
        """Return fixed windows of one period that end, and so fire, as these windows do.

        There is one for each window. A partial result that is sent to the closings of all
        its windows needs no SlidingWindows, which cost Beam three times as much.
        """
        return replace(
            self, kind="fixed", size_s=self.period_s, offset_s=self.size_s % self.period_s
        )

    def window_fn(self) -> WindowFn:
        """Return Beam's own description of the windows."""
        if self.kind == "fixed":
            return FixedWindows(self.size_s, self.offset_s)
        if self.kind == "sliding":
            return SlidingWindows(self.size_s, self.period_s)
        return Sessions(self.size_s)

    def into(self, *, lateness_s: int, of_slices: bool = False) -> beam.WindowInto:
        """Return the WindowInto of this policy.

        Beam is told `SLACK_S` more than `lateness_s`, so that it never drops rows by itself.

        Args:
          lateness_s: Seconds behind the watermark that an element is at most: what the
            stage that routes older ones aside allows (`TimeRule.allowed_lateness_s`).
          of_slices: For a second level, whose elements are the results of the policy's
            slices, which fire at their own pace: it fires for each of them, and is kept
            `SLACK_S` longer, as a slice fires once more when it is given up.

        Raises:
          ValueError: the lateness is negative.
        """
        if lateness_s < 0:
            raise ValueError(f"lateness_s must not be negative, got {lateness_s}")
        paced = (
            trigger.AfterCount(1)
            if of_slices or self.early_s is None
            else trigger.AfterProcessingTime(self.early_s)
        )
        return beam.WindowInto(
            self.window_fn(),
            trigger=trigger.AfterWatermark(
                early=None if self.early_s is None else paced, late=paced
            ),
            accumulation_mode=(
                trigger.AccumulationMode.ACCUMULATING
                if self.accumulating
                else trigger.AccumulationMode.DISCARDING
            ),
            allowed_lateness=lateness_s + SLACK_S * (2 if of_slices else 1),
        )


def refuse_partial_results(rows: beam.PCollection, what: str) -> None:
    """Refuse rows of discarding windows where the greatest value of a key is kept.

    Raises:
      ValueError: the rows' windows fire more than once and discard what fired: each
        firing holds a part, and the greatest part is not the whole.
    """
    windowing = rows.windowing
    fires_once = isinstance(windowing.triggerfn, trigger.DefaultTrigger)
    discards = windowing.accumulation_mode == trigger.AccumulationMode.DISCARDING
    if discards and not fires_once:
        raise ValueError(
            f"{what} keeps the greatest value of a key, but its rows come from discarding "
            "windows, whose firings each hold a part; use accumulating windows"
        )
