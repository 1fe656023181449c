"""Avro container files as a source of their records' bytes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import apache_beam as beam
import fastavro
import numpy as np
import pyarrow as pa

from beam_pipelines.io.avro_blocks import MAX_BLOCK_BYTES, PlainContainer
from beam_pipelines.io.files import (
    BLOCK_BYTES,
    MAX_BATCH_RECORDS,
    RANGE_BYTES,
    InputFile,
    SpanCutter,
    check_unchanged,
    open_decompressed,
)
from beam_pipelines.kernels.avro import require_bounded
from beam_pipelines.model.batches import BatchOf, concatenated
from beam_pipelines.model.records import PAYLOADS
from beam_pipelines.model.span import Span, spanned


def writer_schema(path: str) -> dict[str, Any]:
    """Return the record schema in the header of an Avro container file, parsed by fastavro.

    It is read once per file and kept until the file changes.

    Raises:
      ValueError: there is no such header, the file holds something else than records, or
        records that `require_bounded` refuses.
    """
    stat = os.stat(path)
    return _writer_schema(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _writer_schema(path: str, size_bytes: int, modified_ns: int) -> dict[str, Any]:
    with open_decompressed(path) as stream:
        try:
            container: Any = PlainContainer(stream)
            schema = fastavro.parse_schema(fastavro.block_reader(container).writer_schema)
        except Exception as error:  # fastavro raises what its parts raise
            raise ValueError(f"{path} has no header of an Avro container file: {error}") from error
    if not isinstance(schema, dict) or schema["type"] != "record":
        raise ValueError(f"{path} is an Avro file of {schema}; its schema must be a record")
    try:
        require_bounded(schema)
    except ValueError as error:
        raise ValueError(f"{path} can't be read safely: {error}") from error
    return schema


@dataclass
class ReadAvroFiles(beam.PTransform):
    """Read the records of Avro container files, undecoded.

    Output: (Span, batch of PAYLOADS), with topic = path and partition 0. A payload is the
    binary encoding of one record, to be decoded with `writer_schema(path)`; its offset is
    counted in the stream of the decompressed blocks (without header and sync markers). There
    is no append time: a file is complete.

    Ranges are of `RANGE_BYTES` of that stream. A file is read in one go, in offset order.
    Blocks may be compressed as fastavro can decompress: null, deflate, bzip2 and xz always,
    snappy, zstandard and lz4 with their packages installed. A block has at most
    `MAX_BLOCK_BYTES`, and a record at least one byte.

    Args:
      files: What to read, as `files.match` found it.

    Raises:
      ValueError: (at run time) a file was changed, isn't an Avro container, is
        compressed in an unknown way, or is corrupt.
    """

    files: list[InputFile]

    def expand(self, pipeline: beam.pvalue.PBegin) -> beam.PCollection:
        return (
            pipeline
            | "Files" >> beam.Create(self.files)
            | "Records"
            >> beam.FlatMap(read_avro_records).with_output_types(spanned(BatchOf(PAYLOADS)))
        )


def read_avro_records(
    file: InputFile, *, range_bytes: int = RANGE_BYTES
) -> Iterator[tuple[Span, pa.RecordBatch]]:
    """Read the records of a file as `ReadAvroFiles` describes it."""
    check_unchanged(file)
    spans = SpanCutter(file.path, range_bytes)
    # Blocks are small: several make a batch.
    gathered: list[pa.RecordBatch] = []
    rows = start = end = 0
    for records, next_end in _blocks(file):
        if rows + len(records) > MAX_BATCH_RECORDS or next_end - start > BLOCK_BYTES:
            yield from spans.cut(concatenated(gathered, PAYLOADS), end, at_end=False)
            gathered, rows, start = [], 0, end
        gathered.append(records)
        rows += len(records)
        end = next_end
    check_unchanged(file)
    yield from spans.cut(concatenated(gathered, PAYLOADS), end, at_end=True)


def _blocks(file: InputFile) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield the records of each block, and the offset at which they end."""
    schema = writer_schema(file.path)
    # Read as a record without fields: everything is skipped and nothing decoded, so a value
    # that can't be decoded concerns its own record only, later.
    nothing = {"type": "record", "name": schema["name"], "fields": []}
    start = 0
    with open_decompressed(file.path) as stream:
        container: Any = None
        try:
            container = PlainContainer(stream)
            blocks: Any = fastavro.block_reader(container, nothing)
            for block in blocks:
                for records, end in _records(block, start):
                    yield records, start + end
                start += end
        except Exception as error:  # fastavro raises what its parts raise
            position = container.block_start if container else 0
            raise ValueError(
                f"{file.path} can't be read as an Avro container: the block after offset {start} "
                f"of its records (byte {position} of the file) is broken: "
                f"{str(error) or type(error).__name__}"
            ) from error


def _records(block: Any, start: int) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Cut the records out of a decompressed block, which begins at offset `start`.

    Yields batches, and where each ends within the block; at least one.
    """
    text = block.bytes_.getvalue()
    if len(text) > MAX_BLOCK_BYTES:
        raise ValueError(f"it has {len(text)} bytes; at most {MAX_BLOCK_BYTES} make a block")
    if not 0 <= block.num_records <= len(text):
        raise ValueError(f"it says that its {len(text)} bytes hold {block.num_records} records")
    end, records = 0, iter(block)
    while True:
        bounds = [end]
        bounds += [block.bytes_.tell() for _ in islice(records, MAX_BATCH_RECORDS)]
        end = bounds[-1]
        yield _payloads(text, np.array(bounds), start), end
        if len(bounds) <= MAX_BATCH_RECORDS:
            break
    if end != len(text):
        raise ValueError(f"its {block.num_records} records end at {end} of {len(text)} bytes")


def _payloads(text: bytes, bounds: np.ndarray, start: int) -> pa.RecordBatch:
    payloads = pa.BinaryArray.from_buffers(
        pa.binary(),
        len(bounds) - 1,
        [None, pa.py_buffer(bounds.astype(np.int32)), pa.py_buffer(text)],
    )
    return pa.RecordBatch.from_arrays(
        [
            payloads,
            pa.array(bounds[:-1] + start),
            pa.nulls(len(payloads), PAYLOADS.field("append_time").type),
        ],
        schema=PAYLOADS,
    )
