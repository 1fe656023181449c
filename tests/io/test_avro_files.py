"""Avro containers as a source: the bytes of their records, as they stand there."""

import bz2
import gzip
import io
import json
import lzma
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import apache_beam as beam
import fastavro
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_pipelines.io import avro_blocks, avro_files
from beam_pipelines.io.avro_blocks import MAX_BLOCK_BYTES
from beam_pipelines.io.avro_files import ReadAvroFiles, read_avro_records, writer_schema
from beam_pipelines.io.files import RANGE_BYTES, match
from beam_pipelines.model.records import PAYLOADS
from beam_pipelines.model.span import Span

EVENT = {
    "type": "record",
    "name": "Event",
    "namespace": "demo",
    "fields": [
        {"name": "event_time", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "user_id", "type": "string"},
        {"name": "page_url", "type": ["null", "string"]},
        {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["view", "click"]}},
        {"name": "others", "type": {"type": "array", "items": "Kind"}},
    ],
}


def event(i: int) -> dict[str, Any]:
    return {
        "event_time": i * 10**15,  # soon beyond the year 9999, which Python can't hold
        "user_id": "u" * (i % 50),
        "page_url": None if i % 3 else "/é",
        "kind": "click",
        "others": ["view", "click"][: i % 3],
    }


EVENTS = [event(i) for i in range(1_000)]


def encoding(record: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, EVENT, record)
    return stream.getvalue()


def write(path: Path, codec: str = "deflate", records: list[dict] = EVENTS) -> str:
    with path.open("wb") as stream:
        fastavro.writer(stream, EVENT, records, codec=codec, sync_interval=1_000)
    return str(path)


def expected_rows(records: list[dict] = EVENTS) -> list[tuple[int, bytes]]:
    rows, offset = [], 0
    for record in records:
        rows.append((offset, encoding(record)))
        offset += len(rows[-1][1])
    return rows


def rows_of(spans: list) -> list[tuple[int, bytes]]:
    return [(row["offset"], row["payload"]) for _, batch in spans for row in batch.to_pylist()]


@pytest.mark.parametrize("codec", ["null", "deflate", "bzip2", "xz"])
def test_payloads_are_the_exact_bytes_of_the_records(tmp_path, codec):
    [file] = match(write(tmp_path / "events.avro", codec))
    spans = list(read_avro_records(file))
    assert rows_of(spans) == expected_rows()
    [(span, batch)] = spans
    end = sum(len(payload) for _, payload in expected_rows())
    assert span == Span(file.path, 0, 0, RANGE_BYTES, 0, end, True)
    assert batch.schema.equals(PAYLOADS)
    batch.validate(full=True)


@pytest.mark.parametrize("range_bytes", [1, 7, 1_000, 4_096])
def test_spans_tile_the_ranges(tmp_path, range_bytes, monkeypatch):
    monkeypatch.setattr(avro_files, "BLOCK_BYTES", 3_000)
    [file] = match(write(tmp_path / "events.avro"))
    spans = list(read_avro_records(file, range_bytes=range_bytes))
    assert rows_of(spans) == expected_rows()
    reached = 0
    for span, batch in spans:
        start = reached // range_bytes * range_bytes
        assert span[2:5] == (start, start + range_bytes, reached)
        assert all(span.start <= offset < span.end for offset in batch["offset"].to_pylist())
        reached = span.end
    assert reached == sum(len(payload) for _, payload in expected_rows())
    assert [span.end for span, _ in spans if span.last][-1] == reached
    assert sum(span.last for span, _ in spans) == -(-reached // range_bytes)


def test_the_writer_schema_decodes_the_payloads(tmp_path):
    [file] = match(write(tmp_path / "events.avro", records=EVENTS[:9]))
    schema = writer_schema(file.path)
    [(_, batch)] = read_avro_records(file)
    decoded = [
        fastavro.schemaless_reader(io.BytesIO(payload), schema)
        for payload in batch["payload"].to_pylist()
    ]
    assert [row["user_id"] for row in decoded] == [row["user_id"] for row in EVENTS[:9]]


def test_the_writer_schema_follows_a_file_that_is_rewritten(tmp_path):
    path = write(tmp_path / "events.avro")
    assert writer_schema(path)["name"] == "demo.Event"
    with open(path, "wb") as stream:
        fastavro.writer(stream, EVENT | {"name": "Other"}, [])
    assert writer_schema(path)["name"] == "demo.Other"


def test_a_container_within_gzip_is_read(tmp_path):
    path = Path(write(tmp_path / "events.avro"))
    packed = tmp_path / "events.avro.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert rows_of(list(read_avro_records(match(str(packed))[0]))) == expected_rows()


def test_a_container_without_records_is_one_empty_span(tmp_path):
    [file] = match(write(tmp_path / "none.avro", records=[]))
    [(span, batch)] = read_avro_records(file)
    assert span == Span(file.path, 0, 0, RANGE_BYTES, 0, 0, True)
    assert len(batch) == 0


@pytest.mark.parametrize("codec", ["null", "deflate"])
def test_a_container_cut_anywhere_between_blocks_is_an_error(tmp_path, codec):
    whole = Path(write(tmp_path / "events.avro", codec)).read_bytes()
    with (tmp_path / "events.avro").open("rb") as stream:
        borders = {block.offset for block in fastavro.block_reader(stream)}
    cut = tmp_path / "cut.avro"
    first = min(borders)
    for length in [*range(first + 1, first + 40), len(whole) - 17, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.avro can't be read .* the block after offset"):
            list(read_avro_records(match(str(cut))[0]))


def test_a_damaged_block_is_an_error_with_its_place(tmp_path):
    path = Path(write(tmp_path / "events.avro"))
    data = bytearray(path.read_bytes())
    with path.open("rb") as stream:
        second = list(fastavro.block_reader(stream))[1]
    data[second.offset + 10] ^= 0xFF
    path.write_bytes(data)
    match_text = rf"after offset \d+ of its records \(byte {second.offset} of the file\) is broken"
    with pytest.raises(ValueError, match=match_text):
        list(read_avro_records(match(str(path))[0]))


def number(value: int) -> bytes:
    value, encoded = (value << 1) ^ (value >> 63), bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def container(*blocks: bytes, codec: str = "null", **fields: Any) -> bytes:
    """A container of blocks that say anything; its records have the given fields, by name."""
    listed = [{"name": name, "type": kind} for name, kind in fields.items()]
    schema = {"type": "record", "name": "r", "fields": listed}
    meta = {"avro.schema": json.dumps(schema).encode(), "avro.codec": codec.encode()}
    pairs = [
        number(len(text)) + text for pair in meta.items() for text in (pair[0].encode(), pair[1])
    ]
    sync = b"0123456789abcdef"
    header = b"Obj\x01" + number(len(meta)) + b"".join(pairs) + number(0) + sync
    return header + b"".join(block + sync for block in blocks)


def block(records: int, data: bytes, size_bytes: int | None = None) -> bytes:
    return number(records) + number(len(data) if size_bytes is None else size_bytes) + data


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        # 139 bytes that hold any number of records of no bytes.
        (container(block(10**9, b""), a="null"), r"its 0 bytes hold 1000000000 records"),
        (container(block(2**62, b""), a="null"), r"its 0 bytes hold \d+ records"),
        (container(block(1, b""), a="null"), r"its 0 bytes hold 1 records"),
        (container(block(-1, b"")), r"its 0 bytes hold -1 records"),
        (container(block(10**9, b"\0\1"), a="boolean"), r"its 2 bytes hold 1000000000 records"),
        (container(block(2, b"\0\1"), a="null"), r"its 2 records end at 0 of 2 bytes"),
        (container(block(1, b"\0\1"), a="boolean"), r"its 1 records end at 1 of 2 bytes"),
        (container(block(1, b"\0", 2**62), a="boolean"), r"says that \d+ bytes follow; at most"),
        (container(block(1, b"\0", -1), a="boolean"), r"says that -1 bytes follow; at most"),
        (container(block(1, b"\0", MAX_BLOCK_BYTES + 1), a="boolean"), r"at most 67108864 make"),
        (
            container(block(1, b"\0", MAX_BLOCK_BYTES - 100), a="boolean"),
            r"the file ends within it",
        ),
        (container(b"\xff" * 30, a="boolean"), r"a number in it has more than 64 bits"),
        (container(block(1, b"\0"), a="boolean")[:-1] + b"x", r"its end isn't marked"),
    ],
)
def test_a_block_that_claims_what_it_does_not_hold_is_broken(tmp_path, content, complaint):
    path = tmp_path / "claims.avro"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"claims\.avro can't .* is broken: .*{complaint}"):
        list(read_avro_records(match(str(path))[0]))


def deflated(data: bytes) -> bytes:
    return zlib.compress(data)[2:-4]


@pytest.mark.parametrize(
    ("codec", "compress"),
    [("deflate", deflated), ("bzip2", bz2.compress), ("xz", lzma.compress)],
)
def test_a_block_is_not_decompressed_beyond_its_bound(tmp_path, codec, compress, monkeypatch):
    monkeypatch.setattr(avro_blocks, "MAX_BLOCK_BYTES", 10_000)
    path = tmp_path / "bomb.avro"
    path.write_bytes(container(block(10_000, compress(bytes(10_000))), codec=codec, a="boolean"))
    assert len(rows_of(list(read_avro_records(match(str(path))[0])))) == 10_000
    bomb = compress(bytes(1_000_000))
    assert len(bomb) < 2_000
    path.write_bytes(container(block(10**6, bomb), codec=codec, a="boolean"))
    expected = rf"its {len(bomb)} bytes are more than 10000 when decompressed"
    with pytest.raises(ValueError, match=expected):
        list(read_avro_records(match(str(path))[0]))


def test_a_block_is_not_decompressed_in_full_to_be_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(avro_blocks, "MAX_BLOCK_BYTES", 100_000)
    path = tmp_path / "bomb.avro"
    bomb = container(block(1, deflated(bytes(20_000_000))), codec="deflate", a="boolean")
    path.write_bytes(bomb)
    file, _ = match(str(path))[0], writer_schema(str(path))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="are more than 100000 when decompressed"):
            list(read_avro_records(file))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2_000_000


def test_a_header_that_claims_more_than_a_block_is_no_header(tmp_path):
    path = tmp_path / "header.avro"
    for claims in (number(1) + number(2**40), number(1) + number(-5), number(2**40)):
        path.write_bytes(b"Obj\x01" + claims + bytes(100))
        with pytest.raises(ValueError, match=r"header\.avro has no header of an Avro container"):
            writer_schema(str(path))


def test_records_of_a_byte_each_come_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(avro_files, "MAX_BATCH_RECORDS", 100)
    path = tmp_path / "small.avro"
    path.write_bytes(container(*[block(350, bytes(350))] * 2, a="boolean"))
    cut = [len(records) for records, _ in avro_files._blocks(match(str(path))[0])]
    assert cut == [100, 100, 100, 50] * 2
    spans = list(read_avro_records(match(str(path))[0]))
    assert rows_of(spans) == [(i, b"\0") for i in range(700)]


SMALL = container(block(3, b"\4ab\0\2c"), block(2, b"\0\2d"), a="string")


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.binary(max_size=9)), max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_container_damaged_anywhere_is_read_or_refused_with_its_name(folder, damages):
    data = bytearray(SMALL)
    for place, other in damages:
        data[place : place + 1] = other
    path = folder / "damaged.avro"
    path.write_bytes(data)
    avro_files._writer_schema.cache_clear()
    try:
        rows_of(list(read_avro_records(match(str(path))[0])))
    except ValueError as error:
        assert str(error).startswith(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


NULLS = {"type": "array", "items": "null"}
EMPTY = {"type": "array", "items": {"type": "fixed", "name": "F", "size": 0}}
NODE = {"type": "record", "name": "Node", "fields": [{"name": "next", "type": ["null", "Node"]}]}


@pytest.mark.parametrize(
    ("field", "complaint"),
    [
        (NULLS, "its items of an array take no bytes"),
        (EMPTY, "its items of an array take no bytes"),
        (NODE, "its type Node contains itself"),
    ],
)
def test_a_schema_by_which_a_few_bytes_claim_anything_is_refused(tmp_path, field, complaint):
    path = tmp_path / "schema.avro"
    path.write_bytes(container(block(1, number(10**10) + b"\0"), a=field))
    with pytest.raises(ValueError, match=rf"schema\.avro can't be read safely: {complaint}"):
        list(read_avro_records(match(str(path))[0]))


def test_an_unknown_codec_is_an_error(tmp_path):
    path = Path(write(tmp_path / "events.avro"))
    path.write_bytes(path.read_bytes().replace(b"\x0edeflate", b"\x0esnakeoi", 1))
    with pytest.raises(ValueError, match=r"events\.avro can't .* Unrecognized codec: snakeoi"):
        list(read_avro_records(match(str(path))[0]))


@pytest.mark.parametrize("content", [b"", b"Obj\x01", b'{"not": "avro"}\n'])
def test_a_file_that_is_no_container_is_an_error(tmp_path, content):
    path = tmp_path / "events.avro"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"events\.avro has no header of an Avro container"):
        list(read_avro_records(match(str(path))[0]))


def test_a_container_of_something_else_than_records_is_an_error(tmp_path):
    with (tmp_path / "strings.avro").open("wb") as stream:
        fastavro.writer(stream, "string", ["a"])
    with pytest.raises(ValueError, match=r"its schema must be a record"):
        writer_schema(str(tmp_path / "strings.avro"))


def test_a_file_that_changed_since_it_was_matched_is_an_error(tmp_path):
    path = tmp_path / "events.avro"
    [file] = match(write(path))
    write(path, records=EVENTS[:10])
    with pytest.raises(ValueError, match=r"events\.avro had \d+ bytes when the run began"):
        list(read_avro_records(file))


def test_the_transform_reads_every_file(tmp_path):
    one = write(tmp_path / "one.avro", records=EVENTS[:3])
    two = write(tmp_path / "two.avro", records=EVENTS[3:5])
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        payloads = (
            pipeline
            | ReadAvroFiles(match(f"{one},{two}"))
            | beam.FlatMap(
                lambda pair: [(pair[0].topic, p) for p in pair[1]["payload"].to_pylist()]
            )
        )
        expected = [(one, encoding(e)) for e in EVENTS[:3]] + [
            (two, encoding(e)) for e in EVENTS[3:5]
        ]
        assert_that(payloads, equal_to(expected))
