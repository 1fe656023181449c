"""Single values as times: what a row may say of when it happened."""

from datetime import UTC, datetime, timedelta
from numbers import Integral
from typing import Any

from beam_pipelines.kernels.rfc3339 import OK, SECONDS_TO, parse_one
from beam_pipelines.model.records import MAX_EVENT_TIME_US, MIN_EVENT_TIME_US

UNITS_NS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
"""Units of integers since 1970, in nanoseconds."""

EARLIEST_MS = SECONDS_TO
"""1973-03-03, in ms. Integers nearer to 1970 are refused: they look like a coarser unit, as
all of today's times do when seconds are taken for ms."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def epoch_micros(value: Any, name: str, unit: str | None = None) -> int:
    """Read a time.

    Args:
      value: An aware `datetime`, RFC 3339 text, or an integer of `unit`s since 1970.
      name: Of the column, for messages.
      unit: `s`, `ms`, `us` or `ns`; None: integers are refused.

    Returns:
      µs since 1970; ns are cut.

    Raises:
      ValueError: it is none of these, has no time zone, lies outside the years 1 to 9999, or
        is an integer that looks like one of another unit.
    """
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise ValueError(
                f"{name} is {value.isoformat()}, without a time zone; "
                "make it aware, e.g. datetime(…, tzinfo=UTC)"
            )
        return (value - _EPOCH) // _MICROSECOND
    if isinstance(value, str):
        micros, status = parse_one(value)
        if status != OK:
            raise ValueError(
                f"{name} is {value!r}; as text it is RFC 3339 with a time zone, within the "
                "years 1 to 9999, e.g. '2026-01-05T09:00:03Z'"
            )
        return micros
    if isinstance(value, Integral) and not isinstance(value, bool):
        return _of_integer(int(value), name, unit)
    raise ValueError(
        f"{name} is {value!r} of type {type(value).__name__}; times are aware datetimes, RFC "
        "3339 text, or integers with Batch(…, time_unit=…)"
    )


def _of_integer(value: int, name: str, unit: str | None) -> int:
    if unit is None:
        raise ValueError(
            f"{name} is the integer {value}, of no unit; name it with Batch(…, time_unit=…), "
            f"one of {', '.join(UNITS_NS)}"
        )
    nanos = value * UNITS_NS[unit]
    near_1970_ns = EARLIEST_MS * UNITS_NS["ms"]
    if unit != "s" and abs(nanos) < near_1970_ns:
        likely = [
            other
            for other, unit_ns in UNITS_NS.items()
            if unit_ns > UNITS_NS[unit]
            and near_1970_ns <= abs(value) * unit_ns <= MAX_EVENT_TIME_US * 1_000
        ]
        remedy = f" (if these are {likely[0]}: time_unit={likely[0]!r})" if likely else ""
        at = (_EPOCH + timedelta(microseconds=nanos // 1_000)).isoformat()
        raise ValueError(
            f"{name} is {value} {unit} since 1970, that is {at}{remedy}; times before "
            "1973-03-03 are taken as datetimes or text only"
        )
    micros = nanos // 1_000
    if not MIN_EVENT_TIME_US <= micros <= MAX_EVENT_TIME_US:
        raise ValueError(
            f"{name} is {value} {unit} since 1970, outside the years 1 to 9999; "
            "is it of a finer unit?"
        )
    return micros
