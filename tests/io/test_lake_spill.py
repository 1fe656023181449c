"""Rows that are too large for the state of the endless lake."""

import pyarrow.parquet as pq
import pytest

from beam_pipelines.io.lake import lake_files, open_lake, ranges, tail
from beam_pipelines.io.lake.layout import Range
from beam_pipelines.io.lake.ranges import RangeFiles
from beam_pipelines.io.publication import listed, remove
from beam_pipelines.model.batches import batch_of_rows
from beam_pipelines.model.span import Span
from tests.io.test_lake_histories import Job
from tests.io.test_lake_tail import MONDAY, SHOP, TUESDAY, order

RANGE = Range("orders", 3, 1_000, 1_080)  # its eighths have ten offsets
ROW_BYTES = 10_000


def element(start, end, row_bytes=ROW_BYTES, verdict="on_time"):
    rows = [order(offset, verdict) for offset in range(start, end)]
    for row in rows:
        row["order_id"] = f"{row['offset']:0{row_bytes}}"
    return Span(*RANGE, start, end, False), batch_of_rows(rows, SHOP)


class Lake:
    """A lake and one job that writes it, whose state is kept here."""

    def __init__(self, folder):
        self.folder = folder
        self.files = RangeFiles(str(folder), SHOP)
        self.writer = tail.WriteTailsFn(self.files, clock=lambda: 0.0)
        self.job = Job()

    def add(self, start, end, **rows):
        names = []
        for page in tail.PagesFn(self.files).process(element(start, end, **rows)):
            names += self.writer.process(page, self.job.progress, self.job.timer, *self.job.bags)
        return names

    def fire(self):
        self.writer.write_tail(tuple(RANGE), self.job.progress, *self.job.bags)

    @property
    def bag_bytes(self):
        return [sum(map(len, bag.pages)) for bag in self.job.bags]

    @property
    def spilled(self):
        return [name for name in listed(self.folder) if name.endswith(".arrow")]

    def offsets(self):
        return sorted(open_lake(self.folder).to_table(columns=["offset"])["offset"].to_pylist())


@pytest.fixture
def lake(tmp_path, monkeypatch):
    """Whose limits are a thousandth of the real ones: rows of 10 kB are like ones of 10 MB."""
    monkeypatch.setattr(tail, "PAGE_BYTES", 32 << 10)
    monkeypatch.setattr(tail, "PART_BYTES", 32 << 10)
    monkeypatch.setattr(tail, "ADDED_BYTES", 64 << 10)
    return Lake(tmp_path / "lake")


@pytest.fixture
def published(tmp_path):
    """The files of the range as they are when all rows fit into memory and state."""
    files = RangeFiles(str(tmp_path / "other"), SHOP)
    names = list(files.publish(RANGE, [element(RANGE.start, RANGE.end)[1]]))
    return {name: (tmp_path / "other" / name).read_bytes() for name in names}


@pytest.mark.parametrize("step", [1, 3, 7, 80])
def test_state_is_bounded_by_bytes_and_the_files_are_the_same(lake, step, published, monkeypatch):
    monkeypatch.setattr(ranges, "IN_MEMORY_BYTES", 100_000)  # so dates are read one by one
    largest = []
    for start in range(RANGE.start, RANGE.end, step):
        names = lake.add(start, min(start + step, RANGE.end))
        largest.append((max(lake.bag_bytes), sum(lake.bag_bytes)))
    assert max(bag for bag, _ in largest) < (32 + 64 + 32) << 10
    assert max(total for _, total in largest) < (8 * 32 + 64 + 32) << 10
    assert len(lake.spilled) >= 8 - 2  # the last ones were still small
    assert names == list(published)
    assert {name: (lake.folder / name).read_bytes() for name in names} == published
    lake.fire()
    assert listed(lake.folder) == sorted(published)


def test_what_was_put_aside_is_shown_and_grows(lake):
    for end in (1_004, 1_008, 1_025, 1_029):
        lake.add(lake.job.position if end != 1_004 else RANGE.start, end)
        lake.job.position = end
        lake.fire()
        assert lake.offsets() == list(range(RANGE.start, end))
    assert sum(lake.bag_bytes) < 8 * 32 << 10
    assert lake.spilled
    assert all(name not in lake.spilled for name in lake_files(lake.folder))


def test_rows_that_are_not_stored_are_not_put_aside(lake):
    lake.add(1_000, 1_010, verdict="future")
    assert lake.spilled == []
    assert sum(lake.bag_bytes) < 5 * ROW_BYTES  # of those that came after the others were dropped
    lake.add(1_010, 1_080, row_bytes=5)
    assert lake.offsets() == list(range(1_010, 1_080))


def test_a_job_that_goes_on_from_state_of_before_publication_leaves_it_as_it_is(lake):
    """What its state refers to was removed once the range was published."""
    lake.add(1_000, 1_030)
    before = lake.job.copy()
    lake.add(1_030, 1_080)
    lake.fire()
    files = {name: (lake.folder / name).read_bytes() for name in listed(lake.folder)}
    assert lake.spilled == []
    lake.job = before
    lake.add(1_030, 1_035)
    lake.fire()
    assert lake.offsets() == list(range(1_000, 1_080))
    lake.add(1_035, 1_080)
    lake.fire()
    assert {name: (lake.folder / name).read_bytes() for name in listed(lake.folder)} == files
    assert sum(lake.bag_bytes) == 0


def test_what_is_gone_of_a_range_that_is_not_published_is_an_error(lake):
    lake.add(1_000, 1_030)
    remove(lake.folder, lake.spilled[0])
    with pytest.raises(RuntimeError, match=r"arrow is gone from the lake, and offsets .1000, 1080"):
        lake.add(1_030, 1_080)


def test_row_groups_end_by_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "ROW_GROUP_BYTES", 100_500)
    files = RangeFiles(str(tmp_path), SHOP)
    batches = [element(start, start + 8)[1] for start in range(1_000, 1_080, 8)]
    [monday, _] = files.publish(RANGE, batches)
    groups = pq.ParquetFile(tmp_path / monday).metadata
    rows = [groups.row_group(number).num_rows for number in range(groups.num_row_groups)]
    assert rows == [10, 10, 10, 10]


def test_days_that_are_small_are_gathered_together(tmp_path, monkeypatch):
    """Six dates of some 10 kB, and 50 kB fit in memory."""
    monkeypatch.setattr(ranges, "IN_MEMORY_BYTES", 50_000)
    rows = [order(offset) | {"order_id": "x" * 5_000} for offset in range(1_000, 1_012)]
    for number, row in enumerate(rows):
        row["event_time"] = row["event_time"].replace(year=2020 + number % 3)
    read = []

    class Batches(list):
        def __iter__(self):
            read.append(1)
            return super().__iter__()

    files = RangeFiles(str(tmp_path), SHOP)
    names = list(files.publish(RANGE, Batches([batch_of_rows(rows, SHOP)]), size_bytes=60_000))
    years = [(name[:15], pq.ParquetFile(tmp_path / name).metadata.num_rows) for name in names]
    assert [rows for _, rows in years] == [2] * 6
    assert len(read) == 3, "once to see the dates, then for four of them, and for two"


def test_a_firing_lists_the_folder_of_its_partition_only(lake, monkeypatch):
    below = []
    monkeypatch.setattr(ranges, "listed", lambda *given: below.append(given[1:]) or listed(*given))
    lake.add(1_000, 1_004, row_bytes=5)
    lake.fire()
    assert below == [(f"_open/{RANGE.place}",)]
    assert {name.split("/")[2] for name in listed(lake.folder, "_open")} == {MONDAY, TUESDAY}
