"""Files: matching, looking at the beginning, and lines in spans against a naive reader."""

import gzip
import io
import os
import tracemalloc
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_pipelines.io import files
from beam_pipelines.io.files import ReadLines, detect_format, match, read_lines
from beam_pipelines.model.records import PAYLOADS
from beam_pipelines.model.span import Span

Spans = list[tuple[Span, pa.RecordBatch]]

texts = st.lists(
    st.sampled_from(
        [b"a", b"bc", b"\xff\x00", b"x" * 40, b"\n", b"\n\n", b"\r\n", b"\r", b"\r\r\n"]
    ),
    max_size=30,
).map(b"".join)


def naive_lines(text: bytes) -> list[tuple[int, bytes]]:
    lines, offset = [], 0
    for line in io.BytesIO(text):
        payload = line[:-2] if line.endswith(b"\r\n") else line.removesuffix(b"\n")
        lines.append((offset, payload))
        offset += len(line)
    return lines


def lines_of(spans: Spans) -> list[tuple[int, bytes]]:
    return [(row["offset"], row["payload"]) for _, batch in spans for row in batch.to_pylist()]


def assert_tiled(spans: Spans, path: str, size_bytes: int, range_bytes: int) -> None:
    """The spans lie end to end within their ranges, and hold the records in them."""
    reached = 0
    for span, batch in spans:
        start = reached // range_bytes * range_bytes if reached < size_bytes else 0
        assert span[:4] == (path, 0, start, start + range_bytes)
        assert span.start == reached <= span.end <= span.range_end
        assert span.last == (span.end in (span.range_end, size_bytes))
        offsets = batch["offset"].to_pylist()
        assert offsets == sorted(o for o in offsets if span.start <= o < span.end)
        assert batch.schema.equals(PAYLOADS) and batch["append_time"].null_count == len(batch)
        batch.validate(full=True)
        reached = span.end
    assert reached == size_bytes and spans[-1][0].last


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines")


@given(text=texts, range_bytes=st.integers(1, 50), block_bytes=st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_ranges_of_a_plain_file_yield_each_line_once(folder, text, range_bytes, block_bytes):
    path = folder / "plain.log"
    path.write_bytes(text)
    [file] = match(str(path))
    spans = [
        pair
        for start in range(0, max(len(text), 1), range_bytes)
        for pair in read_lines(file, start, range_bytes=range_bytes, block_bytes=block_bytes)
    ]
    assert lines_of(spans) == naive_lines(text)
    assert_tiled(spans, str(path), len(text), range_bytes)


@given(
    parts=st.lists(texts, min_size=1, max_size=3),
    range_bytes=st.integers(1, 50),
    block_bytes=st.integers(1, 20),
)
@settings(max_examples=200, deadline=None)
def test_a_gzip_file_of_any_members_yields_the_lines_of_its_text(
    folder, parts, range_bytes, block_bytes
):
    path = folder / "packed.gz"
    path.write_bytes(b"".join(gzip.compress(part) for part in parts))
    [file] = match(str(path))
    spans = list(read_lines(file, range_bytes=range_bytes, block_bytes=block_bytes))
    assert lines_of(spans) == naive_lines(b"".join(parts))
    assert_tiled(spans, str(path), len(b"".join(parts)), range_bytes)


@given(text=texts, range_bytes=st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_a_plain_file_is_cut_alike_in_ranges_and_as_a_whole(folder, text, range_bytes):
    path = folder / "both.log"
    path.write_bytes(text)
    [file] = match(str(path))
    whole = list(read_lines(file, range_bytes=range_bytes))
    ranges = [
        pair
        for start in range(0, max(len(text), 1), range_bytes)
        for pair in read_lines(file, start, range_bytes=range_bytes)
    ]
    assert [(s, b.to_pylist()) for s, b in whole] == [(s, b.to_pylist()) for s, b in ranges]


def test_a_batch_holds_no_more_rows_than_it_may(tmp_path):
    path = tmp_path / "blank.log"
    path.write_bytes(b"\n" * 110_001)
    batches = [len(batch) for _, batch in read_lines(match(str(path))[0])]
    assert batches == [50_000, 50_000, 10_001]


def test_a_line_longer_than_blocks_and_ranges_is_whole(tmp_path):
    path = tmp_path / "long.log"
    text = b"first\n" + b"x" * 5_000_000 + b"\nlast"
    path.write_bytes(text)
    [file] = match(str(path))
    starts = range(0, len(text), 1_000_000)
    spans = [pair for s in starts for pair in read_lines(file, s, range_bytes=1_000_000)]
    assert lines_of(spans) == naive_lines(text)
    assert_tiled(spans, str(path), len(text), 1_000_000)


@given(text=texts, range_bytes=st.integers(1, 50), block_bytes=st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_of_a_long_line_the_beginning_is_kept_and_the_lines_around_it(
    folder, text, range_bytes, block_bytes
):
    kept_bytes = 7
    plain, packed = folder / "long.log", folder / "long.gz"
    plain.write_bytes(text)
    packed.write_bytes(gzip.compress(text))
    sizes = {"range_bytes": range_bytes, "block_bytes": block_bytes}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "MAX_KEPT_BYTES", kept_bytes)
        spans = [
            pair
            for start in range(0, max(len(text), 1), range_bytes)
            for pair in read_lines(match(str(plain))[0], start, **sizes)
        ]
        whole = list(read_lines(match(str(packed))[0], **sizes))
    expected = [(offset, payload[:kept_bytes]) for offset, payload in naive_lines(text)]
    assert lines_of(spans) == lines_of(whole) == expected
    assert_tiled(spans, str(plain), len(text), range_bytes)
    assert_tiled(whole, str(packed), len(text), range_bytes)


def test_an_endless_line_takes_no_memory_and_its_length_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "MAX_KEPT_BYTES", 1 << 17)
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", 1) as stream:
        stream.write(b"first\n" + bytes(64 << 20) + b"\nlast")
    [file] = match(str(path))
    tracemalloc.start()
    try:
        lines = lines_of(list(read_lines(file, block_bytes=1 << 16)))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lines == [(0, b"first"), (6, bytes(1 << 17)), ((64 << 20) + 7, b"last")]
    assert peak_bytes < 2 << 20
    assert caplog.messages == [
        f"'{path}': the line at offset 6 has 67108864 bytes; its dead letter keeps the first 131072"
    ]


@pytest.mark.parametrize("name", ["plain.log", "packed.gz"])
def test_an_empty_file_is_one_span_without_records(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    [(span, batch)] = read_lines(match(str(path))[0])
    assert span == Span(str(path), 0, 0, files.RANGE_BYTES, 0, 0, True)
    assert len(batch) == 0


@pytest.mark.parametrize("kept_bytes", [0, 1, 9, 200, -9, -1])
def test_a_gzip_file_cut_short_is_an_error(tmp_path, kept_bytes):
    path = tmp_path / "cut.log.gz"
    path.write_bytes(gzip.compress(os.urandom(1_000))[:kept_bytes])
    with pytest.raises(ValueError, match=r"cut\.log\.gz can't be decompressed .* after offset \d+"):
        list(read_lines(match(str(path))[0], block_bytes=100))


@pytest.mark.parametrize("damage", ["in the data", "in the checksum", "garbage behind"])
def test_a_damaged_gzip_file_is_an_error(tmp_path, damage):
    data = bytearray(gzip.compress(b"line\n" * 100))
    if damage == "garbage behind":
        data += b"garbage"
    else:
        data[12 if damage == "in the data" else -5] ^= 0xFF
    path = tmp_path / "damaged.gz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.gz can't be decompressed"):
        list(read_lines(match(str(path))[0]))


@pytest.mark.parametrize("change", [b"more\n", None])
def test_a_file_that_changed_since_it_was_matched_is_an_error(tmp_path, change):
    path = tmp_path / "live.log"
    path.write_bytes(b"one\ntwo\n")
    [file] = match(str(path))
    path.write_bytes(path.read_bytes() + change if change else b"one\n")
    with pytest.raises(ValueError, match=r"live\.log had 8 bytes when .* and has (13|4) now"):
        list(read_lines(file))


def test_a_file_that_grows_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "live.log"
    path.write_bytes(b"one\n" * 100)
    spans = read_lines(match(str(path))[0], block_bytes=10)
    next(spans)
    with path.open("ab") as stream:
        stream.write(b"more\n")
    with pytest.raises(ValueError, match=r"had 400 bytes when .* and has 405 now"):
        list(spans)


@pytest.mark.parametrize("range_bytes", [8, 1_000])
def test_a_file_rewritten_with_as_many_bytes_while_it_is_read_is_an_error(tmp_path, range_bytes):
    path = tmp_path / "live.log"
    path.write_bytes(b"one\n" * 100)
    os.utime(path, (1_000, 1_000))
    spans = read_lines(match(str(path))[0], 0, range_bytes=range_bytes, block_bytes=10)
    next(spans)
    path.write_bytes(b"two\n" * 100)
    os.utime(path, ns=(0, 1_500_000_000_000))
    expected = r"live\.log was modified .* 1970-01-01T00:16:40\.000000Z .*T00:25:00\.000000Z now"
    with pytest.raises(ValueError, match=expected):
        list(spans)


def test_the_transform_reads_ranges_of_plain_files_and_whole_gzip_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RANGE_BYTES", 10)
    monkeypatch.setattr(read_lines, "__kwdefaults__", {"range_bytes": 10, "block_bytes": 4})
    (tmp_path / "a.log").write_bytes(b"plain 1\nplain 2\r\nplain 3")
    (tmp_path / "b.log.gz").write_bytes(gzip.compress(b"packed 1\n\npacked 2\n"))
    a, b = str(tmp_path / "a.log"), str(tmp_path / "b.log.gz")

    def rows(pair):
        span, batch = pair
        return [
            (span.topic, r["offset"], r["payload"], span.range_start) for r in batch.to_pylist()
        ]

    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        lines = pipeline | "Read" >> ReadLines(match(f"{tmp_path}/*.log*"))
        assert_that(
            lines | beam.FlatMap(rows),
            equal_to(
                [
                    (a, 0, b"plain 1", 0),
                    (a, 8, b"plain 2", 0),
                    (a, 17, b"plain 3", 10),
                    (b, 0, b"packed 1", 0),
                    (b, 9, b"", 0),
                    (b, 10, b"packed 2", 10),
                ]
            ),
        )
        last = lines | beam.Filter(lambda pair: pair[0].last)
        assert_that(last | beam.combiners.Count.Globally(), equal_to([5]), label="ranges end")


def test_patterns_match_each_file_once_sorted_and_no_folders(tmp_path):
    for name in ("b.log", "a.log", "deep/c.log", "a[1].log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x\n")
    found = match(f"{tmp_path}/*,{tmp_path}/b.log,{tmp_path}/**/c.log,{tmp_path}/a[1].log")
    names = [os.path.relpath(file.path, tmp_path) for file in found]
    assert names == ["a.log", "a[1].log", "b.log", "deep/c.log"]
    modified_us = os.stat(tmp_path / "a.log").st_mtime_ns // 1_000
    assert (found[0].size_bytes, found[0].modified_us) == (2, modified_us)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_of_the_names_of_one_file_one_is_read_and_the_others_are_named(tmp_path, caplog, link):
    (tmp_path / "folder").mkdir()
    (tmp_path / "b.log").write_bytes(b"x\n")
    link(tmp_path / "b.log", tmp_path / "c.log")
    link(tmp_path / "b.log", tmp_path / "folder" / "d.log")
    os.symlink(tmp_path / "folder", tmp_path / "a_folder")
    os.symlink(tmp_path / "b.log", tmp_path / "a.log")
    (tmp_path / "other.log").write_bytes(b"x\n")
    found = match(f"{tmp_path}/*.log,{tmp_path}/./b.log,{tmp_path}/*/*.log")
    # The first that is no link, within folders that are none.
    assert [os.path.relpath(file.path, tmp_path) for file in found] == ["b.log", "other.log"]
    assert found[0].path == f"{tmp_path}/./b.log"
    left_out = ("a.log", "a_folder/d.log", "b.log", "c.log", "folder/d.log")
    assert caplog.messages == [
        f"'{tmp_path}/{name}' is left out: it is the same file as '{found[0].path}'"
        for name in left_out
    ]


def test_a_link_to_a_file_that_nothing_else_names_is_read_by_its_own_name(tmp_path, caplog):
    (tmp_path / "data").write_bytes(b"x\n")
    os.symlink(tmp_path / "data", tmp_path / "current.log")
    assert [file.path for file in match(f"{tmp_path}/*.log")] == [f"{tmp_path}/current.log"]
    assert caplog.messages == []


def test_a_file_whose_name_is_not_utf8_is_refused_by_its_name(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.log", "wb") as stream:
        stream.write(b"x\n")
    with pytest.raises(ValueError, match=r"the file b'.*/caf\\xe9\.log' is not UTF-8.*rename it"):
        match(f"{tmp_path}/c*.log")


def test_a_pattern_without_a_file_is_an_error(tmp_path):
    (tmp_path / "a.log").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*/\*\.gz'"):
        match(f"{tmp_path}/a.log,{tmp_path}/*.gz")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        match(str(tmp_path))


LOG_LINE = b'10.0.0.1 - - [17/May/2015:10:05:03 +0000] "GET / HTTP/1.1" 200 5\n'
EVENT = b'{"event_time":"2026-01-05T09:00:00Z","page_url":"/ [x] \\"y\\""}\n'


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (EVENT * 3, "ndjson"),
        (b"\n\r\n  " + EVENT + b"garbage\n" * 9, "ndjson"),
        (LOG_LINE, "access_log"),
        (b"example.com:80 " + LOG_LINE, "access_log"),
        (b"[::1]:80 " + LOG_LINE, "access_log"),
        (LOG_LINE * 60 + EVENT * 40 + EVENT * 500, "access_log"),
        (b"Obj\x01\x02whatever", "avro"),
        (b"", None),
        (b"\n \r\n", None),
    ],
)
def test_the_beginning_tells_the_format(tmp_path, pack, text, expected):
    path = tmp_path / "input"
    path.write_bytes(pack(text))
    assert detect_format(str(path)) == expected


@pytest.mark.parametrize("text", [b"hello\nworld\n", LOG_LINE + EVENT, bytes(range(256)) * 30])
def test_an_unknown_format_asks_for_the_flag(tmp_path, text):
    path = tmp_path / "input"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="say --format=ndjson"):
        detect_format(str(path))
