"""Batches of columns as Beam elements: their type hint and their coder.

A PCollection's element is a `pyarrow.RecordBatch` of one schema, declared by the
PCollection's type hint `BatchOf(schema)`. The hint picks `BatchCoder(schema)`, so no
batch is ever pickled, and it tells the next transform which columns it may name. Where a
stage has judged the rows by their lateness, the hint carries the lateness it allows:
windows and state downstream keep open for just that long.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import apache_beam as beam
import pyarrow as pa
from apache_beam import coders
from apache_beam.typehints import typehints

if TYPE_CHECKING:
    Rows = pa.RecordBatch
else:
    # Beam reads the annotations of a DoFn as type hints, where a plain RecordBatch would
    # not agree with `BatchOf`: so it is shown Any, and told the schema by BatchOf.
    Rows = Any

VALUES_KEY = b"values"
"""Field metadata that lists the values of a `one_of` column, a newline between two."""


def one_of(name: str, values: tuple[str, ...], nullable: bool = False) -> pa.Field:
    """Declare a column that holds one of a few known strings.

    It is dictionary-encoded with exactly these values in this order, so a batch carries
    one byte a row and the coder sends no strings.
    """
    return pa.field(
        name,
        pa.dictionary(pa.int8(), pa.string()),
        nullable=nullable,
        metadata={VALUES_KEY: "\n".join(values).encode()},
    )


SHORTENED_KEY = b"shortened"
"""Field metadata of a column whose texts were shortened: to how many bytes, in digits."""


def shortened_field(field: pa.Field, limit_bytes: int) -> pa.Field:
    """Mark a column of shortened texts, so that nobody shortens them again."""
    marked = {**(field.metadata or {}), SHORTENED_KEY: str(limit_bytes).encode()}
    return field.with_metadata(marked)


def shortened_to(field: pa.Field) -> int | None:
    """Return how many bytes the texts of a column were shortened to; None: they weren't."""
    limit = (field.metadata or {}).get(SHORTENED_KEY)
    return None if limit is None else int(limit)


def values_of(field: pa.Field) -> tuple[str, ...]:
    """Return the values of a `one_of` column, in the order of their codes."""
    if field.metadata is None or VALUES_KEY not in field.metadata:
        raise ValueError(f"column {field.name!r} is not declared with one_of")
    return tuple(field.metadata[VALUES_KEY].decode().split("\n"))


def encoded(field: pa.Field, codes: Any) -> pa.DictionaryArray:
    """Make the column of a `one_of` field from an int8 array of its codes."""
    indices = pa.array(codes, pa.int8())
    return pa.DictionaryArray.from_arrays(indices, pa.array(values_of(field)))


class BatchCoder(coders.Coder):
    """Encodes a batch as an Arrow IPC message without its schema.

    The schema is the coder's own: declared once per PCollection, not sent with every
    element. Columns declared with `one_of` travel as their one-byte codes. Equal
    batches may have different encodings, so the coder is not deterministic and a batch
    can't be a key.

    Raises:
      ValueError: a batch of another schema is encoded.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._coded = tuple(
            i for i, field in enumerate(schema) if pa.types.is_dictionary(field.type)
        )
        self._wire = pa.schema(
            field.with_type(field.type.index_type) if i in self._coded else field
            for i, field in enumerate(schema)
        )

    def encode(self, value: pa.RecordBatch) -> bytes:
        if not value.schema.equals(self.schema):
            raise ValueError(
                f"a batch with columns {value.schema.to_string()} was sent where "
                f"{self.schema.to_string()} is declared"
            )
        if self._coded:
            columns = list(value.columns)
            for i in self._coded:
                columns[i] = columns[i].indices
            value = pa.RecordBatch.from_arrays(columns, schema=self._wire)
        return value.serialize().to_pybytes()

    def decode(self, encoded_batch: bytes) -> pa.RecordBatch:
        batch = pa.ipc.read_record_batch(pa.py_buffer(encoded_batch), self._wire)
        if not self._coded:
            return batch
        columns = list(batch.columns)
        for i in self._coded:
            columns[i] = encoded(self.schema.field(i), columns[i])
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def estimate_size(self, value: pa.RecordBatch) -> int:
        return int(value.nbytes)  # Beam samples sizes; encoding just to measure is dear

    def is_deterministic(self) -> bool:
        return False

    def to_type_hint(self) -> Any:
        return BatchOf(self.schema)

    @classmethod
    def from_type_hint(cls, hint: "BatchOf", registry: Any) -> Any:
        return cls(hint.schema)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BatchCoder) and self.schema.equals(
            other.schema, check_metadata=True
        )

    def __hash__(self) -> int:
        return hash(self.schema.to_string())

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchCoder, (self.schema,)


class BatchOf(typehints.TypeConstraint):
    """Type hint of a PCollection whose elements are batches of this schema.

    Args:
      schema: Columns of the batches.
      lateness_s: Seconds behind the watermark that a row is at most, as a stage that routes
        older ones aside promises (`ClassifyLateness`); None: nobody has judged the rows.
        Hints that differ in it alone are consistent, and not equal.
    """

    def __init__(self, schema: pa.Schema, lateness_s: int | None = None) -> None:
        self.schema = schema
        self.lateness_s = lateness_s

    def of(self, schema: pa.Schema) -> "BatchOf":
        """Return the hint of the same rows with other columns."""
        return BatchOf(schema, self.lateness_s)

    def _consistent_with_check_(self, sub: object) -> bool:
        return isinstance(sub, BatchOf) and self.schema.equals(sub.schema)

    def type_check(self, instance: object) -> None:
        if not isinstance(instance, pa.RecordBatch):
            raise typehints.CompositeTypeHintError(
                f"expected a pyarrow.RecordBatch, got {type(instance).__name__}"
            )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BatchOf)
            and self.lateness_s == other.lateness_s
            and self.schema.equals(other.schema, check_metadata=True)
        )

    def __hash__(self) -> int:
        return int.from_bytes(hashlib.sha256(self.schema.to_string().encode()).digest()[:8])

    def __repr__(self) -> str:
        late = "" if self.lateness_s is None else f"; lateness_s={self.lateness_s}"
        return f"BatchOf({', '.join(self.schema.names)}{late})"

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchOf, (self.schema, self.lateness_s)


class _CoderOfUnions:
    """Chooses the coder that all members of a union share, for Beam's registry.

    A Flatten of hints that differ in their lateness yields a union of them, which Beam
    would pickle. Unions of other types are left to Beam.
    """

    @staticmethod
    def from_type_hint(hint: Any, registry: Any) -> coders.Coder:
        if not isinstance(hint, typehints.UnionConstraint):
            raise ValueError(f"{hint} is no union")
        first, *others = (registry.get_coder(member) for member in hint.inner_types())
        if any(other != first for other in others):
            raise ValueError(f"the members of {hint} have several coders")
        return first


coders.registry.register_coder(BatchOf, BatchCoder)
coders.registry.register_fallback_coder(_CoderOfUnions)


def hint_of(batches: beam.PCollection) -> BatchOf:
    """Return the hint of a PCollection of batches.

    A Flatten's rows are as late as the latest of its inputs', and judged if all are.

    Raises:
      TypeError: its elements are not declared as batches, or not all of one schema.
    """
    hint = batches.element_type
    if isinstance(hint, BatchOf):
        return hint
    members = list(hint.inner_types()) if isinstance(hint, typehints.UnionConstraint) else []
    if not members or not all(isinstance(member, BatchOf) for member in members):
        raise TypeError(
            f"expected a PCollection of batches, got elements of type {hint}; "
            "make batches with Batch(schema), or declare them with_output_types(BatchOf(schema))"
        )
    schema = members[0].schema
    for member in members:
        if not member.schema.equals(schema, check_metadata=True):
            raise TypeError(
                "the batches that were flattened have several schemas: "
                f"{schema.to_string()} and {member.schema.to_string()}"
            )
    allowed = [member.lateness_s for member in members]
    return BatchOf(schema, None if None in allowed else max(allowed))


def lateness_of(batches: beam.PCollection, what: str) -> int:
    """Return how many seconds behind the watermark a row of a PCollection is at most.

    Args:
      batches: A PCollection of batches.
      what: The transform that must know, for messages.

    Returns:
      What the stage that judged the rows allows; 0 for bounded input, where nothing is late.

    Raises:
      TypeError: its elements are not declared as batches.
      ValueError: it is unbounded, and nobody has judged its rows.
    """
    lateness_s = hint_of(batches).lateness_s
    if batches.is_bounded:
        return 0
    if lateness_s is None:
        raise ValueError(
            f"{what} takes unbounded input only where rows that are too late were routed "
            "aside before, as the runner would drop them unseen: "
            "Batch(…, append_time=COLUMN), then ClassifyLateness(TimeRule(…)).usable. After "
            "it, declare outputs of your own with_output_types(batches.element_type)"
        )
    return lateness_s


def schema_of(batches: beam.PCollection, *columns: str) -> pa.Schema:
    """Return the declared schema of a PCollection of batches that has these columns.

    Raises:
      TypeError: its elements are not declared as batches.
      ValueError: a column is missing.
    """
    schema = hint_of(batches).schema
    require_columns(schema, *columns)
    return schema


def require_columns(schema: pa.Schema, *columns: str) -> None:
    """Raise ValueError where a schema lacks one of these columns."""
    for column in columns:
        if column not in schema.names:
            raise ValueError(f"no column {column!r}; the batches have {', '.join(schema.names)}")


def empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch of a schema that has no rows."""
    return pa.RecordBatch.from_arrays(
        [
            encoded(field, pa.array([], pa.int8()))
            if pa.types.is_dictionary(field.type)
            else pa.array([], field.type)
            for field in schema
        ],
        schema=schema,
    )


def concatenated(batches: list[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """Join batches of one schema into one, in their order."""
    if len(batches) == 1:
        return batches[0]
    return pa.concat_batches(batches) if batches else empty_batch(schema)


def declared(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Give a batch the metadata of its declared schema: batches made by hand may lack it."""
    return pa.RecordBatch.from_arrays(batch.columns, schema=schema)


def batch_of_rows(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Make a batch of mappings; keys that are no columns are ignored.

    Raises:
      ValueError: a row lacks a column that isn't nullable, or a value has another type.
    """
    return pa.RecordBatch.from_arrays([_column(field, rows) for field in schema], schema=schema)


def _column(field: pa.Field, rows: Sequence[Mapping[str, Any]]) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    if not field.nullable and None in values:
        raise ValueError(f"a row has no {field.name!r}, which {field} requires")
    try:
        if pa.types.is_dictionary(field.type):
            codes = {value: code for code, value in enumerate(values_of(field))}
            return encoded(field, [None if v is None else codes[v] for v in values])
        return pa.array(values, field.type)
    except KeyError as error:
        raise ValueError(
            f"{field.name} is {error.args[0]!r}, not one of {', '.join(values_of(field))}"
        ) from error
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{field.name} does not fit {field.type}: {error}") from error
