"""From what the flags name to the sources and sinks that do it.

The one place that knows the schemes. What a run doesn't use is never imported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import apache_beam as beam

from beam_pipelines.kernels.decode import Decoder
from beam_pipelines.model.activity import ACCESS_LOG_COLUMNS, ACCESS_LOG_CONSTANTS, ACTIVITY
from beam_pipelines.model.records import EVENT_TIME
from beam_pipelines.model.tables import Table
from beam_pipelines.options import DEMO, ActivityConfig

if TYPE_CHECKING:
    from beam_pipelines.io.files import InputFile

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
class Sinks:
    """Where a run writes to."""

    write_lake: beam.PTransform
    write_enriched: beam.PTransform
    write_dead_letters: beam.PTransform
    write_table: Callable[[Table], beam.PTransform]


def open_source(config: ActivityConfig) -> Source:
    """Look up the source that `--input` names.

    Raises:
      FileNotFoundError: it names no file.
      ValueError: the files have no format, or not all the same.
    """
    return _demo(config) if config.input == DEMO else _files(config)


def open_sinks(config: ActivityConfig, processing_time: str) -> Sinks:
    """Look up the sinks that the flags name.

    Args:
      config: The flags.
      processing_time: RFC 3339 time to put beside every enriched event.
    """
    from beam_pipelines.io.duckdb import WriteToDuckDB
    from beam_pipelines.io.lake import WriteLake
    from beam_pipelines.io.sorted_files import WriteSortedFiles

    return Sinks(
        write_lake=WriteLake(config.lake),
        write_enriched=WriteSortedFiles(
            config.enriched,
            "ndjson",
            sort_by=(EVENT_TIME, "identity"),
            sink="enriched",
            shard_by="identity",
            shards=ENRICHED_SHARDS,
            columns=tuple(ACTIVITY.names),
            constants={"processing_time": processing_time},
        ),
        write_dead_letters=WriteSortedFiles(
            config.dead_letters,
            "parquet",
            sort_by=("topic", "partition", "offset", "stage"),
            sink="dead_letters",
        ),
        write_table=partial(WriteToDuckDB, path=config.database_path),
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
