"""Publication and the lake on S3, as moto's server plays it."""

import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from beam_pipelines.io.lake import lake_files, open_lake, tail
from beam_pipelines.io.publication import (
    filesystem,
    listed,
    published,
    remove,
    remove_leftovers,
    scratch_path,
)
from tests.io.test_lake import LakeSink, run
from tests.io.test_lake_spill import Lake
from tests.io.test_lake_tail import MONDAY, RANGE, TUESDAY, WHOLE, Stream, pair


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def folder(endpoint, monkeypatch, request):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket = f"b-{abs(hash(request.node.name))}"
    options = f"scheme=http&endpoint_override={endpoint}&region=us-east-1"
    store, _ = fs.FileSystem.from_uri(f"s3://{bucket}?allow_bucket_creation=true&{options}")
    store.create_dir(bucket)
    return f"s3://{bucket}/deep/lake?{options}"


def test_a_file_appears_when_the_block_ends(folder):
    with published(folder, "a/b.txt") as path:
        path.write_text("new")
        assert listed(folder) == []
    assert listed(folder) == ["a/b.txt"]
    store, root = filesystem(folder)
    assert store.open_input_stream(f"{root}/a/b.txt").read() == b"new"


def test_a_failure_keeps_what_was_there(folder):
    with published(folder, "b.txt") as path:
        path.write_text("old")
    with pytest.raises(OSError, match="disk full"), published(folder, "b.txt") as path:
        path.write_text("half")
        raise OSError("disk full")
    store, root = filesystem(folder)
    assert store.open_input_stream(f"{root}/b.txt").read() == b"old"
    assert listed(folder) == ["b.txt"]


def test_a_large_file_is_one_object(folder):
    content = bytes(range(256)) * (12 << 12)  # 12 MB: more than a part of an upload
    with published(folder, "large") as path:
        path.write_bytes(content)
    store, root = filesystem(folder)
    assert store.open_input_stream(f"{root}/large").read() == content


def test_files_are_listed_by_folder_and_removed(folder):
    for name in ("one/a", "one/b", "two/c"):
        with published(folder, name) as path:
            path.write_text(name)
    assert listed(folder, "one") == ["one/a", "one/b"]
    remove(folder, "one/a")
    remove(folder, "one/a")
    assert listed(folder) == ["one/b", "two/c"]
    remove_leftovers(folder)
    assert listed(folder) == ["one/b", "two/c"]


def test_scratch_files_need_a_local_folder(folder):
    with pytest.raises(ValueError, match="is no local folder"):
        scratch_path(folder)


def test_a_bounded_lake_is_the_same_as_a_local_one(folder, tmp_path):
    local = LakeSink(tmp_path)
    run(local, local.elements(5))
    remote = LakeSink(tmp_path)
    remote.write = lambda: type(local.write())(folder)
    run(remote, remote.elements(5))
    assert lake_files(folder) == lake_files(local.folder)
    store, root = filesystem(folder)
    for name in lake_files(folder):
        whole = store.open_input_stream(f"{root}/{name}").read()
        assert whole == (local.folder / name).read_bytes()


def test_an_endless_lake_shows_its_tail_and_publishes(folder):
    stream = Stream().add(pair(100, 105)).processing_time(11)
    stream.write(folder, [])
    shown = listed(folder)
    assert shown == lake_files(folder)
    assert {name.rpartition("/")[0] for name in shown} == {
        f"_open/{RANGE.place}/{day}" for day in (MONDAY, TUESDAY)
    }
    table = open_lake(folder).to_table(columns=["offset", "event_date", "order_id"])
    assert table.schema.field("event_date").type == pa.date32()
    assert sorted(table["offset"].to_pylist()) == [100, 101, 102, 103, 104]
    stream = Stream().add(pair(100, 105), pair(105, 110)).processing_time(11)
    stream.write(folder, WHOLE)
    assert listed(folder) == WHOLE == lake_files(folder)
    assert open_lake(folder).count_rows() == RANGE.end - RANGE.start


def test_a_bucket_that_is_missing_is_an_error(folder):
    with (
        pytest.raises(OSError, match=r"(?i)bucket"),
        published(folder.replace("s3://b-", "s3://no-"), "a") as path,
    ):
        path.write_text("lost")


def test_rows_are_put_aside_read_back_and_found_gone(folder, monkeypatch):
    monkeypatch.setattr(tail, "PART_BYTES", 0)
    monkeypatch.setattr(tail, "ADDED_BYTES", 0)
    job = Lake(folder)
    job.add(1_000, 1_030)
    before = job.job.copy()
    assert len(job.spilled) == 3
    job.add(1_030, 1_080)
    job.fire()
    names = listed(folder)
    assert len(names) == 2
    assert open_lake(folder).count_rows() == 80
    job.job = before  # whose files were removed once the range was published
    job.add(1_030, 1_080)
    assert [name for name in listed(folder) if not name.startswith("_open")] == names
    assert open_lake(folder).count_rows() == 80
