import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels.ndjson_layout import Bytes, Layout, cut_alike

READS = {"t": '"0', "u": '"', "n": "0", "f": ""}


def cut(lines, usable=None):
    column = pa.array(lines, pa.binary())
    usable = np.ones(len(lines), bool) if usable is None else np.array(usable)
    return [
        (
            c.rows.tolist(),
            {k: v if v is None else v.tolist() for k, v in c.values.items()},
        )
        for c in cut_alike(Bytes.of(column), usable, READS)
    ]


def test_a_layout_is_what_stays_the_same():
    layout = Layout.learn(b' {"u": "a", "n":-5,"x":"y","z":true,"t":null}\r', READS)
    assert layout.literals == (b' {"u": "', b'", "n":', b',"x":"', b'","z":true,"t":null}\r')
    assert [(slot.key, slot.is_text, slot.is_read) for slot in layout.slots] == [
        ("u", True, True),
        ("n", False, True),
        ("x", True, False),
    ]
    assert layout.nulls == ("t",)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{}",
        b"[]",
        b'{"u":"a"',
        b'{"u":"a",}',
        b'{"u":"a"}}',
        b'{"u":"a"}x',
        b'{,"u":"a"}',
        b'{"u":"a" "n":1}',
        b'{"u":"a","u":"b"}',
        b'{"u":"a","x":"b","x":1}',
        b'{"u":"a\\n"}',
        b'{"u":"a\n"}',
        b'{"u\\u0000":"a"}',
        b'{"\xff":"a"}',
        b'{"u":1}',
        b'{"n":"1"}',
        b'{"n":1.0}',
        b'{"n":1e3}',
        b'{"n":01}',
        b'{"n":-}',
        b'{"t":true}',
        b'{"f":1}',
        b'{"u":"a","x":1.5}',
        b'{"u":"a","x":{}}',
        b'{"u":"a","x":[]}',
        b'{"x":null}',
    ],
)
def test_other_records_have_no_layout(record):
    assert Layout.learn(record, READS) is None


def test_rows_of_two_layouts_are_cut():
    one = [b'{"u":"%d","n":%d}' % (i, -i) for i in range(50)]
    two = [b'{"n": %d, "t": "x%s", "u": null}' % (i, b"y" * i) for i in range(50)]
    mixed = [line for pair in zip(one, two, strict=True) for line in pair]
    found = sorted(cut(mixed))
    assert found == [
        (
            list(range(0, 100, 2)),
            {"u": [str(i) for i in range(50)], "n": [-i for i in range(50)]},
        ),
        (
            list(range(1, 100, 2)),
            {"n": list(range(50)), "t": ["x" + "y" * i for i in range(50)], "u": None},
        ),
    ]


def test_rows_that_are_not_usable_are_left():
    lines = [b'{"u":"%d"}' % i for i in range(60)]
    assert cut(lines, [i % 2 == 0 for i in range(60)]) == []
    assert cut(lines * 2, [i % 2 == 0 for i in range(120)])[0][0] == list(range(0, 120, 2))


def test_few_rows_are_not_worth_learning():
    assert cut([b'{"u":"a"}'] * 5) == []


ODD = [
    b"",
    b"{",
    b'"',
    b'{"u":"a","n":1',
    b'{"u":"a","n":1}}',
    b'{"u":"a","n":1} ',
    b'{"u":"a","n":}',
    b'{"u":"a","n":-}',
    b'{"u":"a","n":01}',
    b'{"u":"a","n":-01}',
    b'{"u":"a","n":+1}',
    b'{"u":"a","n":1.}',
    b'{"u":"a","n":1e5}',
    b'{"u":"a","n":12345678901234567}',
    b'{"u":"a","n":1 }',
    b'{"u":"a","n":"1"}',
    b'{"u":"a\\","n":1}',
    b'{"u":"a\tb","n":1}',
    b'{"u":"a\0b","n":1}',
    b'{"u":"a"b","n":1}',
    b'{"u":"a","m":1}',
    b'{"v":"a","n":1}',
    b'{"u":"a","n":1}{"u":"a","n":1}',
    b'["u":"a","n":1}',
    b'{"u":"a","n":1]',
]


@pytest.mark.parametrize("odd", ODD)
def test_a_row_that_differs_by_more_than_its_values_is_left(odd):
    good = b'{"u":"","n":0}'
    assert [rows for rows, _ in cut([odd] + [good] * 40)] == [list(range(1, 41))]
    assert [rows for rows, _ in cut([good] * 40 + [odd])] == [list(range(40))]


integers = st.integers(-(10**16) + 1, 10**16 - 1) | st.integers(-1000, 1000)
texts = st.text(st.characters(codec="utf-8", exclude_characters='"\\', min_codepoint=32))


@given(
    st.lists(st.tuples(texts, integers, texts), min_size=40, max_size=50),
    st.permutations(["u", "n", "t", "x"]),
    st.sampled_from([(",", ":"), (", ", ": ")]),
)
def test_alike_records_are_cut_as_json_reads_them(rows, order, separators):
    records = [{"u": u, "n": n, "t": t, "x": n} for u, n, t in rows]
    lines = [
        json.dumps(
            {name: record[name] for name in order}, ensure_ascii=False, separators=separators
        ).encode()
        for record in records
    ]
    ((found, values),) = cut(lines)
    # The first row may lie too near to the beginning of the data for whole words; a text
    # that begins with a colon looks like a key.
    like_keys = {i for i, record in enumerate(rows) if ":" in (record[0][:1], record[2][:1])}
    assert set(range(len(lines))) - set(found) <= {0} | like_keys
    assert values == {name: [records[row][name] for row in found] for name in ("u", "n", "t")}


@given(st.lists(st.binary(max_size=12), max_size=50))
def test_any_bytes_are_survived(lines):
    good = [b'{"u":"a","n":1}'] * 70
    for rows, values in cut([*lines, *good, *lines]):
        assert len(values["u"]) == len(rows)
