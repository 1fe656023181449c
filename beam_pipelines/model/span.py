"""The stretch of a partition that a batch was read from."""

from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam import coders
from apache_beam.typehints import typehints


class Span(NamedTuple):
    """Offsets [start, end) of one partition, all within one fixed range of it.

    Every batch of payloads travels with its span until the lake is written: the lake
    publishes a range once its spans cover it, so a span is there even when no record
    of it was valid, or when it holds no record at all.

    Offsets count records (Kafka, the generator) or bytes of the decompressed stream
    (files). A range is [range_start, range_end), the same however it is read; `last`
    says that this span completes it (its end was reached, or the input's). A topic that is
    read to where it ended is `open` there: what is appended later belongs to the range,
    which therefore isn't complete. A file doesn't grow.
    """

    topic: str  # a Kafka topic, or a file's path as matched
    partition: int
    range_start: int
    range_end: int
    start: int
    end: int
    last: bool
    open: bool = False


_FIELDS = coders.TupleCoder(
    [coders.StrUtf8Coder(), *[coders.VarIntCoder()] * 5, *[coders.BooleanCoder()] * 2]
)


class SpanCoder(coders.Coder):
    """Encodes a span field by field."""

    def encode(self, value: Span) -> bytes:
        return _FIELDS.encode(tuple(value))

    def decode(self, encoded: bytes) -> Span:
        return Span(*_FIELDS.decode(encoded))

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> Any:
        return Span


coders.registry.register_coder(Span, SpanCoder)


def spanned(batches: Any) -> Any:
    """Return the type hint of (span, batch) pairs, for a batch hint."""
    return typehints.Tuple[Span, batches]


def batch_hint(pairs: beam.PCollection) -> Any:
    """Return the batch hint of a PCollection of (span, batch) pairs.

    Raises:
      TypeError: the elements are not declared as such pairs.
    """
    hint = pairs.element_type
    if isinstance(hint, typehints.TupleConstraint):
        inner = hint._inner_types()
        types = tuple(inner)
        if len(types) == 2 and types[0] is Span:
            return types[1]
    raise TypeError(f"expected (Span, batch) pairs as a source yields them, got {hint}")
