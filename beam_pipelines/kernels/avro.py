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
        file were written with; one that `require_bounded` refuses fails the call. Must be
        picklable.

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
        require_bounded(written)
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


def require_bounded(schema: Any) -> None:
    """Refuse a schema by which a short record may claim what has no bound.

    Args:
      schema: An Avro schema, parsed by fastavro.

    Raises:
      ValueError: it has an array of items that take no bytes, so that 6 bytes may say that
        there are 10^10 of them; or a type that contains itself, which fastavro follows until
        the process's stack ends.
    """
    _takes_no_bytes(schema, {})


def _takes_no_bytes(schema: Any, named: dict[str, bool | None]) -> bool:
    """Tell whether values may take no bytes; `named` knows the types seen, None: unfinished."""
    if isinstance(schema, str):
        if schema in named and named[schema] is None:
            raise ValueError(f"its type {schema} contains itself, to any depth")
        return schema == "null" or bool(named.get(schema))
    if isinstance(schema, list):
        for branch in schema:
            _takes_no_bytes(branch, named)
        return False
    match kind := schema["type"]:
        case "array":
            if _takes_no_bytes(schema["items"], named):
                raise ValueError("its items of an array take no bytes, so there may be any number")
            return False
        case "map":
            _takes_no_bytes(schema["values"], named)
            return False
        case "record" | "error":
            named[schema["name"]] = None
            # All of them are looked at.
            empty = all([_takes_no_bytes(field["type"], named) for field in schema["fields"]])
            named[schema["name"]] = empty
            return empty
        case "fixed":
            named[schema["name"]] = schema["size"] == 0
            return schema["size"] == 0
        case "enum":
            return False
        case _:
            return _takes_no_bytes(kind, named)


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
