from beam_pipelines.model.watermark import (
    CLOCK_SKEW_US,
    SILENCE_US,
    BrokersClock,
    PartitionWatermark,
)

S = 1_000_000
DISORDER = 120 * S


def test_nothing_is_known_at_first():
    assert PartitionWatermark(DISORDER).now() is None


def test_it_follows_append_times_less_the_out_of_orderness():
    watermark = PartitionWatermark(DISORDER)
    watermark.appended(1000 * S)
    assert watermark.now() == 880 * S


def test_it_never_goes_back():
    watermark = PartitionWatermark(DISORDER)
    watermark.asked_for_end(2000 * S, end_offset=7, position=7)
    followed_the_clock = 2000 * S - CLOCK_SKEW_US - DISORDER
    assert watermark.now() == followed_the_clock
    watermark.appended(1990 * S)  # stored before we asked, by a clock behind ours
    assert watermark.now() == followed_the_clock


def test_an_event_from_the_far_future_moves_nothing():
    # Only append times are taken in: there is no way to hand it an event time.
    watermark = PartitionWatermark(DISORDER)
    watermark.appended(1000 * S)
    watermark.appended(1001 * S)
    assert watermark.now() == 881 * S


def test_an_idle_partition_that_is_caught_up_follows_the_clock():
    watermark = PartitionWatermark(DISORDER)
    watermark.appended(1000 * S)
    for now in (1100 * S, 1200 * S):
        watermark.asked_for_end(now, end_offset=42, position=42)
        assert watermark.now() == now - CLOCK_SKEW_US - DISORDER


def test_a_backlog_holds_it():
    watermark = PartitionWatermark(DISORDER)
    watermark.appended(1000 * S)
    watermark.asked_for_end(5000 * S, end_offset=43, position=42)
    assert watermark.now() == 880 * S


def test_an_unreachable_broker_holds_it():
    watermark = PartitionWatermark(DISORDER)
    watermark.appended(1000 * S)
    watermark.asked_for_end(5000 * S, end_offset=None, position=42)
    assert watermark.now() == 880 * S


def test_the_brokers_clock_is_known_by_a_record_and_the_time_since():
    clock = BrokersClock(10 * S)
    clock.seen(5000 * S, monotonic_us=10 * S)
    assert clock.now(9999 * S, monotonic_us=40 * S) == 5030 * S
    assert clock.now(5010 * S, monotonic_us=40 * S) == 5010 * S  # ours is behind


def test_an_older_record_takes_nothing_back():
    clock = BrokersClock(10 * S)
    clock.seen(5000 * S, monotonic_us=10 * S)
    clock.seen(4990 * S, monotonic_us=20 * S)
    assert clock.now(5300 * S, monotonic_us=20 * S) == 5010 * S


def test_after_ten_minutes_of_silence_our_clock_counts_as_well_but_less():
    clock = BrokersClock(0)
    clock.seen(1000 * S, monotonic_us=5 * S)  # stored hours ago, maybe
    assert clock.now(9000 * S, monotonic_us=5 * S + SILENCE_US - 1) == 1600 * S - 1
    assert clock.now(9000 * S, monotonic_us=5 * S + SILENCE_US) == 9000 * S - SILENCE_US
    clock.seen(8000 * S, monotonic_us=700 * S)
    assert clock.now(9100 * S, monotonic_us=700 * S) == 8000 * S


def test_nothing_is_known_of_the_brokers_clock_before_a_record_or_a_silence():
    clock = BrokersClock(10 * S)
    assert clock.now(5000 * S, monotonic_us=10 * S + SILENCE_US - 1) is None
    assert clock.now(5000 * S, monotonic_us=10 * S + SILENCE_US) == 5000 * S - SILENCE_US
