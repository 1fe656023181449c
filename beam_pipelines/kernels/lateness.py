"""The time rule over columns."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from beam_pipelines.kernels.columns import micros
from beam_pipelines.model.records import FUTURE, LATE, ON_TIME, TOO_LATE
from beam_pipelines.model.time_rule import TimeRule

_SECOND_US = 1_000_000


class Judged(NamedTuple):
    """One entry per row.

    verdicts: int8 codes into VERDICTS.
    seconds_late: float64; how far the event time lies behind the watermark of its append
      time (positive: late), NaN for complete input. For `future` rows it is minus the
      seconds ahead of the append time.
    """

    verdicts: np.ndarray
    seconds_late: np.ndarray


def judge(event_time: pa.Array, append_time: pa.Array, rule: TimeRule) -> Judged:
    """Judge each row by its event time and append time (timestamp[us], the latter or null)."""
    events = micros(event_time)
    complete = append_time.null_count == len(append_time)
    if complete and rule.as_of_us is None:
        return Judged(np.full(len(events), ON_TIME, np.int8), np.full(len(events), np.nan))
    if complete:
        appends = np.full(len(events), rule.as_of_us, np.int64)
        known = np.zeros(len(events), bool)
    else:
        known = ~append_time.is_null().to_numpy(zero_copy_only=False)
        appends = np.where(
            known, micros(append_time), events if rule.as_of_us is None else rule.as_of_us
        )
    behind = appends - rule.out_of_orderness_s * _SECOND_US - events
    verdicts = np.where(known & (behind > 0), LATE, ON_TIME).astype(np.int8)
    verdicts[known & (behind > rule.allowed_lateness_s * _SECOND_US)] = TOO_LATE
    future = events > appends + rule.future_tolerance_s * _SECOND_US
    verdicts[future] = FUTURE
    seconds_late = np.where(future, appends - events, np.where(known, behind, np.nan)) / _SECOND_US
    return Judged(verdicts, seconds_late)
