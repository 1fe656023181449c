"""Avro records, one per payload, as they stand in a container file."""

import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import UUID

import fastavro
import pyarrow as pa

from beam_pipelines.kernels import decode
from beam_pipelines.kernels.decode import Decoded, Field, RejectedError


@dataclass(frozen=True)
class AvroDecoder:
    """Decodes Avro's binary encoding of one record per payload into rows of a schema.

    Columns are read from the fields like those of `NdjsonDecoder`, with the same rejections;
    a time may be a string (RFC 3339), a long (epoch milliseconds), a timestamp-millis or a
    timestamp-micros. Enums are texts, and so are UUIDs.

    Args:
      schema: The columns.
      fields: Column → its field in the records, where their names differ.
      values: `one_of` column → text in the records → value of the column.
      writer_schema: Returns the schema, parsed by fastavro, that the records of a topic or
        file were written with. Must be picklable.

    Raises:
      ValueError: the arguments name columns or values that are not in the schema, or the
        type of a column is not supported.
    """

    schema: pa.Schema
    fields: Mapping[str, str]
    values: Mapping[str, Mapping[str, str]]
    writer_schema: Callable[[str], dict[str, Any]]

    def __post_init__(self) -> None:
        _ = self._fields

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.schema, self.fields, self.values, self.writer_schema)

    def __call__(self, payloads: pa.BinaryArray, topic: str) -> Decoded:
        """Decode records that were written with the schema of a topic."""
        written = self.writer_schema(topic)
        return decode.completed(
            self.schema,
            self._fields,
            payloads,
            [],
            lambda payload: self._read_one(payload, written),
        )

    @cached_property
    def _fields(self) -> tuple[Field, ...]:
        return decode.fields_of(self.schema, self.fields, self.values)

    def _read_one(self, payload: bytes | None, written: dict[str, Any]) -> tuple[Any, ...]:
        stream = io.BytesIO(decode.present(payload))
        try:
            record = fastavro.schemaless_reader(stream, written, None)
        except UnicodeDecodeError:
            raise RejectedError(decode.BAD_TEXT, "a string is not UTF-8") from None
        except OverflowError:
            raise RejectedError(
                decode.TIME_OUT_OF_RANGE, "a timestamp lies outside the years 1 to 9999"
            ) from None
        except _GARBAGE as error:
            raise RejectedError(
                decode.BAD_AVRO, f"not as its schema says: {type(error).__name__}"
            ) from None
        rest = len(stream.read())
        if rest:
            raise RejectedError(decode.BAD_AVRO, f"{rest} bytes follow the record")
        if not isinstance(record, dict):
            raise RejectedError(decode.NOT_AN_OBJECT, "the schema is not one of records")
        return tuple(
            decode.value_of(field, _plain(record.get(field.name))) for field in self._fields
        )


# What fastavro raises for bytes that don't follow the schema.
_GARBAGE = (
    EOFError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    struct.error,
    RecursionError,
    MemoryError,
    ArithmeticError,
)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, UUID) else value
