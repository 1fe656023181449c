"""Several runs on one lake: up to where the topic ended, and without end."""

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from beam_pipelines.io.lake import WriteLake, lake_files
from beam_pipelines.model.batches import BatchOf
from beam_pipelines.model.span import spanned
from beam_pipelines.telemetry import tally
from tests.io.test_lake_tail import (
    MONDAY,
    SHOP,
    TUESDAY,
    WIDE,
    Stream,
    files,
    offsets,
    opened,
    pair,
)

NEXT = WIDE._replace(start=WIDE.end, end=WIDE.end + 80)
PUBLISHED = [f"{day}/{WIDE.name}.parquet" for day in (MONDAY, TUESDAY)]


def until_end(folder, end, start=WIDE.start):
    """Write as a bounded run does that reads the topic from `start` on, to where it ends."""
    pairs = []
    for of in (WIDE, NEXT):
        for at in range(max(start, of.start), min(end, of.end), 15):
            to = min(at + 15, end, of.end)
            span, rows = pair(at, to, of=of, last=to in (end, of.end))
            pairs.append((span._replace(open=to == end != of.end), rows))
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        given = beam.Create(pairs, reshuffle=False).with_output_types(spanned(BatchOf(SHOP)))
        _ = pipeline | given | WriteLake(str(folder))


def without_end(folder, end):
    """Write as an endless run does that has seen the topic up to `end` when it is stopped."""
    stream = Stream()
    for at in range(WIDE.start, end, 20):
        stream.add(pair(at, min(at + 20, end), of=WIDE)).processing_time(11)
    stream.write(folder, PUBLISHED if end == WIDE.end else [])


def test_a_run_up_to_the_end_leaves_the_last_range_open_by_eighths(tmp_path):
    before = tally().get("rows_written.lake", 0)
    until_end(tmp_path, 127)
    parts = [(110, 100), (120, 110), (127, 120)]
    assert files(tmp_path) == [opened(day, *part) for day in (MONDAY, TUESDAY) for part in parts]
    assert offsets(tmp_path) == list(range(100, 127))
    assert tally()["rows_written.lake"] - before == 27


def test_a_range_that_the_topic_filled_is_published(tmp_path):
    until_end(tmp_path, 180)
    assert files(tmp_path) == PUBLISHED
    until_end(tmp_path / "further", 183)
    assert [name for name in files(tmp_path / "further") if "_open" not in name] == PUBLISHED
    assert offsets(tmp_path / "further") == list(range(100, 183))


@pytest.mark.parametrize("ends", [(103, 127), (127, 145), (127, 127), (127, 180), (130, 200)])
def test_an_endless_run_goes_on_and_nothing_is_hidden(tmp_path, ends):
    first, then = ends
    until_end(tmp_path, first)
    without_end(tmp_path, min(then, WIDE.end))
    assert offsets(tmp_path) == list(range(100, min(then, WIDE.end)))


@pytest.mark.parametrize("ends", [(103, 127), (127, 145), (127, 127), (127, 180), (130, 200)])
def test_a_run_up_to_the_end_may_follow_an_endless_one(tmp_path, ends):
    first, then = ends
    without_end(tmp_path, first)
    until_end(tmp_path, then)
    assert offsets(tmp_path) == list(range(100, then))


def test_a_repeated_run_that_reaches_further_shows_each_record_once(tmp_path):
    for end in (101, 119, 119, 127, 128, 129, 130):
        until_end(tmp_path, end)
        assert offsets(tmp_path) == list(range(100, end))
    left = [name for name in files(tmp_path) if f"-{120:012}-" in name]
    assert left == [opened(day, end, 120) for day in (MONDAY, TUESDAY) for end in (129, 130)]
    until_end(tmp_path, 190)
    assert offsets(tmp_path) == list(range(100, 190))
    assert set(PUBLISHED) < set(lake_files(tmp_path))
