"""The same pipeline as one writes it in Beam when elements are single events.

Idiomatic, and as light as it gets: `json.loads` with no more checks than a crash calls for,
dedupe by one bit of state per key and no timers, Beam's own windows and lifted combiners,
coders for plain tuples, sessions by inactivity alone, nothing written. It does less than
the pipeline it is compared with, and accepts the same events (but for bad numbers in fields
that nobody reads, duplicate keys, and what else Python's json lets pass).
"""

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, TypeAlias

import apache_beam as beam
from apache_beam.coders import BooleanCoder
from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.combiners import Count
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec
from apache_beam.transforms.window import FixedWindows, Sessions, SlidingWindows, TimestampedValue

from beam_pipelines.demo import DemoTraffic
from beam_pipelines.model.activity import CLICK, EVENT_TYPES, PAGE_VIEW
from beam_pipelines.model.time_rule import TimeRule

Event: TypeAlias = tuple[float, str, str, str]
"""Event time (s), user, page, type."""

_RULE = TimeRule()
_BEHIND_S = _RULE.out_of_orderness_s + _RULE.allowed_lateness_s
_held: list[tuple[bytes | None, float]] = []  # payloads and their append times (s)


def hold(traffic: DemoTraffic) -> None:
    """Generate a stream, as the input of the next run."""
    _held.clear()
    for batch in map(traffic.payloads, range(traffic.chunks)):
        append_s = (time.timestamp() for time in batch["append_time"].to_pylist())
        _held.extend(zip(batch["payload"].to_pylist(), append_s, strict=True))


def run_per_event() -> int:
    """Count views, active users and sessions of the held stream; returns events accepted."""
    pipeline = beam.Pipeline(runner=FnApiRunner())
    events = (
        pipeline
        | "Start" >> beam.Create([0])
        | "Read" >> beam.FlatMap(_read).with_output_types(tuple[bytes | None, float])
        | "Parse" >> beam.FlatMapTuple(_parsed).with_output_types(tuple[str, Event])
        | "Deduplicate" >> beam.ParDo(_FirstFn()).with_output_types(Event)
    )
    (
        events
        | "Page views" >> beam.Filter(lambda event: event[3] == PAGE_VIEW)
        | "Pages" >> beam.Map(lambda event: event[2]).with_output_types(str)
        | "Minutes" >> beam.WindowInto(FixedWindows(60))
        | "Count page views" >> Count.PerElement()
    )
    (
        events
        | "Users" >> beam.Map(lambda event: event[1]).with_output_types(str)
        | "Five minutes" >> beam.WindowInto(SlidingWindows(300, 60))
        | "Distinct" >> beam.Distinct()
        | "Count active users" >> Count.Globally().without_defaults()
    )
    (
        events
        | "By user" >> beam.Map(lambda e: (e[1], e)).with_output_types(tuple[str, Event])
        | "Sessions" >> beam.WindowInto(Sessions(1800))
        | "Sessionize" >> beam.CombinePerKey(_SessionFn())
    )
    result = pipeline.run()
    result.wait_until_finish()
    (accepted,) = result.metrics().query(MetricsFilter().with_name("accepted"))["counters"]
    return int(accepted.result)


def _read(_: int) -> Iterator[tuple[bytes | None, float]]:
    yield from _held


def _parsed(payload: bytes | None, append_s: float) -> Iterator[TimestampedValue]:
    try:
        record = json.loads(payload or b"")
        time = record["event_time"]
        is_text = isinstance(time, str)
        time_s = datetime.fromisoformat(time).timestamp() if is_text else time / 1_000
        user, page, kind = record["user_id"], record["page_url"], record["event_type"]
        identity = f"{record.get('event_id') or payload!r} {time_s}"
        (user + page).encode()  # half of a surrogate pair would crash a coder
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return  # a dead letter
    in_time = append_s - _BEHIND_S <= time_s <= append_s + _RULE.future_tolerance_s
    if kind in EVENT_TYPES and in_time:
        yield TimestampedValue((identity, (time_s, user, page, kind)), time_s)


class _FirstFn(beam.DoFn):
    SEEN = ReadModifyWriteStateSpec("seen", BooleanCoder())

    def __init__(self) -> None:
        self.accepted = Metrics.counter("bench", "accepted")

    def process(
        self, element: tuple[str, Event], seen: Any = beam.DoFn.StateParam(SEEN)
    ) -> Iterator[Event]:
        if not seen.read():
            seen.write(True)
            self.accepted.inc()
            yield element[1]


class _SessionFn(beam.CombineFn):
    """Start, end, views, clicks."""

    def create_accumulator(self) -> tuple[float, float, int, int]:
        return float("inf"), float("-inf"), 0, 0

    def add_input(self, accumulator: Any, element: Event) -> tuple[float, float, int, int]:
        start, end, views, clicks = accumulator
        time_s, _, _, kind = element
        return (
            min(start, time_s),
            max(end, time_s),
            views + (kind == PAGE_VIEW),
            clicks + (kind == CLICK),
        )

    def merge_accumulators(self, accumulators: Iterable[Any]) -> tuple[float, float, int, int]:
        starts, ends, views, clicks = zip(*accumulators, strict=True)
        return min(starts), max(ends), sum(views), sum(clicks)

    def extract_output(self, accumulator: Any) -> tuple[float, float, int, int]:
        start, end, views, clicks = accumulator
        return start, end, views, clicks
