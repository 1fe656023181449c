"""From what the flags name to the sources and sinks that do it.

The one place that knows the schemes. What a run doesn't use is never imported.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import apache_beam as beam

from beam_pipelines.config import DEMO, KAFKA, ActivityConfig, topics
from beam_pipelines.kernels.decode import Decoder
from beam_pipelines.model.activity import (
    ACCESS_LOG_COLUMNS,
    ACCESS_LOG_CONSTANTS,
    ACTIVITY,
    EVENT_ID,
    TABLES,
    USER,
)
from beam_pipelines.model.records import EVENT_TIME, IDENTITY, event_schema
from beam_pipelines.model.tables import Table

if TYPE_CHECKING:
    from beam_pipelines.io.cassandra.cluster import CassandraCluster
    from beam_pipelines.io.files import InputFile
    from beam_pipelines.io.kafka.client import KafkaCluster
    from beam_pipelines.io.kafka.sink import JsonRecords

ENRICHED_SHARDS = 8
"""Files that the accepted events are divided among."""


@dataclass(frozen=True)
class Source:
    """What a run reads.

    Args:
      read: The source; yields (Span, batch of PAYLOADS).
      format: `ndjson`, `access_log` or `avro`.
      decoder: Turns the payloads into rows of ACTIVITY.
      identity: What tells this input from another, as JSON values.
      as_of_us: The time that stands for now (µs since 1970), unless a flag says otherwise.
      records: How many there are; None: unknown.
    """

    read: beam.PTransform
    format: str
    decoder: Decoder
    identity: dict[str, Any]
    as_of_us: int
    records: int | None


@dataclass(frozen=True)
class ByKey:
    """Where a run stores what is asked by user and by page."""

    write_events: beam.PTransform
    write_page_views: beam.PTransform


@dataclass(frozen=True)
class Sinks:
    """Where a run writes to; `by_key` is optional."""

    write_lake: beam.PTransform
    write_enriched: beam.PTransform
    write_dead_letters: beam.PTransform
    write_table: Callable[[Table], beam.PTransform]
    by_key: ByKey | None = None


def open_source(config: ActivityConfig, readers: int = 1) -> Source:
    """Look up the source that `--input` names.

    Args:
      config: The flags.
      readers: Units that the partitions of topics are divided into.

    Raises:
      FileNotFoundError: it names no file.
      ValueError: the files have no format, or not all the same.
    """
    if config.topics:
        return _kafka(config, readers)
    return _demo(config) if config.input == DEMO else _files(config)


def open_sinks(config: ActivityConfig, processing_time: str = "") -> Sinks:
    """Look up the sinks that the flags name.

    Args:
      config: The flags.
      processing_time: RFC 3339 time to put beside every enriched event in a folder; a
        topic's have the time they are published at.
    """
    from beam_pipelines.io.lake import WriteLake

    return Sinks(
        write_lake=WriteLake(config.lake),
        write_enriched=_enriched(config, processing_time),
        write_dead_letters=_dead_letters(config),
        write_table=_tables(config),
        by_key=_by_key(config),
    )


def _enriched(config: ActivityConfig, processing_time: str) -> beam.PTransform:
    if config.enriched.startswith(KAFKA):
        from beam_pipelines.io.kafka.sink import WriteToKafka

        topic = topics(config.enriched)[0]
        return WriteToKafka(topic, _cluster(config), _enriched_records(), "enriched")
    from beam_pipelines.io.sorted_files import WriteSortedFiles

    return WriteSortedFiles(
        config.enriched,
        "ndjson",
        sort_by=(EVENT_TIME, "identity"),
        sink="enriched",
        shard_by="identity",
        shards=ENRICHED_SHARDS,
        columns=tuple(ACTIVITY.names),
        constants={"processing_time": processing_time},
    )


def _enriched_records() -> "JsonRecords":
    from beam_pipelines.io.kafka.sink import JsonRecords

    return JsonRecords(
        key=USER,
        columns=tuple(ACTIVITY.names),
        time_field="processing_time",
        fill={EVENT_ID: IDENTITY.name},
    )


def _dead_letters(config: ActivityConfig) -> beam.PTransform:
    if config.dead_letters.startswith(KAFKA):
        from beam_pipelines.io.kafka.sink import DeadLetterRecords, WriteToKafka

        topic = topics(config.dead_letters)[0]
        return WriteToKafka(topic, _cluster(config), DeadLetterRecords(), "dead_letters")
    from beam_pipelines.io.sorted_files import WriteSortedFiles

    return WriteSortedFiles(
        config.dead_letters,
        "parquet",
        sort_by=("topic", "partition", "offset", "stage"),
        sink="dead_letters",
    )


def _tables(config: ActivityConfig) -> Callable[[Table], beam.PTransform]:
    if config.secret is not None:
        from beam_pipelines.io.postgres import WriteToPostgres

        return partial(WriteToPostgres, database=config.secret)
    from beam_pipelines.io.duckdb import WriteToDuckDB

    return partial(WriteToDuckDB, path=config.database_path)


def _by_key(config: ActivityConfig) -> ByKey | None:
    if config.cassandra is None:
        return None
    from beam_pipelines.by_key import EVENTS_BY_USER, PAGE_VIEWS_BY_PAGE
    from beam_pipelines.io.cassandra.write import WriteToCassandra
    from beam_pipelines.transforms.hold import Hold

    cluster = _cassandra(config)
    # What a server pays for is partitions, that is users, in a bundle: together they have fewer.
    hold = Hold(EVENTS_BY_USER.partition_key[0], config.cassandra.every_s, config.window_shards)
    return ByKey(
        write_events=hold | WriteToCassandra(EVENTS_BY_USER, cluster),
        write_page_views=WriteToCassandra(PAGE_VIEWS_BY_PAGE, cluster),
    )


def _checks(config: ActivityConfig) -> tuple[Callable[[], object], ...]:
    """Return what makes sure that all ends can be reached, before anything is read."""
    checks: list[Callable[[], object]] = []
    if config.enriched.startswith(KAFKA):
        from beam_pipelines.io.kafka.client import largest_taken

        least_bytes = _enriched_records().least_bytes(event_schema(ACTIVITY))
        topic = topics(config.enriched)[0]
        checks.append(partial(largest_taken, _cluster(config), topic, least_bytes))
    if config.dead_letters.startswith(KAFKA):
        from beam_pipelines.io.kafka.client import largest_taken
        from beam_pipelines.io.kafka.sizes import LEAST_BYTES

        topic = topics(config.dead_letters)[0]
        checks.append(partial(largest_taken, _cluster(config), topic, LEAST_BYTES))
    if config.secret is not None:
        from beam_pipelines.io.postgres import check_postgres

        checks.append(partial(check_postgres, config.secret, TABLES))
    if config.cassandra is not None:
        from beam_pipelines.by_key import EVENTS_BY_USER, PAGE_VIEWS_BY_PAGE
        from beam_pipelines.io.cassandra.cluster import check_cassandra

        tables = (EVENTS_BY_USER, PAGE_VIEWS_BY_PAGE)
        checks.append(partial(check_cassandra, _cassandra(config), tables))
    return tuple(checks)


def _cassandra(config: ActivityConfig) -> "CassandraCluster":
    from beam_pipelines.io.cassandra.cluster import parse_cluster

    assert config.cassandra is not None
    return parse_cluster(
        config.cassandra.cluster,
        consistency=config.cassandra.consistency,
        user=config.cassandra.user,
        password=config.cassandra.password,
    )


def _cluster(config: ActivityConfig) -> "KafkaCluster":
    from beam_pipelines.io.kafka.client import KafkaCluster

    return KafkaCluster(config.kafka.bootstrap_servers or "", config.kafka.config_file)


def _kafka(config: ActivityConfig, readers: int) -> Source:
    from beam_pipelines.io.kafka.source import ReadKafka

    if config.format not in ("auto", "ndjson"):
        raise ValueError(f"records of topics are read as ndjson, not --format={config.format}")
    return Source(
        read=ReadKafka(
            _cluster(config),
            config.topics,
            config.time.out_of_orderness_s,
            start=config.kafka.start,
            until_end=config.kafka.until_end,
            append_time=config.kafka.append_time,
            readers=readers,
            group=config.kafka.group,
            settings=config.state_settings,
            checks=_checks(config),
        ),
        format="ndjson",
        decoder=_ndjson(config),
        identity={
            "topics": list(config.topics),
            "start": config.kafka.start,
            "append_time": config.kafka.append_time,
        },
        as_of_us=time.time_ns() // 1000,
        records=None,
    )


def _demo(config: ActivityConfig) -> Source:
    from beam_pipelines.demo import CHUNK_RECORDS, DemoTraffic
    from beam_pipelines.io.generated import ReadGenerated

    traffic = DemoTraffic(config.demo_events, config.seed)
    return Source(
        read=ReadGenerated(
            traffic.payloads,
            traffic.events,
            CHUNK_RECORDS,
            DEMO,
            config.time.out_of_orderness_s,
        ),
        format="ndjson",
        decoder=_ndjson(config),
        identity={"demo_events": traffic.events, "seed": traffic.seed},
        as_of_us=traffic.as_of_us,
        records=traffic.events,
    )


def _files(config: ActivityConfig) -> Source:
    from beam_pipelines.io.files import ReadLines, match

    files = match(config.input)
    name = config.format if config.format != "auto" else _common_format(config, files)
    read: beam.PTransform = ReadLines(files)
    decoder: Decoder
    if name == "access_log":
        decoder = _access_log()
    elif name == "avro":
        from beam_pipelines.io.avro_files import ReadAvroFiles, writer_schema
        from beam_pipelines.kernels.avro import AvroDecoder

        read = ReadAvroFiles(files)
        decoder = AvroDecoder(ACTIVITY, config.fields, config.values, writer_schema)
    else:
        decoder = _ndjson(config)
    return Source(
        read=read,
        format=name,
        decoder=decoder,
        identity={
            "files": {
                file.path: f"{file.size_bytes} bytes, modified {file.modified_us}" for file in files
            }
        },
        as_of_us=max(file.modified_us for file in files),
        records=None,
    )


def _common_format(config: ActivityConfig, files: Sequence["InputFile"]) -> str:
    from beam_pipelines.io.files import detect_format

    found = {detect_format(file.path): file.path for file in reversed(files)}
    formats = {name: path for name, path in found.items() if name is not None}
    if len(formats) > 1:
        examples = ", ".join(f"{path} is {name}" for name, path in formats.items())
        raise ValueError(f"--input={config.input} has several formats: {examples}; read them apart")
    return next(iter(formats), "ndjson")


def _ndjson(config: ActivityConfig) -> Decoder:
    from beam_pipelines.kernels.ndjson import NdjsonDecoder

    return NdjsonDecoder(ACTIVITY, config.fields, config.values)


def _access_log() -> Decoder:
    from beam_pipelines.kernels.access_log import AccessLogDecoder

    return AccessLogDecoder(ACTIVITY, ACCESS_LOG_COLUMNS, ACCESS_LOG_CONSTANTS)
