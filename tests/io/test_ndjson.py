import json
import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.io.ndjson import ndjson, require_json
from beam_pipelines.model.batches import batch_of_rows, empty_batch, one_of
from beam_pipelines.model.records import MAX_EVENT_TIME_US, MIN_EVENT_TIME_US, TIMESTAMP

EVERY_TYPE = pa.schema(
    [
        pa.field("at", TIMESTAMP, nullable=False),
        pa.field('na"me', pa.string()),
        one_of("kind", ("a", 'b "quoted"'), nullable=True),
        pa.field("count", pa.int64()),
        pa.field("hash", pa.uint64()),
        pa.field("share", pa.float64()),
        pa.field("ok", pa.bool_()),
        pa.field("seen", TIMESTAMP),
    ]
)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
moments = st.integers(MIN_EVENT_TIME_US, MAX_EVENT_TIME_US).map(
    lambda micros: EPOCH + timedelta(microseconds=micros)
)
rows_of_every_type = st.lists(
    st.fixed_dictionaries(
        {
            "at": moments,
            'na"me': st.none() | texts,
            "kind": st.none() | st.sampled_from(["a", 'b "quoted"']),
            "count": st.none() | st.integers(-(2**63), 2**63 - 1),
            "hash": st.none() | st.integers(0, 2**64 - 1),
            "share": st.none() | st.floats(),
            "ok": st.none() | st.booleans(),
            "seen": st.none() | moments,
        }
    ),
    max_size=12,
)


def as_json(value):
    if isinstance(value, datetime):
        return f"{value.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"
    return value


def expected(rows):
    finite = [
        {k: v for k, v in row.items() if not (isinstance(v, float) and not math.isfinite(v))}
        for row in rows
    ]
    return [{k: as_json(v) for k, v in row.items() if v is not None} for row in finite]


def lines_of(buffer):
    text = bytes(buffer).decode()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, object_pairs_hook=dict) for line in text.split("\n")[:-1]]


@given(rows_of_every_type, st.integers(0, 3))
def test_lines_are_json_of_the_rows_without_nulls(rows, skipped):
    batch = batch_of_rows(rows, EVERY_TYPE).slice(skipped)
    assert lines_of(ndjson(batch)) == expected(rows[skipped:])


def test_a_line_reads_like_this():
    row = {
        "at": datetime(2026, 1, 5, 9, 0, 3, 123, tzinfo=UTC),
        'na"me': 'é "\\\n\x01',
        "kind": 'b "quoted"',
        "count": -1,
        "hash": 2**64 - 1,
        "share": 0.1,
        "ok": True,
        "seen": None,
    }
    assert bytes(ndjson(batch_of_rows([row], EVERY_TYPE))).decode() == (
        '{"at":"2026-01-05T09:00:03.000123Z","na\\"me":"é \\"\\\\\\n\\u0001",'
        '"kind":"b \\"quoted\\"","count":-1,"hash":18446744073709551615,"share":0.1,"ok":true}\n'
    )


def test_no_rows_give_no_lines():
    assert bytes(ndjson(empty_batch(EVERY_TYPE))) == b""


def test_a_constant_column_is_in_every_line():
    names = pa.DictionaryArray.from_arrays(np.zeros(2, np.int8), pa.array(["x"]))
    batch = pa.record_batch({"n": [1, 2], "always": names})
    assert bytes(ndjson(batch)) == b'{"n":1,"always":"x"}\n{"n":2,"always":"x"}\n'


def test_bytes_do_not_fit_into_json():
    schema = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("b", pa.binary())])
    with pytest.raises(ValueError, match="'b' of type binary"):
        require_json(schema)


def test_the_first_column_must_not_be_nullable():
    with pytest.raises(ValueError, match="'n', is nullable"):
        require_json(pa.schema([pa.field("n", pa.int64())]))
    require_json(EVERY_TYPE)
