import io
import pickle
from datetime import UTC, datetime

import fastavro
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels import decode
from beam_pipelines.kernels.avro import AvroDecoder, require_bounded
from beam_pipelines.model.activity import ACTIVITY
from beam_pipelines.model.batches import one_of
from beam_pipelines.model.records import MAX_PAYLOAD_BYTES, TIMESTAMP

EVENT = {"event_time": "2026-01-01T12:00:03.5+01:00", "user_id": "u", "page_url": "/", "kind": "c"}
TIME = datetime(2026, 1, 1, 11, 0, 3, 500_000, UTC)


def schema_with(time="string", user=("null", "string"), kind="string", more=()):
    fields = {"event_time": time, "user_id": user, "page_url": "string", "kind": kind}
    return fastavro.parse_schema(
        {
            "type": "record",
            "name": "Event",
            "fields": [
                *(
                    {"name": n, "type": list(t) if isinstance(t, tuple) else t}
                    for n, t in fields.items()
                ),
                *more,
            ],
        }
    )


SCHEMAS = {
    "text": schema_with(),
    "number": schema_with("long"),
    "millis": schema_with({"type": "long", "logicalType": "timestamp-millis"}),
    "micros": schema_with({"type": "long", "logicalType": "timestamp-micros"}),
    "local": schema_with({"type": "long", "logicalType": "local-timestamp-micros"}),
    "enum": schema_with(kind={"type": "enum", "name": "Kind", "symbols": ["c", "click", "x"]}),
    "double": schema_with("double", user="bytes"),
    "id": schema_with(
        more=[{"name": "event_id", "type": {"type": "string", "logicalType": "uuid"}}]
    ),
    "array": fastavro.parse_schema({"type": "array", "items": "long"}),
}
DECODER = AvroDecoder(
    ACTIVITY, {"event_type": "kind"}, {"event_type": {"c": "click"}}, SCHEMAS.__getitem__
)


def encoded(record, schema="text"):
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, SCHEMAS[schema], record)
    return stream.getvalue()


def decoded(payloads, schema="text"):
    result = DECODER(pa.array(payloads, pa.binary()), schema)
    result.rows.validate(full=True)
    assert result.rows.schema.equals(ACTIVITY, check_metadata=True)
    assert [r.row for r in result.rejections] == [i for i, v in enumerate(result.valid) if not v]
    assert len(result.rows) + len(result.rejections) == len(payloads)
    return result


@pytest.mark.parametrize(
    ("schema", "time"),
    [
        ("text", EVENT["event_time"]),
        ("number", 1767265203500),
        ("millis", TIME),
        ("micros", TIME),
        ("enum", EVENT["event_time"]),
    ],
)
def test_times_are_read_however_they_are_written(schema, time):
    result = decoded([encoded({**EVENT, "event_time": time}, schema)], schema)
    assert result.rows.to_pylist() == [
        {
            "event_time": TIME,
            "user_id": "u",
            "page_url": "/",
            "event_type": "click",
            "event_id": None,
        }
    ]


@pytest.mark.parametrize(
    ("schema", "unit_us"), [("number", 1_000), ("millis", 1_000), ("micros", 1)]
)
def test_times_before_1970_and_just_after_are_read(schema, unit_us):
    for micros in (-62_135_596_800_000_000, -1_000_000, 0, 99_000_000, 10**14):
        record = {**EVENT, "event_time": micros // unit_us}
        result = decoded([encoded(record, "number")], schema)
        assert result.rows["event_time"].cast(pa.int64()).to_pylist() == [micros]


def test_a_timestamp_of_a_coarser_unit_than_its_type_says_how_to_write_it():
    seconds = encoded({**EVENT, "event_time": 1767603600}, "number")
    assert [r.message for r in decoded([seconds], "millis").rejections] == [
        "event_time is 1970-01-21 11:00:03.600000+00:00, so its number must be of a coarser unit "
        "than its Avro type says; write milliseconds as timestamp-millis or microseconds as "
        "timestamp-micros"
    ]


def test_uuids_are_texts():
    identifier = "6f1c2c0e-8a53-4d2e-9d5b-0123456789ab"
    result = decoded([encoded({**EVENT, "event_id": identifier}, "id")], "id")
    assert result.rows["event_id"].to_pylist() == [identifier]


@pytest.mark.parametrize(
    ("payload", "schema", "reason"),
    [
        (None, "text", decode.EMPTY_PAYLOAD),
        (b"", "text", decode.EMPTY_PAYLOAD),
        (b"x" * (MAX_PAYLOAD_BYTES + 1), "text", decode.TOO_LARGE),
        (b"\xff" * 50, "text", decode.BAD_AVRO),
        (encoded(EVENT)[:-1], "text", decode.BAD_AVRO),
        (encoded(EVENT) + b"\0", "text", decode.BAD_AVRO),
        (encoded(EVENT).replace(b"/", b"\xff"), "text", decode.BAD_TEXT),
        (encoded({**EVENT, "page_url": "a\0b"}), "text", decode.NUL_CHARACTER),
        (encoded({**EVENT, "user_id": None}), "text", decode.MISSING_FIELD),
        (encoded({**EVENT, "page_url": ""}), "text", decode.MISSING_FIELD),
        (encoded({**EVENT, "kind": "x"}), "text", decode.UNKNOWN_VALUE),
        (encoded({**EVENT, "kind": "x"}, "enum"), "enum", decode.UNKNOWN_VALUE),
        (encoded({**EVENT, "event_time": "now"}), "text", decode.BAD_TIME),
        (encoded({**EVENT, "event_time": 10**15}, "number"), "number", decode.TIME_OUT_OF_RANGE),
        (encoded({**EVENT, "event_time": 10**15}, "number"), "millis", decode.TIME_OUT_OF_RANGE),
        (encoded({**EVENT, "event_time": 0}, "number"), "local", decode.WRONG_TYPE),
        (encoded({**EVENT, "event_time": 1767603600}, "number"), "number", decode.EPOCH_SECONDS),
        (encoded({**EVENT, "event_time": 1767603600}, "number"), "millis", decode.EPOCH_SECONDS),
        (encoded({**EVENT, "event_time": 1767603600}, "number"), "micros", decode.EPOCH_SECONDS),
        (encoded({**EVENT, "event_time": 1767603600000}, "number"), "micros", decode.EPOCH_SECONDS),
        (
            encoded({**EVENT, "event_time": 0.5, "user_id": b"u"}, "double"),
            "double",
            decode.WRONG_TYPE,
        ),
        (encoded([1, 2], "array"), "array", decode.NOT_AN_OBJECT),
    ],
)
def test_a_bad_record_is_rejected_by_itself(payload, schema, reason):
    result = decoded([payload], schema)
    assert [r.reason for r in result.rejections] == [reason]
    if schema == "text":
        result = decoded([encoded(EVENT), payload, encoded(EVENT)])
        assert [(r.row, r.reason) for r in result.rejections] == [(1, reason)]


@given(st.lists(st.binary(max_size=60) | st.just(encoded(EVENT)), max_size=20))
def test_any_bytes_are_survived(payloads):
    for schema in SCHEMAS:
        decoded(payloads, schema)


def test_slices_are_read_in_place():
    payloads = pa.array([b"x", encoded(EVENT), None, b"y"], pa.binary()).slice(1, 2)
    result = DECODER(payloads, "text")
    assert result.valid.tolist() == [True, False]


def test_another_schema_is_decoded():
    orders = pa.schema(
        [
            pa.field("event_time", TIMESTAMP, nullable=False),
            pa.field("order_id", pa.string(), nullable=False),
            pa.field("amount", pa.float64(), nullable=False),
            pa.field("paid", pa.bool_()),
            one_of("channel", ("web", "shop")),
        ]
    )
    written = fastavro.parse_schema(
        {
            "type": "record",
            "name": "Order",
            "fields": [
                {"name": "event_time", "type": "long"},
                {"name": "order_id", "type": "string"},
                {"name": "amount", "type": "double"},
                {"name": "paid", "type": "boolean"},
                {"name": "channel", "type": "string"},
            ],
        }
    )
    payloads = []
    for amount in (12.5, float("nan")):
        stream = io.BytesIO()
        order = {"event_time": 0, "order_id": "o", "amount": amount, "paid": True}
        fastavro.schemaless_writer(stream, written, {**order, "channel": "shop"})
        payloads.append(stream.getvalue())
    decoder = AvroDecoder(orders, {}, {}, lambda topic: written)
    result = decoder(pa.array(payloads, pa.binary()), "orders")
    assert result.rows.to_pylist() == [
        {
            "event_time": datetime(1970, 1, 1, tzinfo=UTC),
            "order_id": "o",
            "amount": 12.5,
            "paid": True,
            "channel": "shop",
        }
    ]
    assert [(r.row, r.reason) for r in result.rejections] == [(1, decode.BAD_NUMBER)]


NODE = {"type": "record", "name": "Node", "fields": [{"name": "next", "type": ["null", "Node"]}]}
NOTHING = {"type": "record", "name": "Nothing", "fields": [{"name": "a", "type": "null"}]}


@pytest.mark.parametrize(
    "kind",
    [
        {"type": "array", "items": "null"},
        {"type": "array", "items": NOTHING},
        {"type": "map", "values": {"type": "array", "items": {"type": "null"}}},
        ["null", {"type": "array", "items": {"type": "fixed", "name": "F", "size": 0}}],
        NODE,
        {"type": "array", "items": NODE},
    ],
)
def test_a_schema_by_which_a_few_bytes_claim_anything_is_refused(kind):
    schema = schema_with(more=[{"name": "more", "type": kind}])
    decoder = AvroDecoder(ACTIVITY, {"event_type": "kind"}, {}, lambda topic: schema)
    with pytest.raises(ValueError, match=r"take no bytes|contains itself"):
        decoder(pa.array([b"\0"], pa.binary()), "topic")


@pytest.mark.parametrize(
    "kind",
    [
        "null",
        NOTHING,
        {"type": "map", "values": "null"},
        {"type": "array", "items": ["null"]},
        {"type": "array", "items": {"type": "array", "items": "boolean"}},
    ],
)
def test_a_schema_whose_items_take_bytes_is_read(kind):
    twice = [{"name": "more", "type": kind}, {"name": "again", "type": "string"}]
    require_bounded(schema_with(more=twice))
    named = {"type": "record", "name": "Point", "fields": [{"name": "x", "type": "long"}]}
    fields = [{"name": "a", "type": named}, {"name": "b", "type": ["null", "Point"]}]
    require_bounded(schema_with(more=fields))


def test_an_array_that_claims_more_items_than_there_are_bytes_is_a_bad_record():
    ids = {"type": "array", "items": "string"}
    schema = schema_with(more=[{"name": "more", "type": ids}])
    decoder = AvroDecoder(ACTIVITY, {"event_type": "kind"}, {}, lambda topic: schema)
    claims = encoded(EVENT) + b"\x80\x80\x80\x80\x80\x80\x80\x80\x40" + b"\0"
    result = decoder(pa.array([claims], pa.binary()), "topic")
    assert [r.reason for r in result.rejections] == [decode.BAD_AVRO]


def test_decoders_are_pickled():
    decoder = AvroDecoder(ACTIVITY, {}, {}, fastavro.parse_schema)
    assert pickle.loads(pickle.dumps(decoder)) == decoder
