import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels.texts import (
    MARK,
    MAX_KEY_BYTES,
    key_limit,
    short_columns,
    short_field,
    short_texts,
    shortened,
)
from beam_pipelines.model.batches import one_of, shortened_field, shortened_to
from tests.io.contract import LONG, shortened_form

PAGE = pa.field("page", pa.string())


def short(*texts, limit=MAX_KEY_BYTES):
    return shortened(pa.array(texts, pa.string()), limit).to_pylist()


def test_a_text_that_fits_stays_and_a_longer_one_is_its_beginning_and_its_hash():
    fits = "é" * (MAX_KEY_BYTES // 2)
    assert short(fits, "", None, *LONG) == [fits, "", None, *map(shortened_form, LONG)]
    assert all(len(text.encode()) <= MAX_KEY_BYTES for text in short(*LONG))


@pytest.mark.parametrize("text", [MARK, f"/a{MARK}b", shortened_form(LONG[0])])
def test_a_text_that_contains_the_mark_is_shortened_however_short(text):
    assert short("/a", text, "/b") == ["/a", shortened_form(text), "/b"]


def test_only_the_rows_of_a_slice_are_looked_at():
    column = pa.array([LONG[0], "/a", MARK, "/b"])
    assert shortened(column.slice(1, 1), MAX_KEY_BYTES).to_pylist() == ["/a"]
    assert shortened(column.slice(3), MAX_KEY_BYTES).to_pylist() == ["/b"]
    assert shortened(column.slice(1, 2), MAX_KEY_BYTES).to_pylist() == ["/a", shortened_form(MARK)]
    assert shortened(column.slice(4), MAX_KEY_BYTES).to_pylist() == []


TEXTS = st.text("aé…", max_size=120) | st.text("aé…", max_size=120).map(lambda t: f"{t}{MARK}")


@given(st.lists(TEXTS | TEXTS.map(lambda text: short(text, limit=90)[0]), max_size=20))
def test_different_texts_stay_different_and_none_is_longer_than_the_limit(texts):
    found = short(*texts, limit=90)
    assert len(set(found)) == len(set(texts))
    assert max((len(text.encode()) for text in found), default=0) <= 90


def test_columns_are_shortened_once_and_marked():
    rows = pa.RecordBatch.from_arrays([pa.array(LONG), pa.array([1, 2])], ["page", "n"])
    once = short_columns(rows, ["page", "n", "page"], MAX_KEY_BYTES)
    assert once["page"].to_pylist() == [*map(shortened_form, LONG)]
    assert [shortened_to(field) for field in once.schema] == [MAX_KEY_BYTES, None]
    assert short_columns(once, ["page"], MAX_KEY_BYTES) is once
    tighter = short_columns(once, ["page"], 1_000)
    assert [len(text.encode()) <= 1_000 for text in tighter["page"].to_pylist()] == [True] * 2
    assert shortened_to(tighter.schema.field("page")) == 1_000


def test_texts_of_a_marked_column_stay_and_what_comes_of_them_is_marked():
    texts = pa.array([*map(shortened_form, LONG)])
    assert short_texts(texts, shortened_field(PAGE, MAX_KEY_BYTES)) is texts
    assert short_texts(texts, PAGE).to_pylist() == [shortened_form(t) for t in texts.to_pylist()]
    numbers = pa.array([1])
    assert short_texts(numbers, pa.field("n", pa.int64())) is numbers
    assert shortened_to(short_field(PAGE, PAGE)) == MAX_KEY_BYTES
    assert shortened_to(short_field(PAGE, shortened_field(PAGE, 1_000))) == 1_000
    assert shortened_to(short_field(pa.field("n", pa.int64()), PAGE)) is None


def test_a_mark_leaves_other_metadata():
    field = shortened_field(one_of("kind", ("a", "b")), 90)
    assert field.metadata == {b"values": b"a\nb", b"shortened": b"90"}


def test_the_texts_of_a_key_share_its_bytes():
    schema = pa.schema([PAGE, pa.field("user", pa.string()), pa.field("n", pa.int64())])
    assert key_limit(schema, ["page", "n"]) == 2_000
    assert key_limit(schema, ["page", "user"]) == 1_000
    assert key_limit(schema, ["n"]) == 2_000
