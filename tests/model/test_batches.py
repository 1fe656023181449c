import pickle

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam import coders
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.model.activity import ACTIVITY, EVENT_TYPES
from beam_pipelines.model.batches import (
    BatchCoder,
    BatchOf,
    concatenated,
    empty_batch,
    encoded,
    schema_of,
    values_of,
)
from beam_pipelines.model.span import Span, SpanCoder, batch_hint, spanned

ROWS = st.lists(
    st.tuples(
        st.integers(-(10**15), 10**15),
        st.text(max_size=8),
        st.sampled_from(range(4)),
        st.one_of(st.none(), st.text(max_size=5)),
    ),
    max_size=20,
)


def batch_of(rows):
    times, users, kinds, ids = zip(*rows, strict=True) if rows else ((), (), (), ())
    return pa.RecordBatch.from_arrays(
        [
            pa.array(times, pa.timestamp("us", tz="UTC")),
            pa.array(users, pa.string()),
            pa.array(users, pa.string()),
            encoded(ACTIVITY.field("event_type"), kinds),
            pa.array(ids, pa.string()),
        ],
        schema=ACTIVITY,
    )


@given(ROWS, st.integers(0, 5))
def test_a_batch_or_a_slice_survives_its_coder(rows, start):
    coder = BatchCoder(ACTIVITY)
    batch = batch_of(rows).slice(start)
    decoded = coder.decode(coder.encode(batch))
    assert decoded.equals(batch)
    assert decoded.schema.equals(ACTIVITY, check_metadata=True)


def test_the_schema_is_not_sent():
    rows = [(0, "u", 0, None)] * 100
    assert b"page_url" not in BatchCoder(ACTIVITY).encode(batch_of(rows))
    assert b"page_view" not in BatchCoder(ACTIVITY).encode(batch_of(rows))


def test_a_batch_of_another_schema_is_refused():
    with pytest.raises(ValueError, match="a batch with columns other"):
        BatchCoder(ACTIVITY).encode(pa.record_batch({"other": [1]}))


def test_type_hints_choose_the_coder():
    assert coders.registry.get_coder(BatchOf(ACTIVITY)) == BatchCoder(ACTIVITY)
    keyed = coders.registry.get_coder(beam.typehints.Tuple[int, BatchOf(ACTIVITY)])
    assert keyed.value_coder() == BatchCoder(ACTIVITY)
    assert pickle.loads(pickle.dumps(BatchOf(ACTIVITY))) == BatchOf(ACTIVITY)
    assert pickle.loads(pickle.dumps(BatchCoder(ACTIVITY))) == BatchCoder(ACTIVITY)


def test_transforms_know_the_columns_of_their_input():
    batches = beam.pvalue.PCollection(None, element_type=BatchOf(ACTIVITY))
    assert schema_of(batches, "user_id") == ACTIVITY
    with pytest.raises(ValueError, match="no column 'nobody'; the batches have event_time"):
        schema_of(batches, "nobody")
    with pytest.raises(TypeError, match="make batches with Batch"):
        schema_of(beam.pvalue.PCollection(None, element_type=dict))


def test_one_of_columns_list_their_values():
    assert values_of(ACTIVITY.field("event_type")) == EVENT_TYPES
    with pytest.raises(ValueError, match="'user_id' is not declared with one_of"):
        values_of(ACTIVITY.field("user_id"))


def test_joining_no_batches_gives_an_empty_one():
    assert concatenated([], ACTIVITY).equals(empty_batch(ACTIVITY))
    two = concatenated([batch_of([(1, "a", 0, None)]), batch_of([(2, "b", 3, "i")])], ACTIVITY)
    assert two["event_type"].to_pylist() == ["page_view", "session_end"]


def test_spans_survive_their_coder_and_name_their_batches():
    span = Span("logs/ä.log", 0, 0, 1 << 26, 10, 99, True)
    assert SpanCoder().decode(SpanCoder().encode(span)) == span
    pairs = beam.pvalue.PCollection(None, element_type=spanned(BatchOf(ACTIVITY)))
    assert batch_hint(pairs) == BatchOf(ACTIVITY)
    with pytest.raises(TypeError, match=r"expected \(Span, batch\) pairs"):
        batch_hint(beam.pvalue.PCollection(None, element_type=BatchOf(ACTIVITY)))
