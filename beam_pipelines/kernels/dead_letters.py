"""Records that can't be used, with all that is needed to replay them."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from beam_pipelines.model.records import DEAD_LETTERS
from beam_pipelines.model.span import Span


def dead_letters(
    records: pa.RecordBatch,
    span: Span,
    stage: str,
    reasons: Sequence[str],
    messages: Sequence[str],
    seconds_late: np.ndarray | None = None,
) -> pa.RecordBatch:
    """Make dead letters of records.

    Args:
      records: Columns payload, offset and append_time.
      span: Where they were read.
      stage: The stage that rejects them.
      reasons: A reason code per record.
      messages: What was wrong, per record.
      seconds_late: float64 per record, or None where there is no event time.
    """
    rows = len(records)
    columns = {
        "payload": records["payload"],
        "topic": pa.array([span.topic] * rows, pa.string()),
        "partition": pa.array(np.full(rows, span.partition, np.int32)),
        "offset": records["offset"],
        "append_time": records["append_time"],
        "stage": pa.array([stage] * rows, pa.string()),
        "reason": pa.array(reasons, pa.string()),
        "message": pa.array(messages, pa.string()),
        "seconds_late": (
            pa.nulls(rows, pa.float64()) if seconds_late is None else pa.array(seconds_late)
        ),
    }
    return pa.RecordBatch.from_arrays(
        [columns[name] for name in DEAD_LETTERS.names], schema=DEAD_LETTERS
    )
