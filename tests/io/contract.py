"""What every sink promises: at-least-once delivery leaves what one delivery leaves.

A test module makes a `Sink` and inherits `SinkContract`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

Written = list[Any]


LONG = ["/" + "é" * 1_500 + end for end in "xy"]
"""Texts that begin alike, and are longer than the 2,000 bytes of a key."""


def shortened_form(text: str) -> str:
    """Return what a text that is shortened becomes."""
    data = text.encode()
    mark = f"…sha256:{hashlib.sha256(data).hexdigest()}"
    return data[: 2_000 - len(mark.encode())].decode(errors="ignore") + mark


def stored_form(key: str) -> str:
    """Return what a table holds for a key."""
    return shortened_form(key) if len(key.encode()) > 2_000 or "…sha256:" in key else key


KEYS = [*LONG, shortened_form(LONG[0]), "…sha256:", "/short"]


class Sink(ABC):
    """A sink, some rows for it (one key of them twice in a row), and what they leave."""

    ROWS = 10

    @abstractmethod
    def elements(self, batch_rows: int) -> list[Any]:
        """Return the rows, always the same ones, in batches of so many."""

    @abstractmethod
    def nothing(self) -> list[Any]:
        """Return elements without rows."""

    @abstractmethod
    def hint(self) -> Any:
        """Return the type hint of the elements."""

    @abstractmethod
    def write(self) -> beam.PTransform:
        """Return the sink."""

    @abstractmethod
    def stored(self) -> Any:
        """Return what an outside reader finds; bytes, where the sink promises them."""

    @abstractmethod
    def expected_rows(self) -> Written:
        """Return the rows that a reader must find."""

    @abstractmethod
    def rows(self) -> Written:
        """Return the rows that a reader finds."""

    @abstractmethod
    def with_keys(self, keys: list[str], batch_rows: int) -> list[Any]:
        """Return rows with these keys, always the same ones, in batches of so many."""

    @abstractmethod
    def keys(self) -> list[str]:
        """Return the keys that a reader finds, sorted."""

    def key_of(self, key: str) -> str:
        """Return what a key is stored as; files store it as it is."""
        return stored_form(key)

    @abstractmethod
    def obstruct(self) -> None:
        """Make every write fail."""

    @abstractmethod
    def assert_closed(self) -> None:
        """Fail where a run that ended still holds something."""


def fail_before(element_index: int) -> Callable[[int], None]:
    """Return a check that raises when it meets an element of this index or a later one."""

    def check(index: int) -> None:
        if index >= element_index:
            raise ConnectionError("the worker is gone")

    return check


def run(
    sink: Sink,
    elements: Iterable[Any],
    *,
    replays: int = 0,
    check: Callable[[int], None] = lambda index: None,
) -> dict[str, int]:
    """Write elements, in order and in one bundle; return the counters."""
    numbered = list(enumerate(elements))

    def checked(numbered_element: tuple[int, Any]) -> Any:
        check(numbered_element[0])
        return numbered_element[1]

    pipeline = beam.Pipeline(runner=FnApiRunner(bundle_repeat=replays))
    _ = (
        pipeline
        | beam.Impulse()
        | "Elements" >> beam.FlatMap(lambda _: numbered)
        | "Check" >> beam.Map(checked).with_output_types(sink.hint())
        | "Write" >> sink.write()
    )
    counters = pipeline.run().metrics().query()["counters"]
    return {
        counter.key.metric.name: counter.committed
        for counter in counters
        if counter.key.metric.namespace == "beam_pipelines"
    }


class SinkContract:
    """The tests. `sink` is a fixture of the module that inherits them."""

    def test_rows_are_stored_and_a_repeated_key_as_the_sink_promises(self, sink):
        run(sink, sink.elements(sink.ROWS))
        assert sink.rows() == sink.expected_rows()

    def test_batches_without_rows_change_nothing(self, sink):
        run(sink, sink.nothing())
        run(sink, sink.elements(4))
        before = sink.stored()
        run(sink, sink.nothing())
        assert sink.stored() == before
        assert sink.rows() == sink.expected_rows()

    def test_the_same_rows_in_other_batches_leave_the_same(self, sink):
        run(sink, sink.elements(sink.ROWS))
        before = sink.stored()
        run(sink, sink.elements(3))
        run(sink, sink.elements(1))
        assert sink.stored() == before

    def test_replayed_bundles_change_nothing(self, sink):
        run(sink, sink.elements(4))
        before = sink.stored()
        run(sink, sink.elements(4), replays=2)
        assert sink.stored() == before
        assert sink.rows() == sink.expected_rows()

    def test_a_bundle_that_fails_midway_is_made_good_by_a_retry_with_other_batches(self, sink):
        with pytest.raises(Exception, match="the worker is gone"):
            run(sink, sink.elements(2), check=fail_before(3))
        run(sink, sink.elements(3))
        assert sink.rows() == sink.expected_rows()

    @pytest.mark.parametrize("batch_rows", [len(KEYS), 1])
    def test_long_keys_and_what_one_of_them_is_shortened_to_stay_apart(self, sink, batch_rows):
        run(sink, sink.with_keys(KEYS, batch_rows))
        run(sink, sink.with_keys(KEYS, batch_rows))
        assert sink.keys() == sorted(map(sink.key_of, KEYS))
        assert len(set(sink.keys())) == len(KEYS)

    def test_a_permanent_failure_is_raised(self, sink):
        sink.obstruct()
        with pytest.raises(Exception, match=r"(?i)exist|director|open"):
            run(sink, sink.elements(4))

    def test_nothing_is_held_after_a_run(self, sink):
        run(sink, sink.elements(4))
        sink.assert_closed()

    def test_nothing_is_held_after_a_run_that_failed(self, sink):
        run(sink, sink.elements(4))
        with pytest.raises(Exception, match="the worker is gone"):
            run(sink, sink.elements(2), check=fail_before(3))
        sink.assert_closed()


class TableContract(SinkContract):
    """Of sinks that add the rows of one run to those of another."""

    def test_long_keys_stay_apart_when_each_comes_alone(self, sink):
        for element in sink.with_keys(KEYS, 1):
            run(sink, [element])
        assert sink.keys() == sorted(map(sink.key_of, KEYS))
