import hashlib
from datetime import UTC, datetime, timedelta

import apache_beam as beam
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from beam_pipelines.io.lake import WriteLake, lake_schema
from beam_pipelines.io.publication import remove_leftovers
from beam_pipelines.model.batches import BatchOf, batch_of_rows, empty_batch, one_of
from beam_pipelines.model.records import TIMESTAMP, classified_schema
from beam_pipelines.model.span import Span, spanned
from tests.io.contract import Sink, SinkContract, run

SHOP = pa.schema(
    [
        pa.field("event_time", TIMESTAMP, nullable=False),
        pa.field("order_id", pa.string(), nullable=False),
        pa.field("amount", pa.float64()),
        one_of("channel", ("web", "store")),
    ]
)
NOON = datetime(2026, 1, 5, 12, tzinfo=UTC)
RANGE = 10


def order(offset, *, hours=0, identity=None, verdict="on_time", **columns):
    return {
        "event_time": NOON + timedelta(hours=hours),
        "order_id": f"o-{offset}",
        "amount": offset / 4,
        "channel": "web" if offset % 2 else "store",
        "identity": offset if identity is None else identity,
        "offset": offset,
        "append_time": NOON + timedelta(hours=hours, seconds=offset),
        "verdict": verdict,
        **columns,
    }


ROWS = [
    order(0),
    order(1, hours=-24),
    order(2, verdict="late"),
    order(3, identity=2, order_id="o-2 again"),  # a re-send
    order(4, verdict="too_late"),
    order(5, verdict="future", hours=48),
    order(6, hours=-24),
    order(7, hours=13),  # the next day
    order(12),  # the second range; offsets between were invalid
    order(13),
]


class Stream:
    """One partition, as a source and the time rule yield it."""

    def __init__(self, rows, end=17, topic="orders"):
        self.rows, self.end, self.topic = rows, end, topic
        self.schema = classified_schema(SHOP)

    def spans(self, span_offsets):
        for range_start in range(0, self.end, RANGE):
            range_end = range_start + RANGE
            until = min(range_end, self.end)
            for start in range(range_start, until, span_offsets):
                end = min(start + span_offsets, until)
                rows = [row for row in self.rows if start <= row["offset"] < end]
                span = Span(self.topic, 0, range_start, range_end, start, end, end == until)
                yield span, batch_of_rows(rows, self.schema)


class LakeSink(Sink):
    def __init__(self, folder, rows=ROWS, topic="orders"):
        self.folder = folder / "lake"
        self.stream = Stream(rows, topic=topic)

    def elements(self, batch_rows):
        return list(self.stream.spans(batch_rows))

    def nothing(self):
        return [(Span("orders", 0, 50, 60, 50, 60, True), empty_batch(self.stream.schema))]

    def hint(self):
        return spanned(BatchOf(self.stream.schema))

    def write(self):
        return WriteLake(str(self.folder))

    def files(self):
        return sorted(self.folder.glob("**/*.parquet"))

    def stored(self):
        return {str(path): path.read_bytes() for path in self.files()}

    def rows(self):
        return duckdb.sql(
            'SELECT "offset", order_id, verdict, event_date::VARCHAR '
            f"FROM read_parquet('{self.folder}/**/*.parquet', hive_partitioning = true) ORDER BY 1"
        ).fetchall()

    def expected_rows(self):
        return [
            (row["offset"], row["order_id"], row["verdict"], row["event_time"].date().isoformat())
            for row in self.stream.rows
            if row["verdict"] != "future"
        ]

    def with_keys(self, keys, batch_rows):
        self.stream.rows = [order(i, order_id=key) for i, key in enumerate(keys)]
        return self.elements(batch_rows)

    def keys(self):
        return sorted(row[1] for row in self.rows())

    def key_of(self, key):
        return key

    def obstruct(self):
        self.folder.write_text("not a folder")

    def assert_closed(self):
        assert list(self.folder.glob("_tmp/*")) == []


@pytest.fixture
def sink(tmp_path):
    return LakeSink(tmp_path)


class TestContract(SinkContract):
    pass


TOPIC_HASH = hashlib.sha256(b"orders").hexdigest()[:12]


def test_a_range_becomes_one_file_per_date(sink):
    counters = run(sink, sink.elements(5))
    first, second = (
        f"orders-{TOPIC_HASH}-0-{start:012}-{start + 10:012}.parquet" for start in (0, 10)
    )
    assert [str(path.relative_to(sink.folder)) for path in sink.files()] == [
        f"event_date=2026-01-04/{first}",
        f"event_date=2026-01-05/{first}",
        f"event_date=2026-01-05/{second}",
        f"event_date=2026-01-06/{first}",
    ]
    assert counters == {"rows_written.lake": 9}


def test_the_names_of_the_published_files_come_out(sink, tmp_path):
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        names = (
            pipeline
            | beam.Impulse()
            | beam.FlatMap(lambda _: sink.elements(20)).with_output_types(sink.hint())
            | sink.write()
        )
        file_name = f"orders-{TOPIC_HASH}-0-{0:012}-{10:012}.parquet"
        second = f"orders-{TOPIC_HASH}-0-{10:012}-{20:012}.parquet"
        assert_that(
            names,
            equal_to(
                [
                    f"event_date=2026-01-04/{file_name}",
                    f"event_date=2026-01-05/{file_name}",
                    f"event_date=2026-01-06/{file_name}",
                    f"event_date=2026-01-05/{second}",
                ]
            ),
        )


def test_columns_keep_their_types_and_gain_the_coordinates(sink):
    run(sink, sink.elements(20))
    table = pq.ParquetFile(sink.files()[1]).read()
    assert table.column_names == [
        *SHOP.names,
        *("identity", "topic", "partition", "offset", "append_time", "verdict"),
    ]
    assert table.schema.field("event_time").type == TIMESTAMP
    assert table.schema.field("append_time").type == TIMESTAMP
    assert table.schema.field("identity").type == pa.uint64()
    assert all(pa.types.is_dictionary(table.schema.field(n).type) for n in ("channel", "verdict"))
    assert table.to_pylist()[2] == {
        **ROWS[3],
        "topic": "orders",
        "partition": 0,
    }


def test_payloads_are_not_stored():
    with_payload = classified_schema(SHOP).append(pa.field("payload", pa.binary()))
    assert "payload" not in lake_schema(with_payload).names


def test_ranges_may_take_turns(sink, tmp_path):
    run(sink, sink.elements(3))
    expected = {path.name: path.read_bytes() for path in sink.files()}
    other = LakeSink(tmp_path / "other")
    elements = other.elements(3)
    first = [e for e in elements if e[0].range_start == 0]
    second = [e for e in elements if e[0].range_start == 10]
    run(other, [first[0], second[0], first[1], first[2], second[1], first[3], second[2]])
    assert {path.name: path.read_bytes() for path in other.files()} == expected


def test_a_missing_span_is_an_error(sink):
    elements = sink.elements(3)
    with pytest.raises(Exception, match=r"starts at 6, but the ones before it reach to 3"):
        run(sink, [elements[0], *elements[2:]])


def test_a_bundle_that_ends_within_a_range_is_an_error_and_publishes_nothing_of_it(sink):
    elements = sink.elements(3)
    with pytest.raises(Exception, match=r"ends at 9, within offsets \[0, 10\) of orders"):
        run(sink, elements[:3])
    assert sink.files() == []


def test_topics_that_read_alike_get_different_files(tmp_path):
    for topic in ("logs/a b.gz", "logs/a-b.gz", "old/a-b.gz", "日本"):
        run(one := LakeSink(tmp_path, ROWS[:1], topic), one.elements(20))
    names = [path.name for path in one.files()]
    assert len(names) == 4
    assert all(name.isascii() and "/" not in name and " " not in name for name in names)


def test_dates_have_four_digit_years_also_before_1970(tmp_path):
    rows = [
        order(0, event_time=datetime(1, 1, 1, tzinfo=UTC)),
        order(1, event_time=datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        order(2, event_time=datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
    ]
    run(sink := LakeSink(tmp_path, rows), sink.elements(1))
    assert [path.parent.name for path in sink.files()] == [
        "event_date=0001-01-01",
        "event_date=1969-12-31",
        "event_date=9999-12-31",
    ]
    assert sink.rows() == sink.expected_rows()


def test_complete_input_has_no_append_time(tmp_path):
    run(sink := LakeSink(tmp_path, [order(0, append_time=None)]), sink.elements(20))
    assert pq.ParquetFile(sink.files()[0]).read()["append_time"].to_pylist() == [None]


def test_many_rows_give_the_same_bytes_in_any_batches(tmp_path):
    rows = [order(i, hours=i % 30) for i in range(2_000)]
    stored = []
    for name, size in (("a", 2_000), ("b", 137)):
        sink = LakeSink(tmp_path / name, rows)
        sink.stream.end = 2_000
        run(sink, [(s, b) for s, b in _one_range(sink.stream, size)])
        stored.append({path.name: path.read_bytes() for path in sink.files()})
    assert stored[0] == stored[1]
    assert len(sink.rows()) == 2_000


def _one_range(stream, size):
    for start in range(0, stream.end, size):
        end = min(start + size, stream.end)
        span = Span("orders", 0, 0, stream.end, start, end, end == stream.end)
        yield span, batch_of_rows(stream.rows[start:end], stream.schema)


def test_leftovers_of_a_crash_are_invisible_and_removed(sink):
    (sink.folder / "_tmp").mkdir(parents=True)
    (sink.folder / "_tmp" / "half.tmp").write_bytes(b"PAR1 half")
    run(sink, sink.elements(5))
    assert sink.rows() == sink.expected_rows()
    remove_leftovers(sink.folder)
    remove_leftovers(sink.folder)
    assert sink.rows() == sink.expected_rows()
    assert not (sink.folder / "_tmp").exists()
