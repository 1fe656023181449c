"""Whatever clocks, leaders and readers do, verdicts agree with the watermark."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from beam_pipelines.kernels.columns import timestamps
from beam_pipelines.kernels.lateness import judge
from beam_pipelines.model.records import LATE
from beam_pipelines.model.time_rule import SLACK_S, TimeRule
from tests.io.kafka.broker import DISORDER_S, NOON, S
from tests.io.kafka.history import PARTITIONS, Topic, job_on

RULE = TimeRule(out_of_orderness_s=DISORDER_S)
LATENESS = RULE.allowed_lateness_s * S


def do(topic, job, round_):
    """Let something happen, producers write and time pass; returns what the reader then yields."""
    (what, *of), numbers, seconds = round_
    if what == "leader steps":
        number, ahead_s = of
        topic.ahead_s["views", number] = ahead_s
    elif what == "worker steps":
        (topic.worker_ahead_s,) = of
    elif what == "partitions":
        (count,) = of
        topic.topics["views"] = ("id-1", max(count, topic.topics["views"][1]), "LogAppendTime")
    elif what == "leader":
        number, there = of
        (topic.leaderless.discard if there else topic.leaderless.add)(("views", number))
    elif what == "reachable":
        (topic.reachable,) = of
    elif what == "start again":
        job.start_again(*of)
    for number in numbers:
        if ("views", number) in topic.partitions():
            topic.append(("views", number))
    topic.go(seconds)
    return job.call()


NUMBERS = st.integers(0, PARTITIONS - 1)
NOTHING = ("nothing",)
TROUBLE = [
    st.just(NOTHING),
    st.just(NOTHING),
    st.tuples(st.just("partitions"), st.integers(2, PARTITIONS)),
    st.tuples(st.just("leader"), NUMBERS, st.booleans()),
    st.tuples(st.just("reachable"), st.sampled_from([True, True, False])),
    st.tuples(st.just("start again"), st.integers(1, 3)),
]
STEPPING = [
    st.tuples(st.just("leader steps"), NUMBERS, st.integers(-2000, 2000)),
    st.tuples(st.just("worker steps"), st.integers(-4000, 4000)),
]


def rounds(happenings):
    """Return histories: (what happens, partitions written to, seconds until they are read)."""
    seconds = st.sampled_from([1, 1, 5, 31, 60, 200, 700])
    written = st.lists(NUMBERS, max_size=5)
    return st.lists(st.tuples(st.one_of(happenings), written, seconds), min_size=3, max_size=30)


NEW_LEADER_BEHIND = [
    (NOTHING, [0, 1], 1),
    (("leader steps", 0, -600), [0, 1], 1),
    (NOTHING, [0, 1], 1),
]
IDLE_PARTITION = [(NOTHING, [0, 1], 30), (NOTHING, [], 1), (NOTHING, [0], 1), (NOTHING, [1], 1)]
UNLISTED_FOR_MINUTES = [
    (NOTHING, [0, 1], 1),
    (("leader", 2, False), [], 1),
    (("partitions", 3), [2], 200),
    (NOTHING, [0, 1], 200),
    (("leader", 2, True), [0], 30),
]
UNSEEN_FOR_MINUTES = [
    (NOTHING, [0, 1], 1),
    (("reachable", False), [], 1),
    (("partitions", 3), [2], 200),
    (NOTHING, [0, 1], 1),
    (("reachable", True), [0], 30),
]
NEW_PARTITION_BEHIND = [
    (("leader steps", 2, -600), [0, 1], 1),
    (("partitions", 3), [2], 31),
    (NOTHING, [2], 1),
]


@given(rounds(TROUBLE + STEPPING), st.sampled_from(["broker", "producer"]))
@settings(max_examples=300, derandomize=True)
@example(NEW_LEADER_BEHIND, "broker")
@example(NEW_PARTITION_BEHIND, "broker")
@example([(("worker steps", 3600), [], 1), *IDLE_PARTITION], "broker")
def test_a_row_that_counts_is_never_further_behind_the_watermark_than_is_allowed(
    history, append_time
):
    topic = Topic()
    with job_on(topic, append_time) as job:
        for round_ in history:
            for (_, number), watermark, judged_us in do(topic, job, round_):
                oldest_us = judged_us - DISORDER_S * S - LATENESS  # events that count just so
                judged = judge(timestamps(oldest_us), timestamps(judged_us), RULE)
                assert set(judged.verdicts) == {LATE}
                kept_us = LATENESS if number < 2 else LATENESS + SLACK_S * S  # of new partitions
                if watermark is not None:
                    assert watermark.micros - oldest_us.min() <= kept_us
        # In the end all of it has been read, once.
        topic.leaderless, topic.reachable = set(), True
        topic.go(30)
        for _ in range(2):
            job.call()
        for partition in topic.partitions():
            offsets = [offset for offset, _ in job.read[partition]]
            assert offsets == [*range(len(topic.stored[partition]))]


@given(
    rounds(TROUBLE),
    st.lists(st.integers(0, 4), min_size=PARTITIONS, max_size=PARTITIONS),
    st.integers(-4000, 600),
)
@settings(max_examples=300, derandomize=True)
@example(IDLE_PARTITION, [0, 0, 0, 0], 600)
@example(UNLISTED_FOR_MINUTES, [0, 0, 0, 0], 0)
@example(UNSEEN_FOR_MINUTES, [0, 0, 0, 0], 0)
def test_while_the_brokers_clocks_agree_each_row_is_judged_by_its_own_append_time(
    history, leaders_ahead_s, worker_ahead_s
):
    topic = Topic()
    topic.ahead_s = dict(zip(topic.stored, leaders_ahead_s, strict=True))
    topic.worker_ahead_s = worker_ahead_s
    with job_on(topic) as job:
        for round_ in history:
            do(topic, job, round_)
        for partition, rows in job.read.items():
            stored = [ms * 1000 for ms, _ in topic.stored[partition]]
            assert [us for _, us in rows] == stored[: len(rows)]


def test_a_topic_that_is_read_on_moves_the_watermark_with_it():
    # What waits must not wait for ever: the properties above hold for a reader that stands still.
    topic = Topic()
    with job_on(topic) as job:
        for _ in range(20):
            topic.append(("views", 0))
            topic.go(30)
            job.call()
        assert job.reader.watermark.micros >= NOON + (570 - 5 - DISORDER_S) * S
