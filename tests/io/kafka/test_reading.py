from dataclasses import replace

import numpy as np
import pytest
from confluent_kafka import KafkaException

from beam_pipelines.io.kafka import reading
from beam_pipelines.io.kafka.client import KafkaCluster, KafkaUnreachable
from beam_pipelines.io.kafka.fetch import SourceError
from beam_pipelines.io.kafka.positions import Position, Positions, PositionsCoder
from beam_pipelines.io.kafka.reading import (
    METADATA_PERIOD_S,
    UNSEEN_S,
    OpenReadings,
    Reading,
    Subscription,
)
from beam_pipelines.model.watermark import CLOCK_SKEW_US
from tests.io.kafka.broker import (
    DISORDER,
    DISORDER_S,
    NOON,
    NOON_S,
    P0,
    P1,
    P2,
    RANGE,
    FakeFetcher,
    S,
    plain,
    records,
    span,
)


def reading_of(broker, reader="0/1/0", **settings):
    subscription = Subscription(
        **{
            "cluster": KafkaCluster("b:9092"),
            "topics": ("views",),
            "out_of_orderness_s": DISORDER_S,
            "start": "earliest",
            "until_end": False,
            "append_time": "broker",
            "group": None,
            "settings": "",
        }
        | settings
    )
    return Reading(
        subscription, reader, lambda cluster, group: FakeFetcher(broker), broker.worker_s
    )


def many(first, end, time_s=0):
    return records(first, *[time_s] * (end - first))


def nothing(next_):
    return records(next_, next_=next_)


def at(partition=P0, began=0, next_=0, stop=None, watermark=None):
    position = Position(began, next_, stop, watermark)
    return Positions({partition: position}, {"views": "id-1"}, begun=True)


# Batches and their spans


def test_a_batch_is_stamped_with_the_least_time_that_its_events_may_have(broker):
    read = reading_of(broker)
    positions, elements = read.taken(at(), {P0: records(0, 7, 5, 9)})
    assert plain(elements) == [(span(0, 3), [0, 1, 2], [7, 7, 9], 7 - DISORDER_S)]
    assert positions == at(next_=3, watermark=NOON + 9 * S - DISORDER)


def test_batches_end_at_the_borders_of_ranges(broker):
    read = reading_of(broker)
    positions, elements = read.taken(at(next_=RANGE - 2), {P0: many(RANGE - 2, RANGE + 1)})
    assert plain(elements) == [
        (span(RANGE - 2, RANGE, last=True), [RANGE - 2, RANGE - 1], [0, 0], -DISORDER_S),
        (
            span(RANGE, RANGE + 1, range_start=RANGE, range_end=2 * RANGE),
            [RANGE],
            [0],
            -DISORDER_S,
        ),
    ]
    assert positions.partitions[P0].next == RANGE + 1


def test_a_batch_has_a_limit_of_rows(broker, monkeypatch):
    monkeypatch.setattr(reading, "BATCH_ROWS", 2)
    _, elements = reading_of(broker).taken(at(), {P0: records(0, 1, 2, 3, 4, 5)})
    assert [(each[0], each[1]) for each in plain(elements)] == [
        (span(0, 2), [0, 1]),
        (span(2, 4), [2, 3]),
        (span(4, 5), [4]),
    ]


def test_spans_leave_no_gap_where_offsets_have_gaps(broker):
    # What a transaction or compaction leaves behind: a border may lie in a gap.
    offsets = [3, 7, RANGE + 4]
    read = reading_of(broker)
    _, elements = read.taken(at(), {P0: records(0, 1, 2, 3, offsets=offsets, next_=RANGE + 9)})
    assert [(each[0], each[1]) for each in plain(elements)] == [
        (span(0, RANGE, last=True), [3, 7]),
        (span(RANGE, RANGE + 9, range_start=RANGE, range_end=2 * RANGE), [RANGE + 4]),
    ]


def test_a_span_is_there_where_an_end_passes_offsets_without_records(broker):
    positions, elements = reading_of(broker).taken(at(next_=5), {P0: nothing(9)})
    assert plain(elements) == [(span(5, 9), [], [], None)]
    assert positions == at(next_=9)


def test_an_end_that_is_where_we_are_changes_nothing(broker):
    positions, elements = reading_of(broker).taken(at(next_=5), {P0: nothing(5)})
    assert elements == []
    assert positions == at(next_=5)


def test_the_first_range_begins_where_reading_did(broker):
    _, elements = reading_of(broker).taken(at(began=40, next_=40), {P0: records(40, 1)})
    assert plain(elements) == [(span(40, 41, range_start=40), [40], [1], 1 - DISORDER_S)]


def test_what_lies_beyond_the_end_is_left_out(broker):
    positions, elements = reading_of(broker, until_end=True).taken(
        at(stop=2), {P0: records(0, 1, 2, 3)}
    )
    ended = span(0, 2, last=True)._replace(open=True)  # what is appended later belongs there
    assert plain(elements) == [(ended, [0, 1], [1, 2], 1 - DISORDER_S)]
    assert positions == at(next_=2, stop=2, watermark=NOON + 2 * S - DISORDER)
    assert positions.done


def test_partitions_keep_their_own_times(broker):
    before = at().moved({P1: Position(0, 0)})
    positions, elements = reading_of(broker).taken(before, {P0: records(0, 50), P1: records(0, 10)})
    assert [(each[0].partition, each[3]) for each in plain(elements)] == [
        (0, 50 - DISORDER_S),
        (1, 10 - DISORDER_S),
    ]
    assert positions.watermark_us() == NOON + 10 * S - DISORDER


# Append times


@pytest.mark.parametrize("append_time", ["broker", "producer"])
def test_a_clock_that_steps_back_does_not_set_a_record_behind_the_watermark(broker, append_time):
    read = reading_of(broker, append_time=append_time)
    broker.go(2000)
    before, first = read.taken(at(), {P0: records(0, 1000, 400, 1001)})
    assert plain(first) == [(span(0, 3), [0, 1, 2], [1000, 1000, 1001], 1000 - DISORDER_S)]
    restored = reading_of(broker, append_time=append_time)  # knows what is in the position
    _, then = restored.taken(before, {P0: records(3, 402, 1002)})
    assert plain(then) == [(span(3, 5), [3, 4], [1001, 1002], 1001 - DISORDER_S)]


def test_what_the_clock_let_pass_is_judged_by_the_clock(broker):
    # The broker's clock fell 20 s behind while the partition was idle.
    read = reading_of(broker)
    broker.ends[P0] = 1
    followed = read.idle(at(next_=1, watermark=NOON - DISORDER - 60 * S), {})
    assert followed.watermark_us() == NOON - CLOCK_SKEW_US - DISORDER
    _, elements = read.taken(followed, {P0: records(1, -20, 0)})
    assert plain(elements) == [(span(1, 3), [1, 2], [-5, 0], -5 - DISORDER_S)]


@pytest.mark.parametrize(
    ("time_ms", "append_s"),
    [
        (NOON_S * 10**9, 0),  # in ns
        (NOON_S * 10**6, 0),
        (2**63 - 1, 0),
        (-1, -NOON_S),  # the record has no time
        (-(2**62), -NOON_S),
    ],
)
def test_a_producers_time_in_another_unit_is_kept_within_the_clock(broker, time_ms, append_s):
    read = reading_of(broker, append_time="producer")
    wild = replace(records(0, 0), times_ms=np.array([time_ms]))
    positions, elements = read.taken(at(), {P0: wild})
    assert plain(elements) == [(span(0, 1), [0], [append_s], append_s - DISORDER_S)]
    _, then = read.taken(positions, {P0: records(1, -7)})  # the next one is not harmed
    assert plain(then)[0][2] == [max(append_s, -7)]


def test_times_of_producers_never_fall_nor_pass_the_clock(broker):
    read = reading_of(broker, append_time="producer")
    before = at(watermark=NOON - 100 * S - DISORDER)
    positions, elements = read.taken(
        before, {P0: records(0, -200, -50, -70, 9999, log_append_time=False)}
    )
    assert plain(elements) == [(span(0, 4), [0, 1, 2, 3], [-100, -50, -50, 0], -100 - DISORDER_S)]
    assert positions.watermark_us() == NOON - DISORDER


def test_input_that_is_complete_has_no_times_and_no_watermark(broker):
    read = reading_of(broker, append_time="none", until_end=True)
    positions, elements = read.taken(at(stop=2), {P0: records(0, 1, 2, log_append_time=False)})
    ended = span(0, 2, last=True)._replace(open=True)
    assert plain(elements) == [(ended, [0, 1], [None, None], None)]
    assert positions.watermark_us() is None


def test_records_without_the_brokers_time_are_refused(broker):
    with pytest.raises(SourceError) as raised:
        reading_of(broker).taken(at(), {P0: records(0, 1, log_append_time=False)})
    assert "--entity-name views --add-config message.timestamp.type=LogAppendTime" in str(
        raised.value
    )
    assert "--append_time=producer" in str(raised.value)


# Watermarks of idle partitions


def test_an_idle_partition_that_is_caught_up_follows_the_clock(broker):
    broker.ends[P0] = 7
    before = at(next_=7, watermark=NOON - 1000 * S)
    assert reading_of(broker).idle(before, {}) == at(
        next_=7, watermark=NOON - CLOCK_SKEW_US - DISORDER
    )


def test_a_backlog_holds_the_watermark(broker):
    broker.ends[P0] = 8
    before = at(next_=7, watermark=NOON - 1000 * S)
    assert reading_of(broker).idle(before, {}) == before


def test_no_answer_holds_the_watermark(broker):
    broker.ends[P0], broker.reachable = 7, False
    before = at(next_=7, watermark=NOON - 1000 * S)
    assert reading_of(broker).idle(before, {}) == before


def test_a_partition_of_which_records_came_is_not_idle(broker):
    broker.ends = {P0: 7, P1: 3}
    before = at(next_=7, watermark=5).moved({P1: Position(0, 3, None, 5)})
    after = reading_of(broker).idle(before, {P0: records(6, 1)})
    assert after == before.moved({P1: Position(0, 3, None, NOON - CLOCK_SKEW_US - DISORDER)})


def test_a_partition_that_only_told_its_end_is_idle(broker):
    broker.ends[P0] = 7
    after = reading_of(broker).idle(at(next_=7), {P0: nothing(7)})
    assert after.watermark_us() == NOON - CLOCK_SKEW_US - DISORDER


def test_a_watermark_that_followed_the_clock_does_not_go_back_for_a_record(broker):
    read = reading_of(broker)
    idle = read.idle(at(), {})
    after, _ = read.taken(idle, {P0: records(0, -60)})
    assert after.watermark_us() == idle.watermark_us() == NOON - CLOCK_SKEW_US - DISORDER


def test_ends_are_asked_for_twice_a_second_at_most(broker):
    read = reading_of(broker)
    first = read.idle(at(), {})
    broker.go(0.4)
    assert read.idle(first, {}) == first
    broker.go(0.1)
    assert read.idle(first, {}).watermark_us() == first.watermark_us() + S // 2


@pytest.mark.parametrize("ahead_s", [600.0, 3600.0])
def test_a_workers_clock_that_is_ahead_is_not_taken_for_the_brokers(ahead_s, broker):
    broker.worker_ahead_s = ahead_s
    broker.ends = {P0: 1, P1: 0}
    read = reading_of(broker)
    both = read.looked_up(Positions())
    after, _ = read.taken(both, {P0: records(0, -2)})  # seen 2 s after it was stored
    for _ in range(2):
        broker.go(30)
        after = read.idle(after, {})
    assert after.watermark_us() == NOON + 58 * S - CLOCK_SKEW_US - DISORDER


def test_a_workers_clock_that_is_behind_holds_the_watermark_back(broker):
    broker.worker_ahead_s = -50.0
    followed = reading_of(broker).idle(at(), {})
    assert followed.watermark_us() == NOON - 50 * S - CLOCK_SKEW_US - DISORDER


def test_the_newest_record_of_the_topics_tells_how_late_it_is_for_the_brokers(broker):
    # Of another reader's partition: this one's have no records.
    broker.worker_ahead_s = 600.0
    broker.newest_us = NOON - 3 * S
    read = reading_of(broker)
    positions = read.looked_up(Positions())
    assert read.idle(positions, {}).watermark_us() == NOON - 3 * S - CLOCK_SKEW_US - DISORDER
    assert [P0, P1] in broker.asked
    broker.asked.clear()
    broker.go(4)
    read.idle(positions, {})
    assert broker.asked == []  # asked for every 5 s, while it is unsure
    broker.newest_us = NOON + 5 * S
    broker.go(1)
    assert read.idle(positions, {}).watermark_us() == NOON + 5 * S - CLOCK_SKEW_US - DISORDER


@pytest.mark.parametrize(
    ("newest_us", "known_us"), [(None, NOON - 9000 * S), (NOON - 7200 * S, NOON - 7325 * S)]
)
def test_an_idle_topic_holds_the_watermark_for_ten_minutes_at_most(newest_us, known_us, broker):
    broker.newest_us = newest_us
    read = reading_of(broker)
    followed = read.idle(at(watermark=NOON - 9000 * S), {})
    assert followed.watermark_us() == known_us
    broker.go(600)
    followed = read.idle(followed, {})
    assert followed.watermark_us() == NOON - CLOCK_SKEW_US - DISORDER
    broker.newest_us = NOON + 599 * S  # there it is: from now on it tells
    broker.go(5)
    followed = read.idle(followed, {})
    assert followed.watermark_us() == NOON + 599 * S - CLOCK_SKEW_US - DISORDER


def test_a_reader_without_partitions_follows_the_clock(broker):
    read = reading_of(broker, "1/2/0")
    broker.topics["views"] = ("id-1", 0, "LogAppendTime")
    empty = read.looked_up(Positions())
    assert empty == Positions({}, {"views": "id-1"}, begun=True)
    read.idle(empty, {})
    assert read.watermark_us(empty) == NOON - CLOCK_SKEW_US - DISORDER
    assert read.watermark_us(Positions()) is None
    assert read.fetched(empty, 1.5) == {}
    assert broker.now_s == NOON_S + 1.5  # it waited, as a poll would


# Topics


def test_reading_begins_at_the_beginning(broker):
    broker.begins, broker.ends = {P0: 5, P1: 0}, {P0: 9, P1: 4}
    assert reading_of(broker).looked_up(Positions()) == Positions(
        {P0: Position(5, 5), P1: Position(0, 0)}, {"views": "id-1"}, begun=True
    )


def test_reading_can_begin_at_a_time(broker):
    broker.ends = {P0: 9, P1: 4}
    broker.at_time = {P0: 7, P1: -1}  # -1: nothing was appended since
    start_us = NOON + 1
    positions = reading_of(broker, start=start_us).looked_up(Positions())
    assert positions.partitions == {P0: Position(7, 7), P1: Position(4, 4)}
    # Rounded up to the ms that Kafka knows: the first record appended then or later.
    assert NOON // 1000 + 1 in broker.asked


def test_reading_to_the_end_stops_at_the_ends_of_the_start(broker):
    broker.begins, broker.ends = {P0: 5}, {P0: 9, P1: 0}
    read = reading_of(broker, until_end=True)
    positions = read.looked_up(Positions())
    assert positions.partitions == {P0: Position(5, 5, stop=9), P1: Position(0, 0, stop=0)}
    broker.topics["views"] = ("id-1", 3, "LogAppendTime")
    broker.ends |= {P0: 20, P2: 5}
    broker.go(METADATA_PERIOD_S)
    assert read.looked_up(positions) == positions


def test_a_new_partition_is_read_from_its_beginning(broker):
    read = reading_of(broker, start=NOON)
    broker.ends = {P0: 9, P1: 4}
    positions = read.looked_up(Positions())
    broker.topics["views"] = ("id-1", 3, "LogAppendTime")
    broker.begins, broker.ends = {P2: 2}, {P2: 8}
    broker.go(METADATA_PERIOD_S - 1)
    assert read.looked_up(positions) == positions
    broker.go(1)
    after = read.looked_up(positions)
    assert after == positions.moved({P2: Position(2, 2)})
    assert after.watermark_us() is None  # held until something is known of it


def test_a_new_partitions_records_are_judged_by_the_watermark_less_what_windows_are_kept(broker):
    read = reading_of(broker)
    positions = read.looked_up(Positions())
    broker.topics["views"] = ("id-1", 3, "LogAppendTime")
    broker.go(METADATA_PERIOD_S)
    found = read.looked_up(positions, NOON - DISORDER)
    assert found.partitions[P2] == Position(0, 0, None, NOON - DISORDER - 60 * S)
    _, elements = read.taken(found, {P2: records(0, -3600, -59)})
    assert plain(elements)[0][1:] == ([0, 1], [-60, -59], -60 - DISORDER_S)


def test_a_new_partition_without_a_leader_is_waited_for(broker, caplog):
    read = reading_of(broker)
    positions = read.looked_up(Positions())
    broker.topics["views"] = ("id-1", 3, "LogAppendTime")
    broker.go(METADATA_PERIOD_S)
    broker.leaderless = {P2}
    for _ in range(20):  # ten minutes, in which the others go on
        assert read.looked_up(positions) == positions
        assert read.watermark_us(read.idle(positions, {})) is None
        broker.go(30)
    assert "new partitions can't be read as yet, and the watermark waits" in caplog.text
    broker.leaderless = set()
    found = read.looked_up(positions)
    assert found == positions.moved({P2: Position(0, 0)})
    assert read.watermark_us(read.idle(found, {})) == NOON + 595 * S - DISORDER


def test_a_reader_that_starts_again_waits_for_a_partition_without_a_leader(broker):
    begun = at(watermark=NOON)
    broker.topics["views"] = ("id-1", 2, "LogAppendTime")
    broker.leaderless = {P1}
    read = reading_of(broker)
    assert read.looked_up(begun) == begun
    assert read.watermark_us(begun) is None


def test_a_partition_without_a_leader_at_the_start_is_an_error(broker):
    broker.leaderless = {P1}
    with pytest.raises(KafkaException):
        reading_of(broker).looked_up(Positions())


def test_positions_that_were_restored_go_on(broker):
    broker.ends = {P0: 900, P1: 900}
    restored = at(next_=70, watermark=5).moved({P1: Position(3, 80, None, 6)})
    assert reading_of(broker, start=NOON).looked_up(restored) == restored


def test_state_that_was_made_with_other_settings_is_refused(broker):
    begun = reading_of(broker, settings="--shards=4").looked_up(Positions())
    assert begun.settings == "--shards=4"
    assert reading_of(broker, settings="--shards=4").looked_up(begun) == begun
    with pytest.raises(SourceError) as raised:
        reading_of(broker, settings="--shards=8").looked_up(begun)
    assert str(raised.value) == (
        "the state that this job goes on from was made with --shards=4; with --shards=8 it would "
        "be taken for something else. Start it with the flags it was made with, or start a new "
        "job, not from a savepoint"
    )


def test_each_partition_belongs_to_one_reader(broker):
    broker.topics = {name: ("id", 8, "LogAppendTime") for name in ("a", "b", "c")}
    found = [
        set(
            reading_of(broker, f"{i}/4/0", topics=("a", "b", "c")).looked_up(Positions()).partitions
        )
        for i in range(4)
    ]
    assert set.union(*found) == {(topic, n) for topic in "abc" for n in range(8)}
    assert [len(each) for each in found] == [6, 6, 6, 6]


def test_a_topic_that_was_made_anew_is_refused(broker):
    broker.topics["views"] = ("id-2", 2, "LogAppendTime")
    with pytest.raises(SourceError) as raised:
        reading_of(broker).looked_up(at(next_=70))
    assert str(raised.value) == (
        "topic views was deleted and made anew (its id was id-1, is id-2): its offsets mean "
        "other records now. Start a new job, not from a savepoint"
    )


def test_a_topic_that_is_made_anew_while_it_is_read_is_refused(broker):
    read = reading_of(broker)
    positions = read.looked_up(Positions())
    broker.topics["views"] = ("id-2", 2, "LogAppendTime")
    broker.go(METADATA_PERIOD_S)
    with pytest.raises(SourceError, match="made anew"):
        read.looked_up(positions)


def test_a_topic_without_the_brokers_time_is_refused_before_it_is_read(broker):
    broker.topics["views"] = ("id-1", 2, "CreateTime")
    with pytest.raises(SourceError, match="--append_time=producer"):
        reading_of(broker).looked_up(Positions())
    for append_time in ("producer", "none"):
        read = reading_of(broker, append_time=append_time, until_end=True)
        assert read.looked_up(Positions()).begun


def test_no_broker_at_the_start_is_an_error_and_later_it_is_waited_for(broker, caplog):
    broker.reachable = False
    read = reading_of(broker)
    with pytest.raises(KafkaUnreachable):
        read.looked_up(Positions())
    broker.reachable = True
    positions = read.looked_up(Positions())
    broker.reachable = False
    broker.go(METADATA_PERIOD_S)
    assert read.looked_up(positions) == positions
    assert "the topics could not be looked at: no Kafka broker answers" in caplog.text
    broker.reachable = True
    looks = broker.looks
    read.looked_up(positions)  # tried again at once
    assert broker.looks == looks + 1


def test_the_watermark_waits_for_a_look_at_the_topics(broker):
    read = reading_of(broker)
    positions = read.idle(read.looked_up(Positions()), {})
    moved, _ = read.taken(positions, {P0: records(0, 1), P1: records(0, 2)})
    broker.reachable = False
    broker.go(UNSEEN_S)
    assert read.watermark_us(read.looked_up(moved)) == NOON + 1 * S - DISORDER
    broker.go(1)
    assert read.watermark_us(read.looked_up(moved)) is None  # though records come
    broker.reachable = True
    assert read.watermark_us(read.looked_up(moved)) == NOON + 1 * S - DISORDER


def test_a_topic_that_is_no_longer_asked_for_is_refused(broker):
    broker.topics["clicks"] = ("id-2", 1, "LogAppendTime")
    begun = reading_of(broker, topics=("views", "clicks")).looked_up(Positions())
    with pytest.raises(SourceError) as raised:
        reading_of(broker).looked_up(begun)
    assert str(raised.value) == (
        "--input names views; the state that this job goes on from has also read clicks, whose "
        "next records nobody would read. Name all of them, or start a new job, not from a "
        "savepoint"
    )


def test_a_topic_that_is_asked_for_as_well_is_read_from_its_beginning(broker):
    begun = reading_of(broker).looked_up(Positions())
    broker.topics["clicks"] = ("id-2", 1, "LogAppendTime")
    after = reading_of(broker, topics=("views", "clicks")).looked_up(begun, NOON)
    assert after.partitions[("clicks", 0)] == Position(0, 0, None, NOON - 60 * S)


# Fetching and committing


def test_what_is_done_is_not_fetched(broker):
    read = reading_of(broker)
    positions = at(next_=9, stop=9).moved({P1: Position(0, 3, stop=8)})
    read.fetcher.coming = {P1: records(3, 1)}
    assert set(read.fetched(positions, 1.0)) == {P1}
    assert read.fetcher.assigned == {P1: 3}


def test_the_leader_of_the_last_record_is_kept_and_asked_for(broker):
    read = reading_of(broker)
    positions, _ = read.taken(at(), {P0: records(0, 1, leader_epoch=4)})
    positions, _ = read.taken(positions, {P0: nothing(1)})
    coder = PositionsCoder()
    restored = coder.decode(coder.encode(positions))
    again = reading_of(broker)
    again.fetched(restored, 1.0)
    assert (again.fetcher.assigned, again.fetcher.epochs) == ({P0: 1}, {P0: 4})


def test_offsets_are_committed_to_a_group_now_and_then(broker):
    read = reading_of(broker, group="lag")
    read.commit(at(next_=3))
    read.commit(at(next_=4))
    broker.go(6)
    read.commit(at(next_=5))
    assert read.fetcher.committed == [{P0: 3}, {P0: 5}]


def test_without_a_group_nothing_is_committed(broker):
    read = reading_of(broker)
    read.commit(at(next_=3))
    assert read.fetcher.committed == []


# Readings between two calls


def test_an_open_reading_is_handed_out_once(broker):
    kept, read = OpenReadings(), reading_of(broker)
    kept.leave("a", read)
    assert kept.take("a") is read
    assert kept.take("a") is None
    assert not read.fetcher.closed


def test_a_reading_that_is_replaced_or_not_asked_for_is_closed(broker):
    kept = OpenReadings()
    replaced, unused, used = (reading_of(broker) for _ in range(3))
    kept.leave("a", replaced)
    kept.leave("a", unused)
    assert (replaced.fetcher.closed, unused.fetcher.closed) == (True, False)
    broker.go(61)
    kept.leave("b", used)
    assert (unused.fetcher.closed, used.fetcher.closed) == (True, False)
    assert kept.take("a") is None
