import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beam_pipelines.kernels import decode
from beam_pipelines.kernels.decode import RejectedError, batch_of, fields_of
from beam_pipelines.kernels.ndjson import MAX_DEPTH, NdjsonDecoder, read_one
from beam_pipelines.model.activity import ACTIVITY
from beam_pipelines.model.batches import one_of
from beam_pipelines.model.records import MAX_PAYLOAD_BYTES, TIMESTAMP

ORDERS = pa.schema(
    [
        pa.field("event_time", TIMESTAMP, nullable=False),
        pa.field("order_id", pa.string(), nullable=False),
        pa.field("amount", pa.float64(), nullable=False),
        pa.field("items", pa.int64()),
        pa.field("paid", pa.bool_()),
        one_of("channel", ("web", "shop"), nullable=True),
        pa.field("shipped", TIMESTAMP),
    ]
)
EVENT = {
    "event_id": "6f1c2c0e",
    "event_time": "2026-01-01T12:00:03.123456Z",
    "user_id": "u-1234",
    "page_url": "/pricing",
    "event_type": "page_view",
}
ORDER = {
    "event_time": 1767225600000,
    "order_id": "o-1",
    "amount": 12.5,
    "items": 3,
    "paid": True,
    "channel": "web",
    "shipped": "2026-01-02T00:00:00Z",
}
ROW = (1767268803123456, "u-1234", "/pricing", 0, "6f1c2c0e")


def event(**changes):
    record = {**EVENT, **changes}
    return {name: value for name, value in record.items() if value is not ...}


def raw(record):
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")


def compact(record):
    return json.dumps(record, separators=(",", ":")).encode()


def payloads_of(records):
    return pa.array(records, pa.binary())


def reference(payloads, decoder):
    """Decode with the definition alone."""
    fields = fields_of(decoder.schema, decoder.fields, decoder.values)
    rows, rejections = [], []
    for row, payload in enumerate(payloads.to_pylist()):
        try:
            rows.append(read_one(payload, fields))
        except RejectedError as error:
            rejections.append(error.at(row))
    return batch_of(decoder.schema, fields, rows), rejections


def assert_agrees(payloads, decoder):
    decoded = decoder(payloads, "topic")
    rows, rejections = reference(payloads, decoder)
    decoded.rows.validate(full=True)
    assert decoded.rows.schema.equals(decoder.schema, check_metadata=True)
    assert decoded.rows.to_pylist() == rows.to_pylist()
    assert decoded.rejections == rejections
    assert np.flatnonzero(~decoded.valid).tolist() == [r.row for r in rejections]
    assert len(decoded.valid) == len(payloads)
    pa.array([r.message for r in rejections], pa.string())  # fits into a dead letter
    assert all(len(r.message) < 300 for r in rejections)
    return decoded


def reason_of(payload, decoder=None):
    decoded = assert_agrees(payloads_of([payload]), decoder or NdjsonDecoder(ACTIVITY))
    return decoded.rejections[0].reason if decoded.rejections else None


BAD = [
    (None, decode.EMPTY_PAYLOAD),
    (b"", decode.EMPTY_PAYLOAD),
    (b" \r\n\t", decode.EMPTY_PAYLOAD),
    (b" " * (MAX_PAYLOAD_BYTES + 1), decode.TOO_LARGE),
    (raw(event(pad="x" * MAX_PAYLOAD_BYTES)), decode.TOO_LARGE),
    (b"garbage", decode.NOT_JSON),
    (raw(EVENT) + b"x", decode.NOT_JSON),
    (raw(EVENT) + raw(EVENT), decode.NOT_JSON),
    (raw(EVENT)[:-1], decode.NOT_JSON),
    (raw(EVENT)[:-1] + b",}", decode.NOT_JSON),
    (b"\xef\xbb\xbf" + raw(EVENT), decode.NOT_JSON),
    (raw(EVENT).replace(b"u-1234", b"u\x01"), decode.NOT_JSON),
    (raw(EVENT).replace(b"u-1234", b"u\x00"), decode.NOT_JSON),
    (raw(EVENT).replace(b"u-1234", b"\\u12"), decode.NOT_JSON),
    (raw(event(x=1)).replace(b"1}", b"01}"), decode.NOT_JSON),
    (raw(EVENT) + b"\0", decode.NOT_JSON),
    (raw(EVENT).decode().encode("utf-16"), decode.BAD_TEXT),
    (raw(event(x=float("nan"))), decode.BAD_NUMBER),
    (raw(event(event_time=float("inf"))), decode.BAD_NUMBER),
    (raw(EVENT).replace(b"u-1234", b"\xff"), decode.BAD_TEXT),
    (raw(event(x="é")).replace(b"\xc3\xa9", b"\xc3"), decode.BAD_TEXT),
    (raw(event(x="\ud800")), decode.BAD_TEXT),
    (json.dumps(event(user_id="\ud800")).encode(), decode.BAD_TEXT),
    (json.dumps(event(user_id="a\udc00b")).encode(), decode.BAD_TEXT),
    (raw(event(user_id="a\0b")), decode.NUL_CHARACTER),
    (raw(event(event_id="\0")), decode.NUL_CHARACTER),
    (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", decode.TOO_DEEP),
    (b"[" * 100_000, decode.TOO_DEEP),
    (b'{"x":' * 100_000, decode.TOO_DEEP),
    (b'{"x":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + raw(EVENT)[:-1], decode.TOO_DEEP),
    (b"[]", decode.NOT_AN_OBJECT),
    (b"null", decode.NOT_AN_OBJECT),
    (raw(json.dumps(EVENT)), decode.NOT_AN_OBJECT),
    (b"{}", decode.MISSING_FIELD),
    (raw(event(user_id=...)), decode.MISSING_FIELD),
    (raw(event(user_id=None)), decode.MISSING_FIELD),
    (raw(event(user_id="")), decode.MISSING_FIELD),
    (raw(event(event_type="")), decode.MISSING_FIELD),
    (raw(event(event_time=None)), decode.MISSING_FIELD),
    (raw(event(user_id=7)), decode.WRONG_TYPE),
    (raw(event(user_id=["u"])), decode.WRONG_TYPE),
    (raw(event(event_id=5)), decode.WRONG_TYPE),
    (raw(event(event_type=True)), decode.WRONG_TYPE),
    (raw(event(event_time=True)), decode.WRONG_TYPE),
    (raw(event(event_time=1.5)), decode.WRONG_TYPE),
    (raw(event(event_time={})), decode.WRONG_TYPE),
    (raw(event(event_type="logout")), decode.UNKNOWN_VALUE),
    (raw(event(event_type="PAGE_VIEW")), decode.UNKNOWN_VALUE),
    (raw(event(event_type="a\0")), decode.UNKNOWN_VALUE),
    (raw(event(event_time="")), decode.BAD_TIME),
    (raw(event(event_time="yesterday")), decode.BAD_TIME),
    (raw(event(event_time="\ud800" * 100)), decode.BAD_TEXT),
    (json.dumps(event(event_time="\ud800" * 100)).encode(), decode.BAD_TIME),
    (raw(event(event_time="2026-02-30T00:00:00Z")), decode.BAD_TIME),
    (raw(event(event_time=10**30)), decode.TIME_OUT_OF_RANGE),
    (raw(event(event_time=2**63)), decode.TIME_OUT_OF_RANGE),
    (raw(event(event_time=253402300800000)), decode.TIME_OUT_OF_RANGE),
    (raw(event(event_time=1767603600)), decode.EPOCH_SECONDS),
    (raw(event(event_time=1767603600.5)), decode.WRONG_TYPE),
    (raw(event(event_time=1767603600000.0)), decode.WRONG_TYPE),
    (raw(event(event_time="1767603600")), decode.BAD_TIME),
    (raw(event(event_time="9999-12-31T23:59:59-01:00")), decode.TIME_OUT_OF_RANGE),
    (raw(EVENT)[:-1] + b',"user_id":"u-1234"}', decode.DUPLICATE_KEY),
    (b'{"user_id":"a",' + raw(EVENT)[1:], decode.DUPLICATE_KEY),
    (raw(EVENT)[:-1] + b',"user_id" :1}', decode.DUPLICATE_KEY),
    (raw(EVENT)[:-1] + b',"\\u0075ser_id":"x"}', decode.DUPLICATE_KEY),
    (raw(EVENT)[:-1] + b',"\\u0075ser_i\\u0064"\n:"x"}', decode.DUPLICATE_KEY),
]
FINE = [
    raw(EVENT),
    compact(EVENT),
    b" \r\n" + json.dumps(EVENT, indent=2).encode() + b"\r\n",
    raw(dict(reversed(EVENT.items()))),
    raw(event(x=[{"user_id": 1}, "user_id", '"user_id":', "[" * 1000])),
    raw(event(x={"user_id": {"user_id": None}})),
    raw(EVENT)[:-1] + b',"x":1,"x":2}',
    raw(EVENT)[:-1] + b',"x":1e400,"y":' + b"9" * 6000 + b"}",
    raw(EVENT)[:-1] + b',"x":"\\ud800","\\udc00":0}',
    raw(EVENT)[:-1] + b',"x":"\\u0000"}',
    raw(EVENT).replace(b'"user_id"', b'"\\u0075ser_id"'),
    raw(EVENT).replace(b'"user_id":', b'"user_id" \t:'),
    raw(EVENT).replace(b"/pricing", b"\\/pricing"),
    raw(event(x=1)).replace(b"1}", b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"),
]


@pytest.mark.parametrize(("payload", "reason"), BAD)
def test_a_bad_record_is_rejected_by_itself(payload, reason):
    assert reason_of(payload) == reason
    around = assert_agrees(payloads_of([compact(EVENT)] * 40 + [payload]), NdjsonDecoder(ACTIVITY))
    assert [(r.row, r.reason) for r in around.rejections] == [(40, reason)]
    assert len(around.rows) == 40


@pytest.mark.parametrize("payload", FINE)
def test_a_record_may_be_written_in_any_way_json_allows(payload):
    decoded = NdjsonDecoder(ACTIVITY)(payloads_of([payload]), "topic")
    assert decoded.rejections == []
    micros, *others = ROW
    assert decoded.rows["event_time"].cast(pa.int64()).to_pylist() == [micros]
    assert [decoded.rows[n][0].as_py() for n in ("user_id", "page_url")] == others[:2]
    assert decoded.rows["event_type"].indices.to_pylist() == [others[2]]


def test_messages_name_the_field_what_was_seen_and_what_would_be_right():
    decoded = NdjsonDecoder(ACTIVITY)(
        payloads_of(
            [
                raw(event(user_id=7)),
                raw(event(event_type="x" * 99)),
                raw(event(event_time="now")),
                raw(event(event_time=1767603600)),
                raw(event(event_time=1767603600.5)),
            ]
        ),
        "topic",
    )
    assert [r.message for r in decoded.rejections] == [
        "user_id is an integer; it must be a text",
        f"event_type is '{'x' * 40}...', not one of page_view, click, session_start, session_end",
        "event_time is 'now', not a time like 2026-01-05T09:00:03.123Z",
        "event_time is 1767603600, which must be seconds; send milliseconds since 1970 "
        "(1767603600000) or an RFC 3339 text",
        "event_time is a number with a fraction or exponent; it must be an RFC 3339 text or an "
        "integer of milliseconds since 1970",
    ]


@pytest.mark.parametrize("rows", [1, 50])  # parsed one by one, cut by their layout
@pytest.mark.parametrize("more", [{}, {"x": "\\"}])  # or parsed by msgspec
def test_integers_that_can_only_be_seconds_are_no_milliseconds(rows, more):
    numbers = (-(10**9), 0, 10**8 - 1, 10**8, 1767603600, 10**11 - 1, 10**11, 1767603600000)
    seconds = (10**8, 1767603600, 10**11 - 1)
    for number in numbers:
        batch = payloads_of([compact({**EVENT, "event_time": number, **more})] * rows)
        decoded = assert_agrees(batch, NdjsonDecoder(ACTIVITY))
        if number in seconds:
            assert [r.reason for r in decoded.rejections] == [decode.EPOCH_SECONDS] * rows
        else:
            times = decoded.rows["event_time"].cast(pa.int64()).to_pylist()
            assert times == [number * 1_000] * rows
    mixed = [compact({**EVENT, "event_time": n, **more}) for n in numbers for _ in range(rows)]
    assert len(assert_agrees(payloads_of(mixed), NdjsonDecoder(ACTIVITY)).rows) == 5 * rows


def test_an_empty_event_id_is_none():
    for count in (1, 50):
        payloads = payloads_of([compact(event(event_id=""))] * count)
        decoded = assert_agrees(payloads, NdjsonDecoder(ACTIVITY))
        assert decoded.rows["event_id"].to_pylist() == [None] * count


def test_a_batch_of_garbage_leaves_no_row():
    garbage = payloads_of([payload for payload, _ in BAD if payload is None or len(payload) < 999])
    decoded = assert_agrees(garbage, NdjsonDecoder(ACTIVITY))
    assert len(decoded.rows) == 0
    assert len(decoded.rejections) == len(garbage)


def test_an_empty_batch_is_decoded():
    decoded = assert_agrees(payloads_of([]), NdjsonDecoder(ACTIVITY))
    assert decoded.rows.schema == ACTIVITY


def test_good_and_bad_records_of_every_kind_mix():
    small = [payload for payload, _ in BAD if payload is None or len(payload) < 99_999]
    mixed = [p for pair in zip(small, [*FINE] * 10, strict=False) for p in pair]
    plain = [compact(event(user_id=f"ü{i}")) for i in range(60)]
    without_id = [compact(event(user_id=f"u{i}", event_id=...)) for i in range(60)]
    by_number = [compact(event(event_time=i - 30, x="y")) for i in range(60)]
    lines = [*mixed, *plain, *mixed, *without_id, *by_number]
    for seed in range(3):
        np.random.default_rng(seed).shuffle(lines)
        payloads = payloads_of([b'{"skipped', *lines, b"skipped"])
        decoded = assert_agrees(payloads.slice(1, len(lines)), NdjsonDecoder(ACTIVITY))
        assert len(decoded.rows) > 180


def test_foreign_names_and_values_are_mapped():
    decoder = NdjsonDecoder(
        ACTIVITY,
        {"event_time": "ts", "user_id": "uid"},
        {"event_type": {"pageview": "page_view", "click": "session_end"}},
    )
    record = {"ts": 0, "uid": "u", "page_url": "/", "user_id": 5}
    types = ["pageview", "page_view", "click", "other"]
    lines = [compact({**record, "event_type": types[i % 4]}) for i in range(80)]
    for count in (4, 80):
        decoded = assert_agrees(payloads_of(lines[:count]), decoder)
        assert decoded.rows["event_type"].to_pylist() == (
            ["page_view", "page_view", "session_end"] * (count // 4)
        )


def test_another_schema_is_decoded():
    decoder = NdjsonDecoder(ORDERS)
    decoded = assert_agrees(payloads_of([raw(ORDER)]), decoder)
    assert decoded.rows["amount"].to_pylist() == [12.5]
    assert decoded.rows["channel"].to_pylist() == ["web"]
    bare = {"event_time": -1, "order_id": "ö", "amount": 1}
    decoded = assert_agrees(payloads_of([raw(bare)] * 50), decoder)
    assert decoded.rows.slice(49)["items"].to_pylist() == [None]


@pytest.mark.parametrize(
    ("field", "token", "reason"),
    [
        ("amount", b"1e400", decode.BAD_NUMBER),
        ("amount", b"9" * 400, decode.BAD_NUMBER),
        ("amount", b"-" + b"9" * 6000, decode.BAD_NUMBER),
        ("amount", b"NaN", decode.BAD_NUMBER),
        ("amount", b"123456789012345678901234567890", None),
        ("amount", b"-0", None),
        ("amount", b"-0.0", None),
        ("amount", b"5e-324", None),
        ("amount", b'"1"', decode.WRONG_TYPE),
        ("amount", b"true", decode.WRONG_TYPE),
        ("items", b"123456789012345678901234567890", decode.BAD_NUMBER),
        ("items", b"9" * 6000, decode.BAD_NUMBER),
        ("items", b"9223372036854775808", decode.BAD_NUMBER),
        ("items", b"9223372036854775807", None),
        ("items", b"-9223372036854775808", None),
        ("items", b"1e400", decode.BAD_NUMBER),
        ("items", b"1.0", decode.WRONG_TYPE),
        ("items", b"1e3", decode.WRONG_TYPE),
        ("items", b"false", decode.WRONG_TYPE),
        ("items", b"null", None),
        ("paid", b"1", decode.WRONG_TYPE),
        ("paid", b'"true"', decode.WRONG_TYPE),
        ("channel", b'""', None),
        ("shipped", b"null", None),
        ("shipped", b'""', decode.BAD_TIME),
    ],
)
def test_numbers_and_flags_keep_their_types(field, token, reason):
    payload = raw({**ORDER, field: "@"}).replace(b'"@"', token)
    assert reason_of(payload, NdjsonDecoder(ORDERS)) == reason
    plain = raw({k: v for k, v in ORDER.items() if k not in ("paid", "amount")})
    assert reason_of(plain, NdjsonDecoder(ORDERS)) == decode.MISSING_FIELD


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["page_view", "click", "", "u", "\0", "\ud800", "2026-01-01T00:00:00Z"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
names = st.sampled_from([*EVENT, *ORDER, "x", "usér", "id", "_id", 'r_id"'])
times = st.sampled_from(
    ["2026-01-01T00:00:00Z", "2026-01-01 00:00:00.5+01:00", 0, -1, 10**8, 10**11, 10**14]
)
records = st.builds(
    lambda base, changes, time, dropped: {
        name: value
        for name, value in {**base, "event_time": time, **changes}.items()
        if name not in dropped
    },
    st.sampled_from([EVENT, ORDER, {**EVENT, **ORDER}]),
    st.dictionaries(names, json_values, max_size=2),
    times,
    st.lists(names, max_size=1),
)


@st.composite
def written(draw):
    """A record as somebody might write it, perhaps damaged."""
    record = draw(records)
    text = json.dumps(
        record,
        ensure_ascii=draw(st.booleans()),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " :\t")])),
    )
    payload = text.encode("utf-8", "surrogatepass")
    damage = draw(st.sampled_from(["none", "none", "none", "cut", "flip", "repeat", "insert"]))
    place = draw(st.integers(0, len(payload)))
    if damage == "cut":
        return payload[:place]
    if damage == "flip":
        return payload[:place] + draw(st.binary(max_size=2)) + payload[place + 1 :]
    if damage == "insert":
        return payload[:place] + draw(st.sampled_from([b"\\", b'"', b":", b" ", b"}", b"\xe9"]))
    if damage == "repeat":
        return payload[:-1] + b"," + payload[1:]
    return payload


@settings(max_examples=300, deadline=None)
@given(st.lists(written() | st.none() | st.binary(max_size=9), max_size=6), st.integers(0, 40))
@example([b'{"u":1}'], 0)
def test_batches_agree_with_the_definition_record_by_record(lines, copies):
    for decoder in (NdjsonDecoder(ACTIVITY), NdjsonDecoder(ORDERS)):
        assert_agrees(payloads_of(lines), decoder)
        assert_agrees(payloads_of((lines + lines[:1] * copies)[1:]), decoder)


@settings(max_examples=100, deadline=None)
@given(written(), st.lists(st.tuples(st.integers(0, 399), st.binary(min_size=1, max_size=1))))
def test_alike_records_with_single_bytes_changed_agree_with_the_definition(line, changes):
    lines = [bytearray(line) for _ in range(40)]
    for row, (place, byte) in enumerate(changes[:39]):
        if lines[row]:
            lines[row][place % len(line) : place % len(line) + 1] = byte
    payloads = payloads_of([bytes(line) for line in lines])
    for decoder in (NdjsonDecoder(ACTIVITY), NdjsonDecoder(ORDERS)):
        assert_agrees(payloads, decoder)


def test_decoders_are_pickled_without_what_they_cache():
    decoder = NdjsonDecoder(ACTIVITY, {"user_id": "uid"})
    payloads = payloads_of([compact({"uid": "u", **EVENT})])
    copy = pickle.loads(pickle.dumps(decoder))
    assert copy(payloads, "t").rows == decoder(payloads, "t").rows
    assert pickle.loads(pickle.dumps(decoder)) == decoder


@pytest.mark.parametrize(
    ("schema", "fields", "values", "complaint"),
    [
        (ACTIVITY, {"nobody": "x"}, {}, "no column 'nobody'"),
        (ACTIVITY, {}, {"nobody": {}}, "no column 'nobody'"),
        (ACTIVITY, {}, {"user_id": {"a": "b"}}, "takes any value"),
        (ACTIVITY, {}, {"event_type": {"a": "b"}}, "not 'b'"),
        (ACTIVITY, {"user_id": "page_url"}, {}, "two columns"),
        (pa.schema([("a", pa.int32())]), {}, {}, "int32"),
    ],
)
def test_misuse_fails_at_construction(schema, fields, values, complaint):
    with pytest.raises(ValueError, match=complaint):
        NdjsonDecoder(schema, fields, values)
