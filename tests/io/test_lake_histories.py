"""Random histories of the endless lake: crashes, replays, replaced workers that write late.

The real writer runs on state kept here. What it does to the folder is recorded and played
back operation by operation: all of it, a part (a crash), or later, between those of others.
After every operation a reader must find each record at most once, all that any reader found
before, and at the end everything.
"""

import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_pipelines.io.lake import lake_files, ranges, tail
from beam_pipelines.io.lake.ranges import RangeFiles
from beam_pipelines.io.publication import published, remove, stored
from tests.io.test_lake_tail import RANGE as SHORT
from tests.io.test_lake_tail import SHOP, pair

RANGE = SHORT._replace(end=SHORT.start + 24)


@pytest.fixture(autouse=True, scope="module")
def nothing_is_synced():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


class Bag:
    def __init__(self, pages):
        self.pages = list(pages)

    def add(self, page):
        self.pages.append(page)

    def read(self):
        return self.pages

    def clear(self):
        self.pages = []


class Value:
    def __init__(self, value):
        self.value = value

    def read(self):
        return self.value

    def write(self, value):
        self.value = value

    def clear(self):
        self.value = None


class Timer:
    def __init__(self, due):
        self.due = due

    def set(self, due):
        self.due = due


class Job:
    """What a checkpoint holds of a range: its state, its timer, and where the source is."""

    def __init__(self, pages=((),) * 8, progress=None, due=None, position=RANGE.start):
        self.saved = ([tuple(bag) for bag in pages], progress, due, position)
        self.bags = [Bag(pages) for pages in self.saved[0]]
        self.progress = Value(progress)
        self.timer = Timer(due)
        self.position = position

    @property
    def pages(self):
        return [page for bag in self.bags for page in bag.pages]

    def copy(self):
        bags = [bag.pages for bag in self.bags]
        return Job(bags, self.progress.value, self.timer.due, self.position)


class World:
    def __init__(self, folder):
        self.folder = folder
        self.files = RangeFiles(str(folder), SHOP)
        self.pages = tail.PagesFn(self.files)
        self.job = Job()
        self.checkpoint = Job()
        self.late = []  # what replaced workers have still to do
        self.seen = set()
        self.shelf = 0

    def play(self, operations):
        for kind, name, content in operations:
            if kind == "remove":
                remove(self.folder, name)
            else:
                with published(self.folder, name) as path:
                    path.write_bytes(content)
            self.read()

    def read(self):
        paths = [self.folder / name for name in lake_files(self.folder)]
        found = [o for path in paths for o in pq.ParquetFile(path).read()["offset"].to_pylist()]
        assert len(found) == len(set(found)), "a record is there twice"
        assert self.seen <= set(found), "a record was there before"
        self.seen = set(found)

    def deliver(self, job, sizes):
        """The operations of a bundle with the next spans, of these many offsets."""
        writer = tail.WriteTailsFn(self.files, clock=lambda: 0.0)
        with recorded() as operations:
            for size in sizes:
                end = min(job.position + size, RANGE.end)
                if job.position < end:
                    for element in self.pages.process(pair(job.position, end, of=RANGE)):
                        list(writer.process(element, job.progress, job.timer, *job.bags))
                job.position = end
        return operations

    def fire(self, job):
        writer = tail.WriteTailsFn(self.files, clock=lambda: 0.0)
        with recorded() as operations:
            if job.timer.due is not None:
                job.timer.due = None
                writer.write_tail(tuple(RANGE), job.progress, *job.bags)
        return operations


@contextmanager
def recorded():
    operations = []

    @contextmanager
    def put(_, name):
        with TemporaryDirectory() as scratch:
            path = Path(scratch, "file")
            yield path
            operations.append(("put", name, path.read_bytes()))

    def content(folder, name):
        """What a writer finds, its own files of this bundle included."""
        own = [content for kind, put, content in operations if kind == "put" and put == name]
        return own[-1] if own else stored(folder, name)

    before = ranges.published, ranges.remove, ranges.stored
    ranges.stored = content
    ranges.published = put
    ranges.remove = lambda _, name: operations.append(("remove", name, None))
    try:
        yield operations
    finally:
        ranges.published, ranges.remove, ranges.stored = before


SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=2)
STEPS = st.one_of(
    st.tuples(st.just("deliver"), SIZES),
    st.tuples(st.just("fire"), st.none()),
    st.tuples(st.just("checkpoint"), st.none()),
    st.tuples(st.just("crash"), st.tuples(st.booleans(), SIZES, st.integers(0, 6), st.booleans())),
    st.tuples(st.just("late"), st.integers(0, 5)),
    st.tuples(st.just("complete"), st.none()),
)


LIMITS = st.sampled_from([(1 << 20, 1 << 20), (0, 1 << 20), (0, 0), (1_200, 2_000)])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(STEPS, min_size=8, max_size=25), LIMITS, st.booleans())
def test_readers_find_each_record_once_whatever_happened(steps, limits, in_memory):
    """Also when rows are put aside: at each firing, after each page, or now and then."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "PART_BYTES", limits[0])
        patch.setattr(tail, "ADDED_BYTES", limits[1])
        patch.setattr(ranges, "IN_MEMORY_BYTES", 1 << 20 if in_memory else 0)
        world = World(Path(folder))
        for step, value in steps:
            if step == "deliver":
                world.play(world.deliver(world.job, value))
            elif step == "fire":
                world.play(world.fire(world.job))
                assert world.seen >= set(range(RANGE.start, world.job.position))
            elif step == "complete":  # published, and ten seconds later tidied
                world.play(world.deliver(world.job, [RANGE.end - RANGE.start]))
                world.play(world.fire(world.job))
            elif step == "checkpoint":
                world.checkpoint = world.job.copy()
            elif step == "crash":  # in a bundle, of which a part was done, the rest comes late
                fires, sizes, done, replaced = value
                job = world.job
                operations = world.fire(job) if fires else world.deliver(job, sizes)
                world.play(operations[:done])
                if replaced:
                    world.late += operations[done:]
                world.job = world.checkpoint.copy()
            elif world.late:
                world.play([world.late.pop(value % len(world.late))])
        world.play(world.deliver(world.job, [RANGE.end - RANGE.start]))
        world.play(world.late)  # and only then what a replaced worker had still to do
        world.play(world.fire(world.job))
        assert world.seen == set(range(RANGE.start, RANGE.end))
        assert world.job.pages == []
        world.job = world.checkpoint  # once more, from state whose files were tidied away
        world.play(world.deliver(world.job, [2]))
        world.play(world.fire(world.job))
        world.play(world.deliver(world.job, [RANGE.end - RANGE.start]))
        world.play(world.fire(world.job))
        assert world.seen == set(range(RANGE.start, RANGE.end))
        assert world.job.pages == []


def test_rows_wait_in_a_bag_for_each_eighth_and_one_that_is_too_large_is_logged(
    tmp_path, monkeypatch, caplog
):
    files = RangeFiles(str(tmp_path), SHOP)
    of = RANGE._replace(end=RANGE.start + 32)  # eighths of four offsets, in spans of three
    pages = [
        page
        for start in range(of.start, of.end, 3)
        for page in tail.PagesFn(files).process(pair(start, min(start + 3, of.end), of=of))
    ]
    size = max(len(page) for _, page in pages)
    monkeypatch.setattr(tail, "BAG_BYTES", size)
    job = Job()
    writer = tail.WriteTailsFn(files, clock=lambda: 5.0)
    process = [writer.process(page, job.progress, job.timer, *job.bags) for page in pages]
    written = []
    for each in process[:-1]:
        assert list(each) == []
        written.append(job.progress.value)
    assert [len(bag.pages) for bag in job.bags] == [2, 2, 2, 2, 2, 2, 2, 1]
    assert len(set(written)) == 1, "progress is written once until the tail is"
    assert 5.0 < job.timer.due < 15.0
    assert caplog.records == []  # none was read
    assert len(list(process[-1])) == 2
    large = [record.message for record in caplog.records]
    assert len(large) == 8
    assert all(message.startswith(f"{of}: a bag of rows holds ") for message in large)
    assert [bag.pages for bag in job.bags] == [[]] * 8
    assert len(lake_files(tmp_path)) == 2


def test_partitions_that_begin_together_take_turns_and_then_keep_their_pace(tmp_path):
    files = RangeFiles(str(tmp_path), SHOP)
    clock = [100.0]
    writer = tail.WriteTailsFn(files, clock=lambda: clock[0])

    def deliver(job, of, start):
        for element in tail.PagesFn(files).process(pair(start, start + 2, of=of)):
            list(writer.process(element, job.progress, job.timer, *job.bags))

    firsts = []
    for partition in range(20):
        of, job = RANGE._replace(partition=partition), Job()
        deliver(job, of, of.start)
        firsts.append(job.timer.due - 100)
        writer.write_tail(tuple(of), job.progress, *job.bags)
        deliver(job, of, of.start + 2)
        assert job.timer.due == 110.0, "a reader has ten seconds for a file that it found"
    assert min(firsts) >= 0
    assert max(firsts) < 10
    assert len({int(first) for first in firsts}) > 6
