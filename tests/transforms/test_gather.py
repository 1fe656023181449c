"""Batches that are gathered within a bundle."""

import pyarrow as pa
import pytest
from apache_beam.utils.timestamp import Timestamp

from beam_pipelines.transforms import gather
from beam_pipelines.transforms.gather import GatheringFn

TEXTS = pa.schema([("text", pa.string()), ("unused", pa.string())])


class Sizes(GatheringFn):
    def work(self, rows, earliest):
        yield len(rows), earliest


def batch(*texts):
    return pa.RecordBatch.from_pydict({"text": texts, "unused": ["z" * 900] * len(texts)}, TEXTS)


def assert_gathered(expected, batches):
    sizes = Sizes(("text",))
    sizes.start_bundle()
    out = [element.value for each in batches for element in sizes.process(each, Timestamp(5))]
    out += [element.value for element in sizes.finish_bundle()]
    assert out == expected


def test_the_batches_of_a_bundle_are_taken_together():
    assert_gathered([4], [batch("a", "b"), batch(), batch("c", "d")])


def test_no_more_are_taken_together_once_there_are_many_rows(monkeypatch):
    monkeypatch.setattr(gather, "GATHERED_ROWS", 3)
    assert_gathered([4, 1], [batch("a", "b"), batch("c", "d"), batch("e")])


@pytest.mark.parametrize(("limit_bytes", "expected"), [(1_000, [1, 2, 1]), (3_000, [4])])
def test_no_more_are_taken_together_once_they_are_large(monkeypatch, limit_bytes, expected):
    monkeypatch.setattr(gather, "GATHERED_BYTES", limit_bytes)
    assert_gathered(expected, [batch("a" * 1_000), batch("b"), batch("c" * 1_000), batch("d")])
