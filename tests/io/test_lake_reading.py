from datetime import timedelta

import duckdb
import pytest

from beam_pipelines.io.lake import accepted_sql, lake_files, open_lake
from beam_pipelines.io.lake.layout import Range
from beam_pipelines.io.lake.ranges import RangeFiles
from beam_pipelines.model.batches import batch_of_rows
from beam_pipelines.model.records import classified_schema
from tests.io.test_lake import SHOP, order

ROWS = classified_schema(SHOP)
FIRST, SECOND = Range("orders", 0, 0, 10), Range("orders", 0, 10, 20)


@pytest.fixture
def folder(tmp_path):
    """A lake while the range that begins at 10 is open, with what its tails left behind."""
    files = RangeFiles(str(tmp_path), ROWS)
    published = [order(0), order(1), order(2, identity=1), order(3, verdict="too_late")]
    list(files.publish(FIRST, [batch_of_rows(published, ROWS)]))
    late = order(11, identity=0, verdict="late", append_time=order(0)["append_time"])
    early = order(12, identity=1, append_time=order(0)["append_time"] - timedelta(seconds=9))
    tail = [late, early, order(13)]
    files.write_open(FIRST, 0, [batch_of_rows(published[:2], ROWS)], 0, 2)
    files.write_open(SECOND, 10, [batch_of_rows(tail[:1], ROWS)], 10, 12)
    files.write_open(SECOND, 10, [batch_of_rows(tail, ROWS)], 12, 14)
    return tmp_path


def test_each_record_is_read_once(folder):
    assert len(lake_files(folder)) == 2
    offsets = open_lake(folder).to_table(columns=["offset"])["offset"].to_pylist()
    assert sorted(offsets) == [0, 1, 2, 3, 11, 12, 13]


def accepted(database, relation):
    sql = f'SELECT identity, "offset" FROM ({accepted_sql(relation)}) ORDER BY identity'
    return database.sql(sql).fetchall()


ACCEPTED = [(0, 0), (1, 12), (13, 13)]  # (identity, offset of its first sight)


def test_each_accepted_event_is_seen_once(folder):
    with duckdb.connect() as database:
        database.register("records", open_lake(folder))
        assert accepted(database, "records") == ACCEPTED


def test_superseded_files_do_no_harm_to_accepted_events(folder):
    with duckdb.connect() as database:
        every = f"read_parquet('{folder}/**/*.parquet', hive_types = {{'event_date': DATE}})"
        assert accepted(database, every) == ACCEPTED


def test_a_folder_without_files_is_an_error(tmp_path):
    assert lake_files(tmp_path / "none") == []
    with pytest.raises(FileNotFoundError, match="none holds no files of a lake"):
        open_lake(tmp_path / "none")


def test_a_folder_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="neither a local path nor s3://"):
        lake_files("hdfs://host/lake")
