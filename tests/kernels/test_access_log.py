import gzip
import pickle
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beam_pipelines.kernels import decode
from beam_pipelines.kernels.access_log import AccessLogDecoder
from beam_pipelines.model.activity import ACTIVITY
from beam_pipelines.model.batches import one_of
from beam_pipelines.model.records import MAX_PAYLOAD_BYTES, TIMESTAMP

DECODER = AccessLogDecoder(
    ACTIVITY, {"user_id": "host", "page_url": "target"}, {"event_type": "page_view"}
)
REAL_LOG = Path(__file__).parents[3] / "shared" / "data" / "apache_combined.log.gz"
MONTHS = dict(
    zip("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), range(1, 13), strict=True)
)
TIME = "17/May/2015:10:05:03 +0000"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def line(request="GET / HTTP/1.1", host="h", user="-", time=TIME, tail=" 200 5", ident="-"):
    return f'{host} {ident} {user} [{time}] "{request}"{tail}'.encode()


def naive(payload):
    """Read a line character by character, for lines whose user has no brackets.

    Returns:
      (host, time, target), or a reason.
    """
    if payload is None or not payload.strip(b" \t\r\n"):
        return decode.EMPTY_PAYLOAD
    text = payload.decode("utf-8", "backslashreplace")
    head, opened, rest = text.partition(" [")
    time, closed, rest = rest.partition('] "')
    words = head.split(" ", 2)
    if not (opened and closed) or len(words) < 3 or not all(words):
        return decode.NOT_ACCESS_LOG
    client = naive_client(*words)
    request, place = "", 0
    while place < len(rest) and rest[place] != '"':
        step = 2 if rest[place] == "\\" else 1
        request += rest[place : place + step]
        place += step
    if place >= len(rest):
        return decode.NOT_ACCESS_LOG
    after = rest[place + 1 :].split("\r")[0].split("\n")[0].split(" ")
    if len(after) < 3 or after[0]:
        return decode.NOT_ACCESS_LOG
    status, size = after[1:3]
    if not (status == "-" or (len(status) == 3 and is_number(status))):
        return decode.NOT_ACCESS_LOG
    if not (size == "-" or is_number(size)):
        return decode.NOT_ACCESS_LOG
    if len(time) != 26 or time[3:6] not in MONTHS or time[20] != " " or time[21] not in "+-":
        return decode.NOT_ACCESS_LOG
    fixed = time[2] + time[6] + time[11] + time[14] + time[17]
    digits = time[:2] + time[7:11] + time[12:14] + time[15:17] + time[18:20] + time[22:]
    if fixed != "//:::" or not is_number(digits):
        return decode.NOT_ACCESS_LOG
    iso = f"{time[7:11]}-{MONTHS[time[3:6]]:02}-{time[:2]}T{time[12:20]}{time[21:24]}:{time[24:]}"
    if client is None:
        return decode.NOT_ACCESS_LOG
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        return decode.BAD_TIME
    words = [word for word in request.split(" ") if word]
    if words and len(words) > 1 and words[-1].startswith("HTTP/"):
        del words[-1]
    if len(words) < 2:
        return decode.NO_TARGET
    target = request[request.index(words[0]) + len(words[0]) :].strip(" ")
    if target.rpartition(" ")[2].startswith("HTTP/"):
        target = target.rpartition(" ")[0].rstrip(" ")
    if "\0" in target or "\0" in client:
        return decode.NUL_CHARACTER
    return client, moment.astimezone(UTC), target


def naive_client(first, second, rest):
    name, _, port = first.rpartition(":")
    after = rest.split(" ", 1)
    two_more = len(after) == 2 and all(after)
    try:
        ip_address(second)
        is_address = True
    except ValueError:
        is_address = False
    is_virtual_host = is_number(port) and name and (":" not in name or name[0] + name[-1] == "[]")
    if is_virtual_host and second != "-" and two_more and (is_address or after[0] == "-"):
        return second
    return None if is_address else first


def is_number(text):
    return text.isascii() and text.isdigit()


def outcomes(payloads, decoder=DECODER):
    """What becomes of each payload: (host, time, target), or a reason."""
    result = decoder(payloads, "topic")
    result.rows.validate(full=True)
    assert result.rows.schema.equals(decoder.schema, check_metadata=True)
    assert np.flatnonzero(~result.valid).tolist() == [r.row for r in result.rejections]
    reasons = {r.row: r.reason for r in result.rejections}
    rows = iter(result.rows.to_pylist())
    return [
        reasons[i]
        if i in reasons
        else (lambda r: (r["user_id"], r["event_time"], r["page_url"]))(next(rows))
        for i in range(len(payloads))
    ]


def outcome(payload):
    return outcomes(pa.array([payload], pa.binary()))[0]


@pytest.mark.parametrize(
    ("request_line", "target"),
    [
        ("GET /a?b=c#d HTTP/1.1", "/a?b=c#d"),
        ("GET /a", "/a"),
        ("GET /a b c HTTP/1.0", "/a b c"),
        ("GET  /a  HTTP/1.0", "/a"),
        (r"GET /\"quoted\" HTTP/1.1", r"/\"quoted\""),
        (r"GET /\\ HTTP/1.1", r"/\\"),
        ("OPTIONS * HTTP/2.0", "*"),
        ("CONNECT example.org:443 HTTP/1.1", "example.org:443"),
        ("GET /HTTP/1.1", "/HTTP/1.1"),
        ("GET HTTP/x HTTP/1.1", "HTTP/x"),
        ("GET /käse HTTP/1.1", "/käse"),
    ],
)
def test_the_target_is_kept_as_written(request_line, target):
    assert outcome(line(request_line))[2] == target


@pytest.mark.parametrize("request_line", ["", "-", "GET", "GET HTTP/1.1", " ", r"\x16\x03\x01"])
def test_a_request_without_a_target_is_rejected(request_line):
    assert outcome(line(request_line)) == decode.NO_TARGET


@pytest.mark.parametrize(
    "tail",
    [" 200 5", " 200 -", " - -", ' 200 5 "-" "curl"', ' 304 0 "', " 200 5 0.01 x", " 200 5\r"],
)
def test_common_and_combined_lines_with_any_tail_are_rows(tail):
    assert outcome(line(tail=tail)) == ("h", datetime(2015, 5, 17, 10, 5, 3, tzinfo=UTC), "/")


@pytest.mark.parametrize("user", ["bob", "bob smith", '""', "a [b] c"])
def test_users_may_have_spaces(user):
    assert outcome(line(user=user))[2] == "/"


@pytest.mark.parametrize("virtual_host", ["example.com:80", "127.0.1.1:443", "[2001:db8::1]:80"])
@pytest.mark.parametrize("host", ["192.0.2.7", "::1", "2001:db8::7", "crawl.example.org"])
@pytest.mark.parametrize("user", ["-", "bob", "bob smith"])
def test_a_line_behind_a_virtual_host_is_its_clients(virtual_host, host, user):
    behind = f"{virtual_host} ".encode() + line(host=host, user=user)
    assert outcomes(pa.array([line(host=host, user=user), behind], pa.binary())) == [
        (host, datetime(2015, 5, 17, 10, 5, 3, tzinfo=UTC), "/"),
        (host, datetime(2015, 5, 17, 10, 5, 3, tzinfo=UTC), "/"),
    ]


@pytest.mark.parametrize(
    ("host", "ident", "user"),
    [
        ("192.0.2.7:52134", "-", "-"),  # a proxy's client with its port
        ("192.0.2.7:52134", "-", "bob smith"),
        ("192.0.2.7:52134", "-", "- -"),
        ("192.0.2.7:52134", "frank", "bob"),
        ("192.0.2.7:52134", "frank", "bob smith"),
        ("192.0.2.7", "frank", "bob"),
        ("192.0.2.7", "frank", "- -"),
        ("2001:db8::1:80", "frank", "- -"),
        ("::1", "-", "192.0.2.7"),
        ("h", "1.2.3", "- -"),
        ("h", "dead:beef", "- -"),
    ],
)
def test_no_line_of_the_common_format_is_taken_for_another(host, ident, user):
    assert outcome(line(host=host, ident=ident, user=user))[0] == host


@pytest.mark.parametrize(
    ("first", "address", "rest"),
    [
        ("example.com", "192.0.2.7", "- -"),  # a virtual host without its port
        ("example.com", "2001:db8::7", "bob"),
        ("192.0.2.7", "10.0.0.1", "-"),
        ("example.com:80", "192.0.2.7", "-"),  # nobody's identity, or nobody's name
        ("example.com:https", "192.0.2.7", "- -"),
        ("2001:db8::1:80", "192.0.2.7", "- -"),
    ],
)
def test_an_address_in_the_place_of_a_name_is_another_format(first, address, rest):
    payload = line(host=first, ident=address, user=rest)
    assert outcome(payload) == decode.NOT_ACCESS_LOG
    [rejection] = DECODER(pa.array([payload], pa.binary()), "topic").rejections
    assert f"the second field is the address '{address}'; it must be - or" in rejection.message


def test_times_carry_their_offset():
    time = outcome(line(time="01/Jan/2015:00:30:00 +0530"))[1]
    assert time == datetime(2014, 12, 31, 19, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (None, decode.EMPTY_PAYLOAD),
        (b"", decode.EMPTY_PAYLOAD),
        (b" \r\n", decode.EMPTY_PAYLOAD),
        (line(request="GET /" + "a" * MAX_PAYLOAD_BYTES), decode.TOO_LARGE),
        (b"garbage", decode.NOT_ACCESS_LOG),
        (line()[:-6], decode.NOT_ACCESS_LOG),
        (line(tail=" 2000 5"), decode.NOT_ACCESS_LOG),
        (line(tail=" 200 5x"), decode.NOT_ACCESS_LOG),
        (line(request='GET /"'), decode.NOT_ACCESS_LOG),
        (line(time="17/Mai/2015:10:05:03 +0000"), decode.NOT_ACCESS_LOG),
        (line(time="31/Apr/2015:10:05:03 +0000"), decode.BAD_TIME),
        (line(time="17/May/2015:24:05:03 +0000"), decode.BAD_TIME),
        (line(time="01/Jan/0001:00:00:00 +0001"), decode.TIME_OUT_OF_RANGE),
        (line(request="GET /\0 HTTP/1.1"), decode.NUL_CHARACTER),
        (line(host="\0"), decode.NUL_CHARACTER),
    ],
)
def test_other_lines_are_rejected_by_themselves(payload, reason):
    assert outcome(payload) == reason
    assert [type(x) for x in outcomes(pa.array([line(), payload, line()], pa.binary()))] == [
        tuple,
        str,
        tuple,
    ]


def test_bytes_that_are_not_utf8_are_kept_as_escapes():
    payload = b'\xfe - - [17/May/2015:10:05:03 +0000] "GET /\xff\xc3\xa9\xc3 HTTP/1.1" 200 5 \xff'
    assert outcome(payload) == (
        r"\xfe",
        datetime(2015, 5, 17, 10, 5, 3, tzinfo=UTC),
        "/\\xffé\\xc3",
    )


def test_months_are_told_apart():
    lines = [line(time=f"02/{month}/2015:00:00:00 +0000") for month in MONTHS]
    times = [time for _, time, _ in outcomes(pa.array(lines, pa.binary()))]
    assert [(time.month, time.day) for time in times] == [(i, 2) for i in range(1, 13)]


words = st.sampled_from(
    ["GET", " ", "/", "/a", "HTTP/1.1", "HTTP/", r"\"", "\\\\", r"\x16", "é", "\udcff", "\0", "-"]
)
lines = st.builds(
    lambda request, host, ident, user, time, tail: (
        line("".join(request), host, user, time, tail, ident)
        if not any(0xDC80 <= ord(c) <= 0xDCFF for c in "".join(request))
        else f'{host} {ident} {user} [{time}] "{"".join(request)}"{tail}'.encode(
            "utf-8", "surrogateescape"
        )
    ),
    st.lists(words, max_size=6),
    st.sampled_from(["h", "::1", "é", "", "\0", "h:80", "[::1]:80"]),
    st.sampled_from(["-", "-", "-", "192.0.2.7", "::1", "name"]),
    st.sampled_from(["-", "bob", "bob smith", "- -", "- bob", "", " x"]),
    st.sampled_from([TIME, TIME, "30/Feb/2015:10:05:03 +0000", "17/May/2015:10:05:03 -1130", "x"]),
    st.sampled_from([" 200 5", ' 200 5 "-" "x"', " - -\r", " 20 5", " 200 x", "", " 200 5\n\nx"]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(lines | st.binary(max_size=30) | st.none(), max_size=12))
@example([b"\xff\xfe", None, line()])
def test_batches_agree_with_a_naive_reader(payloads):
    column = pa.array([b"skipped", *payloads, line()], pa.binary()).slice(1, len(payloads))
    assert outcomes(column) == [naive(payload) for payload in payloads]


def test_slices_and_empty_batches_are_read():
    assert outcomes(pa.array([], pa.binary())) == []
    column = pa.array([line(host=f"h{i}") for i in range(9)], pa.binary())
    assert [host for host, _, _ in outcomes(column.slice(3, 2))] == ["h3", "h4"]


@pytest.mark.skipif(not REAL_LOG.exists(), reason="the real log is not beside this checkout")
def test_real_lines_are_all_valid():
    payloads = gzip.decompress(REAL_LOG.read_bytes()).split(b"\n")[:-1]
    found = outcomes(pa.array(payloads, pa.binary()))
    assert len(found) == 10_000
    assert [f for f in found if isinstance(f, str)] == []
    assert len({host for host, _, _ in found}) == 1753
    assert found == [naive(payload) for payload in payloads]


def test_another_schema_is_filled():
    schema = pa.schema(
        [
            pa.field("event_time", TIMESTAMP, nullable=False),
            pa.field("address", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            one_of("kind", ("a", "b"), nullable=True),
            pa.field("amount", pa.float64()),
        ]
    )
    decoder = AccessLogDecoder(schema, {"address": "host"}, {"source": "web"})
    copy = pickle.loads(pickle.dumps(decoder))
    plain, odd = line(), line("GET /é")
    assert (
        copy(pa.array([plain, odd], pa.binary()), "t").rows.to_pylist()
        == [
            {
                "event_time": datetime(2015, 5, 17, 10, 5, 3, tzinfo=UTC),
                "address": "h",
                "source": "web",
                "kind": None,
                "amount": None,
            }
        ]
        * 2
    )


@pytest.mark.parametrize(
    ("columns", "constants", "complaint"),
    [
        ({"user_id": "host", "page_url": "target"}, {}, "'event_type'"),
        ({"user_id": "host"}, {"event_type": "page_view"}, "'page_url'"),
        ({"user_id": "agent", "page_url": "target"}, {"event_type": "page_view"}, "agent"),
        ({"nobody": "host", "page_url": "target"}, {"event_type": "page_view"}, "nobody"),
        ({"event_type": "host"}, {}, "event_type"),
    ],
)
def test_misuse_fails_at_construction(columns, constants, complaint):
    with pytest.raises(ValueError, match=complaint):
        AccessLogDecoder(ACTIVITY, columns, constants)


def test_a_constant_must_be_a_value_of_its_column():
    columns = {"user_id": "host", "page_url": "target"}
    with pytest.raises(ValueError, match="logout"):
        AccessLogDecoder(ACTIVITY, columns, {"event_type": "logout"})
