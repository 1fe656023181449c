r"""Lines of web server access logs, in the common or combined format of Apache and nginx.

    %h %l %u [%t] "%r" %>s %b …

e.g. `192.0.2.7 - - [17/May/2015:10:05:03 +0000] "GET /pricing HTTP/1.1" 200 512 "-" "curl"`.
Whatever follows the bytes sent (referrer, agent, fields of one's own) is ignored.

Apache's vhost_combined (Debian's other_vhosts_access.log) puts the virtual host and its port
before such a line, which are ignored, too: `example.com:80 192.0.2.7 - - [17/May/2015…`.
Each line is judged by itself: see `_client`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as default
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.kernels import decode, rfc3339
from beam_pipelines.kernels.columns import timestamps
from beam_pipelines.kernels.decode import Decoded, Field, Kind, Part, RejectedError
from beam_pipelines.kernels.ndjson_layout import Bytes
from beam_pipelines.model.batches import encoded
from beam_pipelines.model.records import EVENT_TIME, MAX_PAYLOAD_BYTES

HOST, TARGET = PARTS = ("host", "target")
"""Parts of a line that a column may hold."""


def read_line(payload: bytes | None) -> tuple[str, int, str]:
    r"""Read one line: this defines what is valid.

    The request is `METHOD target PROTOCOL` or `METHOD target`: its first word is the method,
    its last word the protocol if it begins with `HTTP/`, and the target what lies between,
    as written, with its escapes and its spaces. Bytes that are not UTF-8 don't lose the
    line: each becomes the text `\xhh`, as which Apache itself writes what it can't print.

    Returns:
      Host, µs since 1970, target.

    Raises:
      RejectedError: the line is in another format, names no time or no target.
    """
    line = decode.present_line(payload).decode("utf-8", "backslashreplace")
    found = _LINE.fullmatch(line)
    if found is None:
        raise RejectedError(
            decode.NOT_ACCESS_LOG, 'the line is not: host - user [time] "request" status bytes'
        )
    first, second, rest, time, request = found.groups()
    host = _client(first, second, rest)
    micros, status = rfc3339.parse_one(_rfc3339(time))
    if status != rfc3339.OK:
        reason = decode.BAD_TIME if status == rfc3339.NOT_A_TIME else decode.TIME_OUT_OF_RANGE
        raise RejectedError(reason, f"the time is {decode.shown(time)}; there is no such time")
    target = _target(request)
    if not target:
        raise RejectedError(decode.NO_TARGET, "the request names no target")
    if "\0" in host or "\0" in target:
        raise RejectedError(decode.NUL_CHARACTER, "the host or the target contains U+0000")
    return host, micros, target


@dataclass(frozen=True)
class AccessLogDecoder:
    """Decodes access log lines, one per payload, into rows of a schema.

    `event_time` is the time of the request as logged, in UTC.

    Args:
      schema: `event_time` and the columns named below; others must be nullable, and are null.
      columns: String column → `host` or `target`.
      constants: String or `one_of` column → the value of every row.

    Raises:
      ValueError: the schema lacks a column, or has a required one that nothing fills.
    """

    schema: pa.Schema
    columns: Mapping[str, str]
    constants: Mapping[str, str] = default(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = {field.column.name: field.kind for field in self._fields}
        for column in (EVENT_TIME, *self.columns, *self.constants):
            if column not in kinds:
                raise ValueError(f"no column {column!r}; the rows have {', '.join(kinds)}")
        for column, part in self.columns.items():
            if part not in PARTS or kinds[column] is not Kind.TEXT:
                raise ValueError(f"{column!r} must be a string column of {PARTS}, not of {part!r}")
        filled = {EVENT_TIME, *self.columns, *self.constants}
        for field in self._fields:
            if field.required and field.column.name not in filled:
                raise ValueError(f"nothing fills the required column {field.column.name!r}")
        try:
            _ = self._fixed
        except RejectedError as error:
            raise ValueError(f"constant: {error.message}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.schema, self.columns, self.constants)

    def __call__(self, payloads: pa.BinaryArray, topic: str) -> Decoded:
        """Decode lines; the topic plays no part."""
        text = Bytes.of(payloads)
        plain = np.diff(text.offsets) <= MAX_PAYLOAD_BYTES
        odd = (text.data == 0) | (text.data >= 0x80)
        if odd.any():
            plain &= text.per_row(odd) == 0
        parts: list[Part] = []
        rows = np.flatnonzero(plain)
        for pattern in (_PLAIN_LINE, _PLAIN_VHOST_LINE):
            if not len(rows):
                break
            part, rows = self._matched(payloads, rows, pattern)
            parts.append(part)
        return decode.completed(self.schema, self._fields, payloads, parts, self._read_one)

    def _matched(
        self, payloads: pa.BinaryArray, rows: np.ndarray, pattern: str
    ) -> tuple[Part, np.ndarray]:
        """Decode those of the rows that match a pattern; also return those that don't."""
        if len(rows) < len(payloads):
            payloads = payloads.take(pa.array(rows))
        found = pc.extract_regex(payloads, pattern)
        host, time, target = (found.field(name) for name in ("host", "time", "target"))
        plain = found.is_valid().to_numpy(zero_copy_only=False)
        others = rows[~plain]
        plain = plain & ~pc.starts_with(target, b"HTTP/").to_numpy(zero_copy_only=False)
        if not plain.all():
            here = pa.array(np.flatnonzero(plain))
            host, time, target = (part.take(here) for part in (host, time, target))
            rows = rows[plain]
        micros, status = rfc3339.parse(_rfc3339_column(time))
        texts = {HOST: host.view(pa.string()), TARGET: target.view(pa.string())}
        batch = pa.RecordBatch.from_arrays(
            [self._column(field, texts, micros) for field in self._fields], schema=self.schema
        )
        good = status == rfc3339.OK
        if not good.all():
            rows, batch = rows[good], batch.filter(pa.array(good))
        return Part(rows, batch), others

    @cached_property
    def _fields(self) -> tuple[Field, ...]:
        return decode.fields_of(self.schema, {}, {})

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        """The values that no line decides."""
        return {
            field.column.name: decode.value_of(field, self.constants[field.column.name])
            if field.column.name in self.constants
            else None
            for field in self._fields
            if field.column.name not in (EVENT_TIME, *self.columns)
        }

    def _read_one(self, payload: bytes | None) -> tuple[Any, ...]:
        host, micros, target = read_line(payload)
        parts = {HOST: host, TARGET: target}
        values = {
            **self._fixed,
            **{column: parts[part] for column, part in self.columns.items()},
            EVENT_TIME: micros,
        }
        return tuple(values[field.column.name] for field in self._fields)

    def _column(self, field: Field, parts: Mapping[str, pa.Array], micros: np.ndarray) -> pa.Array:
        name, rows = field.column.name, len(micros)
        if name == EVENT_TIME:
            return timestamps(micros)
        if name in self.columns:
            return parts[self.columns[name]]
        value = self._fixed[name]
        if field.kind is Kind.ONE_OF:
            return encoded(field.column, pa.repeat(pa.scalar(value, pa.int8()), rows))
        return pa.repeat(pa.scalar(value, field.column.type), rows)


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH_DIGITS = {month: f"{i + 1:02}" for i, month in enumerate(_MONTHS)}
_TIME = rf"[0-9]{{2}}/(?:{'|'.join(_MONTHS)})/[0-9]{{4}}(?::[0-9]{{2}}){{3}} [+-][0-9]{{4}}"
_TIME_LENGTH = len("17/May/2015:10:05:03 +0000")
_STATUS_BYTES = r"(?:[0-9]{3}|-) (?:[0-9]+|-)"

_LINE = re.compile(
    rf'([^ ]+) ([^ ]+) (.+?) \[({_TIME})\] "((?:[^"\\]|\\.)*+)" {_STATUS_BYTES}(?:[ \r\n].*)?',
    re.DOTALL,
)
_VHOST = r"(?:[^: \[\]]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}"
_VIRTUAL_HOST = re.compile(_VHOST)
_ADDRESS = re.compile(
    r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|(?=[^:]*:[^:]*:)[0-9A-Fa-f:.]+(?:%[^ ]*)?"  # IPv4, IPv6
)

# Lines without a name from identd, without a space in their user and target, and without a
# backslash in their request. At each byte there is one way to go on, which RE2 reads several
# times faster; all other lines are left to `read_line`.
_PLAIN_REST = (
    rf" - [^ ]+ \[(?P<time>{_TIME})\] "
    r'"[^ "\\]+ (?P<target>[^ "\\]+)(?: HTTP/[^ "\\]*)?" '
    rf"{_STATUS_BYTES}(?:[ \r\n]|$)"
)
_PLAIN_LINE = rf"^(?P<host>[^ ]+){_PLAIN_REST}"
_PLAIN_VHOST_LINE = rf"^{_VHOST} (?P<host>[^ -][^ ]*){_PLAIN_REST}"


def _client(first: str, second: str, rest: str) -> str:
    """Return the remote host of a line by what stands before its time.

    A line of the common format has `-` or a name from identd in second place, one of
    vhost_combined the remote host, after the virtual host with its port and before two more
    fields. An address in second place of another line is nobody's name: the line is in a
    format of one's own, and its first field may be anything.

    Args:
      first: The first field.
      second: The second field.
      rest: What follows; in the common format the user, whose name may have spaces.

    Raises:
      RejectedError: the line is in neither format.
    """
    if second == "-":
        return first
    has_address = _ADDRESS.fullmatch(second) is not None
    ident, _, user = rest.partition(" ")
    if ident and user and (has_address or ident == "-") and _VIRTUAL_HOST.fullmatch(first):
        return second
    if has_address:
        raise RejectedError(
            decode.NOT_ACCESS_LOG,
            f"the second field is the address {decode.shown(second)}; it must be - or a name "
            "(host - user [time] …), or follow a virtual host (name:port host - user [time] …)",
        )
    return first


def _rfc3339(time: str) -> str:
    day, month, year = time[:2], _MONTH_DIGITS[time[3:6]], time[7:11]
    return f"{year}-{month}-{day}T{time[12:20]}{time[21:24]}:{time[24:]}"


def _rfc3339_column(times: pa.BinaryArray) -> pa.StringArray:
    """Rewrite log times, all of one length, as `_rfc3339` does."""
    log = Bytes.of(times).data[: len(times) * _TIME_LENGTH].reshape(-1, _TIME_LENGTH)
    text = np.empty((len(log), len("2015-05-17T10:05:03+00:00")), np.uint8)
    text[:] = np.frombuffer(b"yyyy-mm-ddThh:mm:ss+hh:mm", np.uint8)
    text[:, :4], text[:, 8:10], text[:, 11:19] = log[:, 7:11], log[:, :2], log[:, 12:20]
    text[:, 19:22], text[:, 23:] = log[:, 21:24], log[:, 24:]
    # The second and third letter tell the months apart.
    text[:, 5:7] = _DIGITS_BY_LETTERS[log[:, 4].astype(np.int64) * 256 + log[:, 5]]
    offsets = np.arange(len(log) + 1, dtype=np.int32) * np.int32(text.shape[1])
    return pa.StringArray.from_buffers(len(log), pa.py_buffer(offsets), pa.py_buffer(text))


_DIGITS_BY_LETTERS = np.zeros((1 << 16, 2), np.uint8)
for _month, _digits in _MONTH_DIGITS.items():
    _DIGITS_BY_LETTERS[ord(_month[1]) * 256 + ord(_month[2])] = list(_digits.encode())


def _target(request: str) -> str:
    _, _, target = request.strip(" ").partition(" ")
    before, _, last = target.rpartition(" ")
    return (before if last.startswith("HTTP/") else target).strip(" ")
