"""Blocks of Avro container files, decompressed within bounds."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import fastavro

MAX_BLOCK_BYTES = 64 << 20
"""Of a block, as it is stored (with its frame) and decompressed, and of the header. Writers
make blocks of 16 kB to a few MB."""

# Source: Avro 1.12 specification, "Object Container Files".
_HEADER = fastavro.parse_schema(
    {
        "type": "record",
        "name": "org.apache.avro.file.Header",
        "fields": [
            {"name": "magic", "type": {"type": "fixed", "name": "Magic", "size": 4}},
            {"name": "meta", "type": {"type": "map", "values": "bytes"}},
            {"name": "sync", "type": {"type": "fixed", "name": "Sync", "size": 16}},
        ],
    }
)
_CODEC = "avro.codec"
_SYNC_BYTES = 16
_LONGEST_INTEGER = 10  # bytes
_XZ_MEMORY_BYTES = 128 << 20  # its highest level takes 65 MiB
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "deflate": lambda: zlib.decompressobj(-15),  # without zlib's own header
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES),
}


class PlainContainer:
    """An Avro container as one that isn't compressed, for fastavro to read.

    fastavro believes what a block says of its size, and decompresses whatever comes of it.
    Here both end at `MAX_BLOCK_BYTES`. Blocks of other codecs than deflate, bzip2 and xz go
    on as they are stored.

    Args:
      stream: The container, at its beginning.

    Raises:
      ValueError: (here and by `read`) the header or a block is cut short or broken, or
        claims more than `MAX_BLOCK_BYTES`.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._position = 0
        self._limit = MAX_BLOCK_BYTES
        stored: Any = _Readable(self._taken)
        header: Any = fastavro.schemaless_reader(stored, _HEADER, None)
        codec = header["meta"].get(_CODEC, b"null").decode()
        self._decompressor = _DECOMPRESSORS.get(codec)
        self._sync = header["sync"]
        if self._decompressor:
            header["meta"][_CODEC] = b"null"
        plain = io.BytesIO()
        fastavro.schemaless_writer(plain, _HEADER, header)
        self._ahead = io.BytesIO(plain.getvalue())
        self.block_start = self._position
        """Where the block begins in the stream that was read last, or is broken."""

    def read(self, size_bytes: int) -> bytes:
        """Read on; a block has to be read whole before the next one is looked at."""
        data = self._ahead.read(size_bytes)
        if not data and size_bytes:
            self._ahead = io.BytesIO(self._next_block())
            data = self._ahead.read(size_bytes)
        return data

    def tell(self) -> int:
        """Return what fastavro notes of each block, and nobody reads."""
        return self.block_start

    def _next_block(self) -> bytes:
        self.block_start, self._limit = self._position, MAX_BLOCK_BYTES
        first = self._stream.read(1)
        if not first:
            return b""
        self._position += 1
        count = self._integer(first)
        size_bytes = self._integer(self._taken(1))
        data = self._taken(size_bytes)
        if self._taken(_SYNC_BYTES) != self._sync:
            raise ValueError("its end isn't marked as its header says")
        if self._decompressor:
            data = self._decompressor().decompress(data, MAX_BLOCK_BYTES + 1)
            if len(data) > MAX_BLOCK_BYTES:
                raise ValueError(
                    f"its {size_bytes} bytes are more than {MAX_BLOCK_BYTES} when decompressed"
                )
        return b"".join([_encoded(count), _encoded(len(data)), data, self._sync])

    def _taken(self, size_bytes: int) -> bytes:
        """Take so many bytes of the header or block from the stream."""
        if not 0 <= size_bytes <= self._limit:
            raise ValueError(
                f"it says that {size_bytes} bytes follow; at most {MAX_BLOCK_BYTES} make a block"
            )
        self._limit -= size_bytes
        data = self._stream.read(size_bytes)
        self._position += len(data)
        if len(data) < size_bytes:
            raise ValueError("the file ends within it")
        return data

    def _integer(self, first: bytes) -> int:
        """Read a zigzag integer of variable length, whose first byte is given."""
        value = shift = 0
        byte = first
        while byte[0] & 0x80:
            value |= (byte[0] & 0x7F) << shift
            shift += 7
            if shift >= 7 * _LONGEST_INTEGER:
                raise ValueError("a number in it has more than 64 bits")
            byte = self._taken(1)
        value |= byte[0] << shift
        return (value >> 1) ^ -(value & 1)


class _Readable:
    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.read = read


def _encoded(value: int) -> bytes:
    """Write an integer as `_integer` reads it."""
    value = (value << 1) ^ (value >> 63)
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
