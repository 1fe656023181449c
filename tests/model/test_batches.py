import pickle

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam import coders
from apache_beam.typehints import typehints
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.model.activity import ACTIVITY, EVENT_TYPES
from beam_pipelines.model.batches import (
    BatchCoder,
    BatchOf,
    concatenated,
    empty_batch,
    encoded,
    hint_of,
    lateness_of,
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


def declared(*hints):
    """Return a PCollection per hint, of one pipeline."""
    pipeline = beam.Pipeline()
    return [
        pipeline | f"{number}" >> beam.Create([]).with_output_types(hint)
        for number, hint in enumerate(hints)
    ]


def test_hints_of_one_schema_agree_but_keep_their_lateness():
    late = BatchOf(ACTIVITY, 60)
    assert typehints.is_consistent_with(late, BatchOf(ACTIVITY))
    assert typehints.is_consistent_with(BatchOf(ACTIVITY), late)
    assert late != BatchOf(ACTIVITY, 120)
    assert pickle.loads(pickle.dumps(late)) == late
    assert late.of(pa.schema([])) == BatchOf(pa.schema([]), 60)
    assert coders.registry.get_coder(late) == BatchCoder(ACTIVITY)
    assert repr(BatchOf(pa.schema([("a", pa.int8())]), 60)) == "BatchOf(a; lateness_s=60)"


@pytest.mark.parametrize(
    ("lateness_s", "flattened_s"),
    [
        ((60, 60), 60),
        ((60, 600), 600),  # windows that wait for less would lose rows
        ((600, 60, 120), 600),
        ((60, None), None),  # rows that nobody has judged may be as late as they like
        ((None, None), None),
    ],
)
def test_a_flatten_is_as_late_as_the_latest_of_its_inputs(lateness_s, flattened_s):
    flat = declared(*(BatchOf(ACTIVITY, each_s) for each_s in lateness_s)) | beam.Flatten()
    for batches in (flat, flat | beam.Reshuffle(), flat | beam.Filter(len)):
        assert hint_of(batches) == BatchOf(ACTIVITY, flattened_s)
        assert coders.registry.get_coder(batches.element_type) == BatchCoder(ACTIVITY)


def test_flattened_pairs_are_not_pickled():
    hints = [typehints.Tuple[int, BatchOf(ACTIVITY, each_s)] for each_s in (60, 120)]
    flat = declared(*hints) | beam.Flatten()
    assert coders.registry.get_coder(flat.element_type) == coders.registry.get_coder(hints[0])


def test_unions_of_other_types_keep_their_coders():
    get = coders.registry.get_coder
    assert isinstance(get(typehints.Union[int, str]), coders.FastPrimitivesCoder)
    assert isinstance(get(typehints.Optional[int]), coders.NullableCoder)
    assert isinstance(
        get(typehints.Union[BatchOf(ACTIVITY), BatchOf(pa.schema([]))]), coders.FastPrimitivesCoder
    )


def test_flattened_batches_of_several_schemas_are_refused():
    flat = declared(BatchOf(ACTIVITY), BatchOf(ACTIVITY.remove(0))) | beam.Flatten()
    with pytest.raises(TypeError, match=r"several schemas: event_time[\s\S]* and user_id"):
        schema_of(flat)
    mixed = declared(BatchOf(ACTIVITY), int) | beam.Flatten()
    with pytest.raises(TypeError, match=r"expected a PCollection of batches, got .*Union"):
        schema_of(mixed)


def test_how_late_unbounded_rows_are_must_be_judged_before():
    def batches(bounded, lateness_s):
        return beam.pvalue.PCollection(
            None, element_type=BatchOf(ACTIVITY, lateness_s), is_bounded=bounded
        )

    assert lateness_of(batches(False, 60), "Windows") == 60
    assert lateness_of(batches(False, 0), "Windows") == 0
    assert lateness_of(batches(True, 60), "Windows") == 0  # nothing is late there
    assert lateness_of(batches(True, None), "Windows") == 0
    with pytest.raises(ValueError, match=r"Windows takes .* Batch\(…, append_time=COLUMN\), then"):
        lateness_of(batches(False, None), "Windows")
