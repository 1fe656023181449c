"""Schemas of what flows between a source and the tables: payloads, rows, dead letters.

The stages add columns to the columns that a pipeline declares for its rows:

    source    payload, offset, append_time
    parse     + the declared columns, identity     (or a dead letter)
    lateness  + verdict                            (payload ends here)
    dedupe    the declared columns and identity    (offset, append_time, verdict end here)
"""

import apache_beam as beam
import pyarrow as pa

from beam_pipelines.model.batches import one_of, require_columns, schema_of

EVENT_TIME = "event_time"
"""The column every row has: when it happened, in µs since 1970, UTC, years 1 to 9999."""

TIMESTAMP = pa.timestamp("us", tz="UTC")

MIN_EVENT_TIME_US = -62_135_596_800_000_000
"""0001-01-01T00:00:00Z."""

MAX_EVENT_TIME_US = 253_402_300_799_999_999
"""9999-12-31T23:59:59.999999Z."""

MAX_PAYLOAD_BYTES = 1 << 20
"""Larger records become dead letters."""

MAX_KEPT_BYTES = 8 * MAX_PAYLOAD_BYTES
"""What a dead letter keeps at most of a longer line of a file; its coordinates lead to the rest."""

PAYLOADS = pa.schema(
    [
        pa.field("payload", pa.binary(), nullable=True),  # null: a tombstone
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("append_time", TIMESTAMP),  # null: complete input, judged by nothing
    ]
)

IDENTITY = pa.field("identity", pa.uint64(), nullable=False)
"""Hash that records of one event share."""

VERDICTS = ("on_time", "late", "too_late", "future")
ON_TIME, LATE, TOO_LATE, FUTURE = range(4)
"""Codes of the `verdict` column."""

VERDICT = one_of("verdict", VERDICTS)

DEAD_LETTERS = pa.schema(
    [
        pa.field("payload", pa.binary()),  # the exact bytes; null: a tombstone
        pa.field("topic", pa.string(), nullable=False),
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("append_time", TIMESTAMP),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        # Behind the watermark where positive (too_late), ahead of its time where
        # negative (future), null where the record has no usable event time.
        pa.field("seconds_late", pa.float64()),
    ]
)


_APPEND_TIME_KEY = b"append_time"


def with_append_time(schema: pa.Schema, column: str) -> pa.Schema:
    """Mark the column that holds when a row was stored: `ClassifyLateness` judges by it.

    Raises:
      ValueError: there is no such column, or it is no time.
    """
    require_columns(schema, column)
    field = schema.field(column)
    if field.type != TIMESTAMP:
        raise ValueError(f"{column} must be {TIMESTAMP}, it is {field.type}")
    marked = field.with_metadata({**(field.metadata or {}), _APPEND_TIME_KEY: b""})
    return schema.set(schema.get_field_index(column), marked)


def append_time_of(schema: pa.Schema) -> str | None:
    """Return the column that is marked as the time a row was stored, or None."""
    marked = (field.name for field in schema if _APPEND_TIME_KEY in (field.metadata or {}))
    return next(marked, None)


def timed_schema_of(batches: beam.PCollection, *columns: str) -> pa.Schema:
    """Return the schema of a PCollection of batches that has these columns and EVENT_TIME.

    Raises:
      TypeError: its elements are not declared as batches.
      ValueError: a column is missing, or EVENT_TIME isn't in µs.
    """
    schema = schema_of(batches, EVENT_TIME, *columns)
    found = schema.field(EVENT_TIME).type
    if not pa.types.is_timestamp(found) or found.unit != "us":
        raise ValueError(f"{EVENT_TIME} must be {TIMESTAMP}, it is {found}")
    return schema


def declared_names(schema: pa.Schema) -> list[str]:
    """Return the columns of a rows schema that the pipeline itself declared."""
    stage_columns = {*PAYLOADS.names, IDENTITY.name, VERDICT.name}
    return [name for name in schema.names if name not in stage_columns]


def parsed_schema(declared: pa.Schema) -> pa.Schema:
    """Return what parsing yields for rows with these declared columns."""
    return pa.schema([*declared, IDENTITY, *(PAYLOADS.field(n) for n in _KEPT), PAYLOADS.field(0)])


def classified_schema(declared: pa.Schema) -> pa.Schema:
    """Return what the time rule yields: what the lake keeps."""
    return pa.schema([*declared, IDENTITY, *(PAYLOADS.field(n) for n in _KEPT), VERDICT])


def event_schema(declared: pa.Schema) -> pa.Schema:
    """Return what goes on to dedupe and beyond."""
    return pa.schema([*declared, IDENTITY])


_KEPT = ("offset", "append_time")
