"""When an event counts: on time, late, too late, or from the future."""

from dataclasses import dataclass

SLACK_S = 60
"""Seconds that windows and state outlive the allowed lateness, so that the runner never
drops a row by itself: what is too late was routed aside before."""


@dataclass(frozen=True)
class TimeRule:
    """Judges an event by its event time e and the time a at which it was stored.

    Within a partition a never falls: where a clock steps back, sources keep the time before.

        future    e > a + future_tolerance
        on_time   a - out_of_orderness <= e
        late      a - out_of_orderness - allowed_lateness <= e < a - out_of_orderness
        too_late  older

    A pure function of the stored record: the same in every replay. Records without an
    append time belong to complete input; nothing in it is late, and `future` is judged
    against `as_of_us`.

    Args:
      out_of_orderness_s: Seconds the watermark stays behind the append time.
      allowed_lateness_s: Seconds behind the watermark that an event still counts.
      future_tolerance_s: Seconds ahead of the append time that an event may be.
      as_of_us: Stands in for the append time of complete input (µs since 1970), to
        judge `future` only; None judges nothing there.

    Raises:
      ValueError: a duration is negative.
    """

    out_of_orderness_s: int = 120
    allowed_lateness_s: int = 120
    future_tolerance_s: int = 300
    as_of_us: int | None = None

    def __post_init__(self) -> None:
        for name in ("out_of_orderness_s", "allowed_lateness_s", "future_tolerance_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
