"""Times as RFC 3339 text or epoch milliseconds, read into µs since 1970.

Source: RFC 3339, section 5.6. Any offset and any number of fraction digits; those past µs
are cut. Lowercase `t` and `z` and a space for `T` are taken too, as the RFC allows. Second
60 is taken where UTC is 23:59:60, whatever the day, and read as the next second: time since
1970 doesn't count leap seconds.
"""

import re
from datetime import date

import numpy as np
import pyarrow as pa

from beam_pipelines.model.records import MAX_EVENT_TIME_US, MIN_EVENT_TIME_US

OK, NOT_A_TIME, OUT_OF_RANGE, EPOCH_SECONDS = range(4)
"""Statuses: a time; none in the RFC's sense; one outside the years 1 to 9999, UTC; a number
that must be seconds since 1970."""

SECONDS_FROM, SECONDS_TO = 10**8, 10**11
"""Integers from here, and before there, are epoch seconds of the years 1973 to 5138. As
milliseconds they would lie between 1970-01-02T03:46:40Z and 1973-03-03T09:46:40Z, where
nobody's events do; integers outside are milliseconds, also those before 1970."""

_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:[Zz]|([+-])(\d\d):(\d\d))",
    re.ASCII,
)
_EPOCH_DAY = date(1970, 1, 1).toordinal()
_LEAP_CYCLE_YEARS, _LEAP_CYCLE_DAYS = 400, 146_097


def parse_one(text: str) -> tuple[int, int]:
    """Read one time: this defines what is a time.

    Returns:
      (µs since 1970, status); the µs mean nothing unless the status is OK.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        return 0, NOT_A_TIME
    year, month, day, hour, minute, second = map(int, found.groups()[:6])
    fraction, sign, offset_hours, offset_minutes = found.groups()[6:]
    offset = int(offset_hours or 0) * 60 + int(offset_minutes or 0)
    if hour > 23 or minute > 59 or second > 60:
        return 0, NOT_A_TIME
    if offset_hours and (int(offset_hours) > 23 or int(offset_minutes) > 59):
        return 0, NOT_A_TIME
    try:
        # Python's calendar starts with year 1; year 0 has the days of year 400.
        days = date(year or _LEAP_CYCLE_YEARS, month, day).toordinal() - _EPOCH_DAY
    except ValueError:
        return 0, NOT_A_TIME
    days -= 0 if year else _LEAP_CYCLE_DAYS
    minutes = (days * 24 + hour) * 60 + minute + (offset if sign == "-" else -offset)
    if second == 60 and minutes % 1440 != 1439:
        return 0, NOT_A_TIME
    micros = (minutes * 60 + second) * 1_000_000 + int((fraction or "")[:6].ljust(6, "0"))
    return micros, OK if MIN_EVENT_TIME_US <= micros <= MAX_EVENT_TIME_US else OUT_OF_RANGE


def from_epoch_ms_one(milliseconds: int) -> tuple[int, int]:
    """Read one integer of milliseconds since 1970; returns as `parse_one` does."""
    if SECONDS_FROM <= milliseconds < SECONDS_TO:
        return 0, EPOCH_SECONDS
    micros = milliseconds * 1000
    return micros, OK if MIN_EVENT_TIME_US <= micros <= MAX_EVENT_TIME_US else OUT_OF_RANGE


def from_epoch_ms(milliseconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read int64 milliseconds since 1970; returns as `parse` does."""
    inside = (milliseconds >= MIN_EVENT_TIME_US // 1000) & (
        milliseconds <= MAX_EVENT_TIME_US // 1000
    )
    status = np.where(inside, OK, OUT_OF_RANGE).astype(np.uint8)
    seconds = (milliseconds >= SECONDS_FROM) & (milliseconds < SECONDS_TO)
    status[seconds] = EPOCH_SECONDS
    return np.where(status == OK, milliseconds, 0) * 1000, status


def parse(texts: pa.StringArray | pa.BinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """Read a column of times, each as `parse_one` would.

    Texts of one length and zone form are read together, as three or four words of eight
    bytes each; whatever is not plainly a time there is left to `parse_one`.

    Args:
      texts: UTF-8, or bytes that need not be; nulls are no times.

    Returns:
      int64 µs since 1970 (0 unless OK) and uint8 status, one per text.
    """
    rows = len(texts)
    micros, status = np.zeros(rows, np.int64), np.full(rows, NOT_A_TIME, np.uint8)
    _, offsets_buffer, data_buffer = texts.buffers()
    if rows == 0 or data_buffer is None:
        return micros, status
    offsets = np.frombuffer(offsets_buffer, np.int32)[texts.offset : texts.offset + rows + 1]
    data = np.frombuffer(data_buffer, np.uint8)
    pending = np.ones(rows, bool)
    if len(data) >= _SHORTEST:
        words = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))
        ends = offsets[1:].astype(np.int64)
        starts = offsets[:-1].astype(np.int64)
        zulu = (data[ends - 1] | 0x20) == ord("z")
        forms = np.clip(ends - starts, 0, _LONGEST + 1) * 2 + zulu
        for form in np.flatnonzero(np.bincount(forms)).tolist():
            length, is_zulu = divmod(form, 2)
            digits = length - _SHORTEST - (0 if is_zulu else _OFFSET_LENGTH - 1) - 1
            if digits == -1:
                digits = 0
            elif not 0 < digits <= 9:
                continue
            here = np.flatnonzero(forms == form)
            values, good = _parse_form(data, words, starts[here], digits, bool(is_zulu))
            micros[here[good]] = values[good]
            pending[here[good]] = False
        status[~pending] = OK
    for row in np.flatnonzero(pending).tolist():
        if texts[row].is_valid:
            raw = data_buffer[offsets[row] : offsets[row + 1]].to_pybytes()
            value, status[row] = parse_one(raw.decode("utf-8", "replace"))
            micros[row] = value if status[row] == OK else 0
    return micros, status


_SHORTEST = len("2026-01-05T09:00:03Z")
_OFFSET_LENGTH = len("+01:00")
_LONGEST = _SHORTEST - 1 + len(".123456789") + _OFFSET_LENGTH

_YEAR_DAYS = np.arange(-1970, 8030).astype("datetime64[Y]").astype("datetime64[D]").astype(np.int64)
_LEAP_YEARS = np.diff(np.append(_YEAR_DAYS, _YEAR_DAYS[-1] + 365)) == 366
_MONTH_LENGTHS = np.zeros(512, np.int64)  # by 256 * leap + month; 0: no such month
_MONTH_DAYS = np.zeros(512, np.int64)  # days of the year before the month
for _leap in (0, 1):
    _lengths = [31, 28 + _leap, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    _MONTH_LENGTHS[256 * _leap + 1 : 256 * _leap + 13] = _lengths
    _MONTH_DAYS[256 * _leap + 1 : 256 * _leap + 13] = np.cumsum([0, *_lengths[:-1]])


class _Pattern:
    """Eight bytes: `0` stands for any digit, `?` for any byte, the rest for itself."""

    def __init__(self, pattern: str) -> None:
        digits = bytes(0xFF if c == "0" else 0 for c in pattern)
        fixed = bytes(0xFF if c not in "0?" else 0 for c in pattern)
        literal = bytes(ord(c) if c not in "0?" else 0 for c in pattern)
        self._digits, self._fixed, self._literal = (
            np.uint64(int.from_bytes(mask, "little")) for mask in (digits, fixed, literal)
        )

    def fits(self, words: np.ndarray) -> np.ndarray:
        """Compare each word; a digit's high half is 3, and still is with 6 added."""
        high = ((words & _HIGH) | (((words + _SIXES) & _HIGH) >> np.uint64(4))) ^ _THREES
        wrong = high & self._digits
        wrong |= (words & self._fixed) ^ self._literal
        right: np.ndarray = wrong == 0
        return right


_HIGH = np.uint64(0xF0F0F0F0F0F0F0F0)
_LOW = np.uint64(0x0F0F0F0F0F0F0F0F)
_SIXES = np.uint64(0x0606060606060606)
_THREES = np.uint64(0x3333333333333333)

_DATE = _Pattern("0000-00-")
_DAY_MINUTE = _Pattern("00?00:00")
_SECOND = _Pattern("????:00?")
_SECOND_POINT = _Pattern("????:00.")
_OFFSET = _Pattern("???00:00")
_FRACTIONS = [_Pattern("0" * n + "?" * (8 - n)) for n in range(9)]


def _pairs(words: np.ndarray) -> np.ndarray:
    """Put the two-digit number that starts at each byte into that byte."""
    digits = words & _LOW
    return digits * np.uint64(10) + (digits >> np.uint64(8))


def _byte(words: np.ndarray, index: int) -> np.ndarray:
    return ((words >> np.uint64(8 * index)) & np.uint64(0xFF)).astype(np.int64)


def _parse_form(
    data: np.ndarray, words: np.ndarray, starts: np.ndarray, digits: int, zulu: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Read texts with this many fraction digits, ending in Z or an offset.

    Returns:
      int64 µs, and bool: whether they stand; where not, `parse_one` must say.
    """
    first, second, third = words[starts], words[starts + 8], words[starts + 12]
    good = _DATE.fits(first) & _DAY_MINUTE.fits(second)
    good &= (_SECOND_POINT if digits else _SECOND).fits(third)
    separator = _byte(second, 2)
    good &= ((separator | 0x20) == ord("t")) | (separator == ord(" "))
    first, second, third = _pairs(first), _pairs(second), _pairs(third)

    year = np.minimum(_byte(first, 0) * 100 + _byte(first, 2), 9999)
    month = _LEAP_YEARS[year] * 256 + _byte(first, 5)
    day, hour, minute, seconds = (
        _byte(second, 0),
        _byte(second, 3),
        _byte(second, 6),
        _byte(third, 5),
    )
    good &= (day >= 1) & (day <= _MONTH_LENGTHS[month])
    good &= (hour <= 23) & (minute <= 59) & (seconds <= 59)
    minutes = ((_YEAR_DAYS[year] + _MONTH_DAYS[month] + day - 1) * 24 + hour) * 60 + minute

    if not zulu:
        zone = words[starts + (_SHORTEST + digits + bool(digits) + _OFFSET_LENGTH - 1 - 8)]
        good &= _OFFSET.fits(zone)
        sign = _byte(zone, 2)
        zone = _pairs(zone)
        hours, rest = _byte(zone, 3), _byte(zone, 6)
        good &= (hours <= 23) & (rest <= 59)
        good &= (sign == ord("+")) | (sign == ord("-"))
        minutes += (hours * 60 + rest) * (sign - ord(","))  # ASCII has "+", ",", "-" in a row
    micros = (minutes * 60 + seconds) * 1_000_000

    if digits:
        leading = min(digits, 8)
        fraction = words[starts + (_SHORTEST + leading - 8)] >> np.uint64(64 - 8 * leading)
        good &= _FRACTIONS[leading].fits(fraction)
        if digits == 9:
            good &= (data[starts + (_SHORTEST + 8)] - np.uint8(ord("0"))) <= 9
        fraction = _pairs(fraction)
        micros += _byte(fraction, 0) * 10_000 + _byte(fraction, 2) * 100 + _byte(fraction, 4)
    good &= (micros >= MIN_EVENT_TIME_US) & (micros <= MAX_EVENT_TIME_US)
    return micros, good
