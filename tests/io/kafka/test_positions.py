import pytest

from beam_pipelines.io.kafka.positions import Position, Positions, PositionsCoder, PositionsTracker

A, B = ("views", 0), ("views", 1)
IDS = {"views": "id-1"}


def positions(**at: Position) -> Positions:
    return Positions({("views", "ab".index(name)): p for name, p in at.items()}, IDS, begun=True)


def test_a_partition_without_a_stop_is_never_done():
    assert not Position(0, 10**12).done


@pytest.mark.parametrize(("next_", "done"), [(6, False), (7, True), (8, True)])
def test_a_partition_is_done_at_its_stop(next_, done):
    assert Position(5, next_, stop=7).done is done


def test_positions_are_done_when_all_partitions_are():
    done, open_ = Position(0, 7, stop=7), Position(0, 6, stop=7)
    assert positions(a=done, b=done).done
    assert not positions(a=done, b=open_).done


def test_a_reader_without_partitions_is_done_once_it_has_looked():
    assert not Positions().done
    assert Positions(begun=True).done


def test_moving_replaces_and_adds_partitions():
    before = positions(a=Position(0, 1))
    assert before.moved({A: Position(0, 2), B: Position(3, 3)}) == positions(
        a=Position(0, 2), b=Position(3, 3)
    )
    assert before == positions(a=Position(0, 1))


def test_the_watermark_is_the_least_and_unknown_while_one_is():
    known, behind = Position(0, 0, None, 70), Position(0, 0, None, 50)
    assert positions(a=known, b=behind).watermark_us() == 50
    assert positions(a=known, b=Position(0, 0)).watermark_us() is None
    assert Positions().watermark_us() is None


def test_positions_survive_encoding():
    coder = PositionsCoder()
    full = Positions(
        {("é", 11): Position(1, 2, 3, 4, 5), ("é", 2): Position(0, 2**62, None, None, None)},
        {"é": "AbC-_="},
        begun=True,
        settings="--shards=4",
    )
    for each in (full, Positions()):
        assert coder.decode(coder.encode(each)) == each


def test_equal_positions_have_equal_encodings():
    # Runners compare encoded restrictions.
    there, back = {A: Position(0, 1), B: Position(0, 2)}, {B: Position(0, 2), A: Position(0, 1)}
    coder = PositionsCoder()
    assert coder.is_deterministic()
    assert coder.encode(Positions(there)) == coder.encode(Positions(back))


def test_a_checkpoint_leaves_the_rest_from_what_was_claimed():
    tracker = PositionsTracker(positions(a=Position(0, 0)), bounded=False)
    claimed = positions(a=Position(0, 5))
    assert tracker.try_claim(claimed)
    assert tracker.try_split(0) == (claimed, claimed)
    assert tracker.check_done()
    assert not tracker.try_claim(positions(a=Position(0, 9)))
    assert tracker.current_restriction() == claimed
    assert tracker.try_split(0) is None


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1])
def test_nothing_but_a_checkpoint_splits(fraction):
    tracker = PositionsTracker(positions(a=Position(0, 0)), bounded=False)
    assert tracker.try_split(fraction) is None
    assert tracker.try_claim(positions(a=Position(0, 1)))


def test_reading_to_the_end_is_done_at_the_stop_only():
    tracker = PositionsTracker(positions(a=Position(0, 0, stop=5)), bounded=True)
    assert tracker.try_claim(positions(a=Position(0, 4, stop=5)))
    with pytest.raises(ValueError, match="before its end"):
        tracker.check_done()
    assert tracker.try_claim(positions(a=Position(0, 5, stop=5)))
    assert tracker.check_done()
    assert tracker.try_split(0) is None


def test_an_endless_reader_that_just_stops_is_caught():
    tracker = PositionsTracker(positions(a=Position(0, 5)), bounded=False)
    with pytest.raises(ValueError, match="before its end"):
        tracker.check_done()


def test_progress_counts_records_read_and_known_to_be_left():
    tracker = PositionsTracker(
        positions(a=Position(10, 14, stop=20), b=Position(0, 7, stop=5)), bounded=True
    )
    progress = tracker.current_progress()
    assert (progress.completed_work, progress.remaining_work) == (11, 6)


def test_a_reader_that_has_not_begun_has_made_no_progress():
    progress = PositionsTracker(Positions(), bounded=False).current_progress()
    assert (progress.completed_work, progress.remaining_work) == (0, 0)
    assert PositionsTracker(Positions(), bounded=False).is_bounded() is False
    assert PositionsTracker(Positions(), bounded=True).is_bounded() is True
