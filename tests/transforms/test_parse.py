"""From payloads to rows and dead letters, and on to the verdicts of the time rule."""

import json
from random import Random

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.pvalue import TaggedOutput
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import FixedWindows
from apache_beam.utils.timestamp import Timestamp

from beam_pipelines.kernels.decode import RejectedError
from beam_pipelines.kernels.ndjson import NdjsonDecoder, read_one
from beam_pipelines.model.batches import BatchOf, batch_of_rows
from beam_pipelines.model.hash_key import HashKey
from beam_pipelines.model.records import EVENT_TIME, PAYLOADS, TIMESTAMP
from beam_pipelines.model.span import Span, spanned
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.transforms import parse
from beam_pipelines.transforms.lateness import ClassifyLateness
from beam_pipelines.transforms.parse import COORDINATES, DECODED_ROWS, PAYLOAD, Parse, _ParseFn
from tests.murmur import twin_of

READINGS = pa.schema(
    [
        pa.field(EVENT_TIME, TIMESTAMP, nullable=False),
        pa.field("sensor", pa.string(), nullable=False),
        pa.field("id", pa.string()),
    ]
)
DECODER = NdjsonDecoder(READINGS, {}, {})
S = 1_000_000


def reading(time_s, sensor="a", **more):
    return json.dumps({"event_time": time_s * 1000, "sensor": sensor, **more}).encode()


def records(*payloads, start=0, append_s=None, last=True):
    rows = [
        {"payload": payload, "offset": start + i, "append_time": append_s and append_s * S}
        for i, payload in enumerate(payloads)
    ]
    end = start + len(payloads)
    return Span("topic", 3, 0, 1000, start, end, last), batch_of_rows(rows, PAYLOADS)


def run(check, *pairs, identify_by="id", rule=None, hash_key=None):
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        payloads = pipeline | beam.Create(list(pairs), reshuffle=False).with_output_types(
            spanned(BatchOf(PAYLOADS))
        )
        parsed = payloads | Parse(DECODER, identify_by, hash_key)
        check(parsed if rule is None else parsed.rows | ClassifyLateness(rule))


def column(name):
    return lambda batch: batch[name].to_pylist()


def of_pair(name):
    return lambda pair: pair[1][name].to_pylist()


def test_a_bad_record_becomes_a_dead_letter_and_the_batch_around_it_survives():
    def check(parsed):
        assert_that(
            parsed.rows | "S" >> beam.FlatMap(of_pair("sensor")), equal_to(["a", "b"]), label="rows"
        )
        letters = parsed.dead_letters | "L" >> beam.FlatMap(lambda batch: batch.to_pylist())
        assert_that(
            letters
            | beam.Map(
                lambda letter: (
                    letter["payload"],
                    letter["topic"],
                    letter["partition"],
                    letter["offset"],
                    letter["stage"],
                    letter["reason"],
                )
            ),
            equal_to([(b"garbage", "topic", 3, 1, "parse", "not_json")]),
            label="letters",
        )

    run(check, records(reading(1, "a"), b"garbage", reading(2, "b")))


def test_a_batch_of_garbage_and_an_empty_one_still_tell_what_they_cover():
    def check(parsed):
        spans = parsed.rows | beam.Map(lambda pair: (pair[0].start, pair[0].end, len(pair[1])))
        assert_that(spans, equal_to([(0, 3, 0), (3, 3, 0), (3, 4, 1)]), label="spans")
        reasons = parsed.dead_letters | beam.FlatMap(column("reason"))
        assert_that(
            reasons, equal_to(["not_json", "empty_payload", "empty_payload"]), label="reasons"
        )

    run(
        check,
        records(b"{]", b"", None, last=False),
        records(start=3, last=False),
        records(reading(1), start=3),
    )


@pytest.mark.parametrize(
    ("identify_by", "expected"),
    [
        # id and time; the payload where there is no id; so copies pair up as listed
        ("id", [0, 0, 2, 3, 3]),
        (PAYLOAD, [0, 1, 2, 3, 3]),
        (COORDINATES, [0, 1, 2, 3, 4]),
    ],
)
def test_copies_of_an_event_share_an_identity(identify_by, expected):
    payloads = [
        reading(1, "a", id="x"),
        reading(1, "a", id="x", extra=1),
        reading(2, "a", id="x"),
        reading(3, "a"),
        reading(3, "a"),
    ]

    def check(parsed):
        def first_alike(pair):
            identities = pair[1]["identity"].to_pylist()
            return [identities.index(identity) for identity in identities]

        assert_that(parsed.rows | beam.FlatMap(first_alike), equal_to(expected))

    run(check, records(*payloads), identify_by=identify_by)


def identities(parsed):
    return parsed.rows | beam.FlatMap(of_pair("identity"))


def test_records_without_an_id_are_told_apart_at_one_instant():
    def check(parsed):
        distinct = identities(parsed) | beam.combiners.ToList() | beam.Map(lambda all: len({*all}))
        assert_that(distinct, equal_to([3]))

    run(check, records(reading(1, "a"), reading(1, "b"), reading(1, "c", id="x"), reading(1, "a")))


@pytest.mark.parametrize(
    ("identify_by", "keyed"), [("id", [0, 0, 2, 3, 3]), (PAYLOAD, [0, 1, 2, 3, 3])]
)
def test_with_a_key_copies_share_an_identity_and_nothing_made_does(identify_by, keyed, monkeypatch):
    payloads = [
        reading(1, "a", id="x-1"),
        reading(1, "a", id="x-1", extra=1),
        reading(1, "a", id=twin_of("x-1")),
        reading(3, "a"),
        reading(3, "a"),
    ]
    seen = []

    def check(parsed):
        def first_alike(pair):
            identities = pair[1]["identity"].to_pylist()
            return [identities.index(identity) for identity in identities]

        assert_that(parsed.rows | beam.FlatMap(first_alike), equal_to(keyed))

    for secret in ("one key of many bytes", "another of as many"):
        monkeypatch.setenv("HASH_KEY", secret)
        key = HashKey.look_up("env:HASH_KEY")
        run(check, records(*payloads), identify_by=identify_by, hash_key=key)
        stage = _ParseFn(DECODER, identify_by, key)
        stage.setup()
        _, batch = records(*payloads)
        seen.append(stage._identity(DECODER(batch["payload"], "t").rows, batch, None).tolist())
    assert not {*seen[0]} & {*seen[1]}


def test_an_identity_by_no_column_is_refused():
    with pytest.raises(ValueError, match="can't identify rows by 'uuid'"):
        Parse(DECODER, "uuid")


def test_each_verdict_goes_its_way():
    rule = TimeRule(out_of_orderness_s=120, allowed_lateness_s=60, future_tolerance_s=300)
    late = [reading(880, "edge"), reading(879, "late"), reading(819, "gone")]
    pair = records(*late, reading(1301, "early"), reading(1000, "now"), append_s=1000)

    def check(timed):
        classified = timed.classified | beam.FlatMap(
            lambda pair: zip(
                pair[1]["sensor"].to_pylist(), pair[1]["verdict"].to_pylist(), strict=True
            )
        )
        verdicts = [
            ("edge", "on_time"), ("late", "late"), ("gone", "too_late"), ("now", "on_time"),
        ]  # fmt: skip
        assert_that(classified, equal_to(verdicts), label="classified")
        usable = timed.usable | "U" >> beam.FlatMap(column("sensor"))
        assert_that(usable, equal_to(["edge", "late", "now"]), label="usable")
        for output, expected in (
            (timed.too_late, (late[2], 2, "lateness", "too_late", 61.0)),
            (timed.future, (reading(1301, "early"), 3, "lateness", "future", -301.0)),
        ):
            letters = output | f"{expected[3]} rows" >> beam.FlatMap(
                lambda batch: [
                    (r["payload"], r["offset"], r["stage"], r["reason"], r["seconds_late"])
                    for r in batch.to_pylist()
                ]
            )
            assert_that(letters, equal_to([expected]), label=expected[3])
        messages = timed.too_late | beam.FlatMap(column("message"))
        assert_that(
            messages,
            equal_to(["event_time is 61.000 s behind the watermark; 60 s are allowed"]),
            label="message",
        )

    run(check, pair, rule=rule)


def test_a_span_goes_on_to_the_lake_when_all_its_rows_are_from_the_future():
    def check(timed):
        covered = timed.classified | beam.Map(lambda pair: (pair[0].end, len(pair[1])))
        assert_that(covered, equal_to([(1, 0)]), label="covered")
        assert_that(timed.usable, equal_to([]), label="usable")

    run(check, records(reading(10_000), append_s=1), rule=TimeRule())


@pytest.mark.parametrize("identify_by", ["id", PAYLOAD, COORDINATES])
def test_what_comes_of_a_batch_is_the_same_however_many_are_decoded_with_it(identify_by):
    """Batches of many partitions in one bundle, against each by itself."""
    random = Random(7)
    pairs = []
    for number in range(60):
        rows = random.choice([0, 1, 2, 30, 400])
        payloads = [
            random.choice([reading(i, f"s{number}", id=f"{i}"), reading(i), b"{]", b"", None])
            for i in range(rows)
        ]
        span, batch = records(*payloads, start=100 * number)
        topic = "other" if number > 40 else "topic"
        pairs.append((span._replace(topic=topic, partition=number % 7), batch))
    assert sum(len(batch) for _, batch in pairs) > DECODED_ROWS / 2

    alone = []
    for span, batch in pairs:
        rows = zip(batch["payload"].to_pylist(), batch["offset"].to_pylist(), strict=True)
        alone.append((span, [offset for payload, offset in rows if is_valid(payload)]))

    def check(parsed):
        kept = parsed.rows | beam.Map(lambda pair: (pair[0], pair[1]["offset"].to_pylist()))
        assert_that(kept, equal_to(alone), label="rows")
        letters = parsed.dead_letters | beam.FlatMap(
            lambda batch: [(r["topic"], r["partition"], r["offset"]) for r in batch.to_pylist()]
        )
        rejected = [
            (span.topic, span.partition, offset)
            for (span, batch), (_, kept) in zip(pairs, alone, strict=True)
            for offset in batch["offset"].to_pylist()
            if offset not in kept
        ]
        assert_that(letters, equal_to(rejected), label="letters")
        identities = parsed.rows | beam.FlatMap(
            lambda pair: [(pair[0], i) for i in pair[1]["identity"].to_pylist()]
        )
        assert_that(identities, equal_to(one_by_one), label="identities")

    one_by_one = [
        (span, identity)
        for span, batch in pairs
        for identity in decoded_alone(span, batch, identify_by)
    ]
    run(check, *pairs, identify_by=identify_by)


def test_payloads_are_decoded_together_up_to_so_many_bytes(monkeypatch):
    monkeypatch.setattr(parse, "DECODED_BYTES", 6_400)
    together = []

    class WatchedDecoder(NdjsonDecoder):
        def __call__(self, payloads, topic):
            together.append([len(payload) for payload in payloads.to_pylist()])
            return super().__call__(payloads, topic)

    stage = _ParseFn(WatchedDecoder(READINGS), "id")
    stage.setup()
    stage.start_bundle()
    sizes = [2_000, 2_000, 2_000, 2_000, 9_000, 10, 6_000]
    everything = records(*(b"x" * size for size in sizes))[1]
    outputs = []
    for i, size in enumerate(sizes):
        own, slice_of_all = records(b"x" * size, start=i, last=False)[1], everything.slice(i, 1)
        span = Span("topic", 0, 0, 1000, i, i + 1, False)
        outputs += stage.process((span, slice_of_all if i % 2 else own), Timestamp(0))
    outputs += stage.finish_bundle()
    assert together == [[2_000, 2_000, 2_000], [2_000], [9_000], [10, 6_000]]
    letters = [output.value for output in outputs if isinstance(output, TaggedOutput)]
    assert [len(letter.value["payload"][0].as_py()) for letter in letters] == sizes
    spans = [output.value[0] for output in outputs if not isinstance(output, TaggedOutput)]
    assert [span.start for span in spans] == list(range(len(sizes)))


def is_valid(payload):
    try:
        read_one(payload, DECODER._fields)
    except RejectedError:
        return False
    return True


def decoded_alone(span, batch, identify_by):
    """The identities of a batch's rows, by the stage's function without a bundle around it."""
    stage = _ParseFn(DECODER, identify_by)
    stage.setup()
    decoded = DECODER(batch["payload"], span.topic)
    kept = batch.filter(pa.array(decoded.valid))
    return stage._identity(decoded.rows, kept, span).tolist()


def test_batches_that_were_windowed_are_refused():
    pipeline = beam.Pipeline()
    payloads = pipeline | beam.Create([]).with_output_types(spanned(BatchOf(PAYLOADS)))
    with pytest.raises(ValueError, match="Parse takes batches in the global window"):
        payloads | beam.WindowInto(FixedWindows(60)) | Parse(DECODER)
