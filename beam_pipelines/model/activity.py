"""User activity: its events and its tables."""

import pyarrow as pa

from beam_pipelines.model.batches import one_of
from beam_pipelines.model.records import EVENT_TIME, TIMESTAMP
from beam_pipelines.model.tables import Table

PAGE_VIEW, CLICK, SESSION_START, SESSION_END = EVENT_TYPES = (
    "page_view",
    "click",
    "session_start",
    "session_end",
)

USER, EVENT_ID = "user_id", "event_id"

ACTIVITY = pa.schema(
    [
        pa.field(EVENT_TIME, TIMESTAMP, nullable=False),
        pa.field(USER, pa.string(), nullable=False),
        pa.field("page_url", pa.string(), nullable=False),
        one_of("event_type", EVENT_TYPES),
        pa.field(EVENT_ID, pa.string()),  # null: the record has none
    ]
)
"""The columns of an event; nullable ones are optional."""


ACCESS_LOG_COLUMNS = {"user_id": "host", "page_url": "target"}
"""What the lines of an access log say of an event: column → part of the line."""

ACCESS_LOG_CONSTANTS = {"event_type": PAGE_VIEW}
"""What is the same for all of them."""


def _column(name: str, data_type: pa.DataType) -> pa.Field:
    return pa.field(name, data_type, nullable=False)


PAGE_VIEW_COUNTS = Table(
    "page_view_counts",
    pa.schema(
        [
            _column("window_start", TIMESTAMP),
            _column("window_end", TIMESTAMP),
            _column("page_url", pa.string()),
            _column("views", pa.int64()),
        ]
    ),
    key=("window_start", "window_end", "page_url"),
    merge={"views": "greatest"},
)

ACTIVE_USERS = Table(
    "active_users",
    pa.schema(
        [
            _column("window_start", TIMESTAMP),
            _column("window_end", TIMESTAMP),
            _column("active_users", pa.int64()),
        ]
    ),
    key=("window_start", "window_end"),
    merge={"active_users": "greatest"},
)

USER_SESSIONS = Table(
    "user_sessions",
    pa.schema(
        [
            _column("user_id", pa.string()),
            _column("session_start", TIMESTAMP),
            _column("session_end", TIMESTAMP),
            _column("duration_s", pa.float64()),
            _column("page_views", pa.int64()),
            _column("clicks", pa.int64()),
            _column("ended_by", pa.string()),
        ]
    ),
    key=("user_id", "session_start"),
)
"""One row per session, emitted once; `ended_by` is `session_end` or `timeout`."""

TABLES = (PAGE_VIEW_COUNTS, ACTIVE_USERS, USER_SESSIONS)
