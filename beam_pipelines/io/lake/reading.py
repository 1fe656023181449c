"""Reading a lake, also while it grows."""

import os

import pyarrow as pa
import pyarrow.dataset as ds

from beam_pipelines.io.lake.layout import OPEN, to_read
from beam_pipelines.io.publication import filesystem, listed
from beam_pipelines.model.records import LATE, ON_TIME, VERDICTS

_PARTITIONS = ds.partitioning(pa.schema([pa.field("event_date", pa.date32())]), flavor="hive")


def lake_files(folder: str | os.PathLike[str]) -> list[str]:
    """Return the files that hold each record of a lake once, relative to its folder.

    They hold all that was published, and of ranges that are not complete yet what was
    written last: nothing that an earlier call saw is missing. A file of a range that is not
    complete (`_open/`) may be replaced, and is removed ten seconds later or more.
    """
    # First those that vanish once a range is published: its files are then in the second.
    open_tails = listed(folder, OPEN)
    return to_read([*open_tails, *listed(folder)])


def open_lake(folder: str | os.PathLike[str]) -> ds.Dataset:
    """Return the records of a lake, each once, to be scanned; `event_date` is a column.

    Raises:
      FileNotFoundError: there are no files.
    """
    names = lake_files(folder)
    if not names:
        raise FileNotFoundError(f"{folder} holds no files of a lake")
    store, root = filesystem(folder)
    return ds.dataset(
        [f"{root}/{name}" for name in names],
        format="parquet",
        filesystem=store,
        partitioning=_PARTITIONS,
        partition_base_dir=root,
    )


def accepted_sql(records: str) -> str:
    """Return SQL for the records that count, each event once.

    Of the records of one identity it is the one stored first (by append time, then topic,
    partition and offset). A record that comes several times does no harm, so `records` may
    be any relation over the files of a lake that has `event_date`.
    """
    return (
        f"SELECT * FROM {records} "
        f"WHERE verdict IN ('{VERDICTS[ON_TIME]}', '{VERDICTS[LATE]}') "
        "QUALIFY row_number() OVER (PARTITION BY event_date, identity "
        'ORDER BY append_time, topic, "partition", "offset") = 1'
    )
