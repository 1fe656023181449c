import apache_beam as beam
import pytest
from apache_beam.transforms.trigger import (
    AccumulationMode,
    AfterCount,
    AfterProcessingTime,
    AfterWatermark,
)
from apache_beam.transforms.window import FixedWindows, Sessions, SlidingWindows

from beam_pipelines.model.time_rule import SLACK_S
from beam_pipelines.model.windows import WindowPolicy, refuse_partial_results


def windowed(policy, lateness_s=120):
    return beam.Pipeline() | beam.Create([1]) | policy.into(lateness_s=lateness_s)


def test_each_kind_gives_beams_own_windows():
    assert WindowPolicy.fixed(60).window_fn() == FixedWindows(60)
    assert WindowPolicy.sliding(300, 60).window_fn() == SlidingWindows(300, 60)
    assert WindowPolicy.session(30).window_fn() == Sessions(30)


def test_beam_is_told_a_longer_lateness_so_that_it_drops_nothing():
    windowing = windowed(WindowPolicy.fixed(60), lateness_s=7).windowing
    assert windowing.allowed_lateness == 7 + SLACK_S
    assert windowing.accumulation_mode == AccumulationMode.ACCUMULATING


def test_slices_divide_every_window_and_keep_the_firings():
    policy = WindowPolicy.sliding(300, 40, early_s=3)
    assert policy.slices() == WindowPolicy.fixed(20, early_s=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowPolicy.fixed(0), "positive lengths"),
        (lambda: WindowPolicy.sliding(60, 300), "leaves holes"),
        (lambda: WindowPolicy.fixed(60).into(lateness_s=-1), "must not be negative, got -1"),
        (lambda: WindowPolicy.fixed(60, early_s=0), "early firings need a positive period"),
        (lambda: WindowPolicy("daily", 1, 1), "fixed, sliding or session, not 'daily'"),
    ],
)
def test_windows_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_discarding_windows_are_refused_before_a_greatest_merge():
    with pytest.raises(ValueError, match="table t keeps the greatest value"):
        refuse_partial_results(windowed(WindowPolicy.fixed(60, accumulating=False)), "table t")
    refuse_partial_results(windowed(WindowPolicy.fixed(60)), "table t")
    refuse_partial_results(beam.Pipeline() | beam.Create([1]), "table t")


@pytest.mark.parametrize(
    ("early_s", "of_slices", "early", "late", "lateness_s"),
    [
        (None, False, None, AfterCount(1), 120 + 60),
        (10, False, AfterProcessingTime(10), AfterProcessingTime(10), 120 + 60),
        # Slices fire once more as they are given up: there must still be a window then.
        (10, True, AfterCount(1), AfterCount(1), 120 + 120),
    ],
)
def test_late_rows_fire_at_the_pace_of_early_ones(early_s, of_slices, early, late, lateness_s):
    policy = WindowPolicy.fixed(60, early_s=early_s)
    windowing = policy.into(lateness_s=120, of_slices=of_slices).windowing
    assert repr(windowing.triggerfn) == repr(AfterWatermark(early=early, late=late))
    assert windowing.allowed_lateness == lateness_s
