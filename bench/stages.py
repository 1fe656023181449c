"""Each stage by itself: its kernel over what the stage gets in a run.

The stages have the names that the pipeline gives them. All speeds are in records of the
stream per second, so they add up: the time of the core is that of its stages, and Beam's,
and that of the glue between them, which `python -m bench.profile` shows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.demo import DemoTraffic
from beam_pipelines.io.duckdb import create_table_sql, merged, upsert_sql
from beam_pipelines.io.lake import ROW_GROUP_ROWS
from beam_pipelines.io.ndjson import ndjson
from beam_pipelines.io.parquet import write_parquet
from beam_pipelines.io.sorted_files import merged_runs
from beam_pipelines.kernels.columns import divided, hashes, micros, shards_of
from beam_pipelines.kernels.counts import counts_per_slice, summed
from beam_pipelines.kernels.hashing import hash_strings, hash_with
from beam_pipelines.kernels.hyperloglog import sketches
from beam_pipelines.kernels.lateness import judge
from beam_pipelines.kernels.ndjson import NdjsonDecoder
from beam_pipelines.kernels.secure_hashing import RepeatedHashes
from beam_pipelines.kernels.seen import SeenTable
from beam_pipelines.kernels.sessions import SESSION_ROWS, SessionRule, first_names, scan
from beam_pipelines.model.activity import (
    ACTIVITY,
    CLICK,
    EVENT_TYPES,
    PAGE_VIEW,
    SESSION_END,
    SESSION_START,
    TABLES,
)
from beam_pipelines.model.batches import BatchCoder, concatenated
from beam_pipelines.model.records import MAX_EVENT_TIME_US, event_schema
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.options import SHARDS_IN_PROCESS
from bench import pipelines
from bench.measure import Workload, timed

_MINUTE_US = 60_000_000
_SESSIONS = SessionRule(
    gap_us=1_800_000_000,
    start=EVENT_TYPES.index(SESSION_START),
    end=EVENT_TYPES.index(SESSION_END),
    counted=(("page_views", EVENT_TYPES.index(PAGE_VIEW)), ("clicks", EVENT_TYPES.index(CLICK))),
)


@dataclass(frozen=True)
class Inputs:
    """What each stage gets in a run over a stream.

    Args:
      traffic: The stream.
      payloads: Batches as the source yields them.
      classified: Batches as the time rule yields them, for the lake.
      events: Batches with every event once.
      tables: Batches of rows by table name.
    """

    traffic: DemoTraffic
    payloads: Sequence[pa.RecordBatch]
    classified: Sequence[pa.RecordBatch]
    events: Sequence[pa.RecordBatch]
    tables: Mapping[str, Sequence[pa.RecordBatch]]

    @classmethod
    def of(cls, traffic: DemoTraffic) -> "Inputs":
        """Run the pipeline over a stream, and keep what reaches its sinks."""
        pipelines.hold(traffic)
        kept = pipelines.run_core(keep=True)
        return cls(
            traffic,
            [traffic.payloads(i) for i in range(traffic.chunks)],
            [batch for _, batch in kept["lake"]],
            kept["enriched"],
            {table.name: kept[table.name] for table in TABLES},
        )


def workloads(inputs: Inputs) -> list[Workload]:
    """Return the stages, in the order an event meets them."""
    return [
        Workload(name, inputs.traffic.events, partial(timed, partial(stage, inputs)))
        for name, stage in _STAGES.items()
    ]


def _generate(inputs: Inputs) -> None:
    for i in range(inputs.traffic.chunks):
        inputs.traffic.payloads(i)


def _decode(inputs: Inputs) -> None:
    decode = NdjsonDecoder(ACTIVITY)
    for batch in inputs.payloads:
        decode(batch["payload"], "demo")


def _identify(inputs: Inputs) -> None:
    for batch in inputs.classified:
        hash_with(hash_strings(batch["event_id"]), micros(batch["event_time"]))


def _judge(inputs: Inputs) -> None:
    for batch in inputs.classified:
        judge(batch["event_time"], batch["append_time"], TimeRule())


def _deduplicate(inputs: Inputs) -> None:
    tables = [SeenTable() for _ in range(SHARDS_IN_PROCESS)]
    columns = event_schema(ACTIVITY).names
    for batch in inputs.classified:
        rows = batch.select(columns)
        shards = shards_of(hashes(rows["identity"]), SHARDS_IN_PROCESS).astype(np.int64)
        for shard, part in divided(rows, shards):
            part.filter(pa.array(tables[shard].add(hashes(part["identity"]))))


def _encode_and_decode(inputs: Inputs) -> None:
    coder = BatchCoder(event_schema(ACTIVITY))
    for batch in inputs.events:
        coder.decode(coder.encode(batch))


def _count_views(inputs: Inputs) -> None:
    rows = _joined(inputs.events)
    views = rows.filter(pc.equal(rows["event_type"], PAGE_VIEW))
    counts = counts_per_slice(micros(views["event_time"]) // _MINUTE_US, views["page_url"])
    for _, window in divided(counts.select(["value", "count"]), counts["slice"].to_numpy()):
        summed([window])


def _count_users(inputs: Inputs) -> None:
    rows = _joined(inputs.events)
    minutes = micros(rows["event_time"]) // _MINUTE_US
    sketches(minutes - minutes.min(), hash_strings(rows["user_id"]))


def _sessionize(inputs: Inputs) -> None:
    rows = _joined(inputs.events)
    keys, times = RepeatedHashes()(rows["user_id"]), micros(rows["event_time"])
    names = first_names(keys, times // _MINUTE_US, rows["user_id"])
    kinds = rows["event_type"].indices
    reduced = pa.RecordBatch.from_arrays(
        [pa.array(keys), rows["event_time"], kinds, names], schema=SESSION_ROWS
    )
    none_open = _SESSIONS.open_schema.empty_table()
    for _, part in divided(reduced, shards_of(keys, SHARDS_IN_PROCESS).astype(np.int64)):
        scan(none_open, part, MAX_EVENT_TIME_US, _SESSIONS)


def _write_lake(inputs: Inputs) -> None:
    rows = concatenated(list(inputs.classified), inputs.classified[0].schema)
    groups = (rows.slice(start, ROW_GROUP_ROWS) for start in range(0, len(rows), ROW_GROUP_ROWS))
    with TemporaryDirectory() as folder:
        write_parquet(groups, Path(folder, "lake.parquet"))


def _write_enriched(inputs: Inputs) -> None:
    runs = [_joined(inputs.events)]
    with TemporaryDirectory() as folder, Path(folder, "enriched.ndjson").open("wb") as file:
        for rows in merged_runs(runs, ["event_time", "identity"]):
            file.write(ndjson(rows.select(ACTIVITY.names)))


def _store_tables(inputs: Inputs) -> None:
    with TemporaryDirectory() as folder, duckdb.connect(f"{folder}/tables.duckdb") as database:
        for table in TABLES:
            database.execute(create_table_sql(table))
            stored = concatenated(list(inputs.tables[table.name]), table.schema)
            database.register("stored", merged(stored, table))
            database.execute(upsert_sql(table, "stored"))


def _joined(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return concatenated(list(batches), batches[0].schema)


_STAGES: dict[str, Callable[[Inputs], None]] = {
    "Read activity: generate": _generate,
    "Parse: decode NDJSON": _decode,
    "Parse: identity": _identify,
    "Classify lateness": _judge,
    "Deduplicate": _deduplicate,
    "to the next stage and back": _encode_and_decode,
    "Count page views": _count_views,
    "Count active users": _count_users,
    "Sessionize": _sessionize,
    "Write lake": _write_lake,
    "Publish enriched": _write_enriched,
    "Store tables": _store_tables,
}
