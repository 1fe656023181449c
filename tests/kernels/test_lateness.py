import math

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels.lateness import judge
from beam_pipelines.model.records import VERDICTS
from beam_pipelines.model.time_rule import TimeRule

S = 1_000_000
RULE = TimeRule(out_of_orderness_s=120, allowed_lateness_s=60, future_tolerance_s=300)
TIMESTAMP = pa.timestamp("us", tz="UTC")


def verdicts(events, appends, rule=RULE):
    judged = judge(pa.array(events, TIMESTAMP), pa.array(appends, TIMESTAMP), rule)
    return [VERDICTS[code] for code in judged.verdicts], judged.seconds_late.tolist()


@pytest.mark.parametrize(
    ("behind_us", "verdict", "seconds_late"),
    [
        (-300 * S, "on_time", -420.0),
        (-300 * S - 1, "future", -300.000001),
        (0, "on_time", -120.0),
        (120 * S, "on_time", 0.0),
        (120 * S + 1, "late", 0.000001),
        (180 * S, "late", 60.0),
        (180 * S + 1, "too_late", 60.000001),
    ],
)
def test_bounds_belong_to_the_better_class(behind_us, verdict, seconds_late):
    assert verdicts([-behind_us], [0]) == ([verdict], [seconds_late])


def test_nothing_in_complete_input_is_late():
    assert verdicts([0, 10**17], [None, None])[0] == ["on_time", "on_time"]


def test_the_future_of_complete_input_is_judged_as_of_a_time():
    rule = TimeRule(future_tolerance_s=300, as_of_us=1000 * S)
    judged, late = verdicts([0, 1300 * S, 1300 * S + 1], [None] * 3, rule)
    assert judged == ["on_time", "on_time", "future"]
    assert [math.isnan(late[0]), math.isnan(late[1]), late[2]] == [True, True, -300.000001]


def naive(event, append, rule):
    as_of = append if append is not None else rule.as_of_us
    if as_of is not None and event > as_of + rule.future_tolerance_s * S:
        return "future"
    if append is None or event >= append - rule.out_of_orderness_s * S:
        return "on_time"
    allowed = (rule.out_of_orderness_s + rule.allowed_lateness_s) * S
    return "late" if event >= append - allowed else "too_late"


@given(
    st.lists(st.tuples(st.integers(-50, 50), st.one_of(st.none(), st.integers(-50, 50)))),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
    st.one_of(st.none(), st.integers(-50 * S, 50 * S)),
)
def test_columns_are_judged_like_single_records(pairs, disorder, lateness, future, as_of):
    rule = TimeRule(disorder, lateness, future, as_of)
    pairs = [(event * S, None if append is None else append * S) for event, append in pairs]
    assert verdicts([e for e, _ in pairs], [a for _, a in pairs], rule)[0] == [
        naive(event, append, rule) for event, append in pairs
    ]


def test_a_negative_allowance_is_refused():
    with pytest.raises(ValueError, match="allowed_lateness_s must not be negative, got -1"):
        TimeRule(allowed_lateness_s=-1)
