"""What activity stores in Cassandra: what is asked by user and by page (sql/cassandra.cql)."""

from beam_pipelines.io.cassandra.tables import CassandraTable, DayOf, MicrosOf
from beam_pipelines.model.activity import ACTIVITY, PAGE_VIEW_COUNTS
from beam_pipelines.model.records import event_schema

EVENTS_BY_USER = CassandraTable(
    "events_by_user",
    schema=event_schema(ACTIVITY),
    columns={
        "user_id": "user_id",
        "day": DayOf("event_time"),
        "event_time": "event_time",
        "micros": MicrosOf("event_time"),
        "identity": "identity",
        "page_url": "page_url",
        "event_type": "event_type",
        "event_id": "event_id",
    },
    partition_key=("user_id", "day"),
    clustering_key=("event_time", "micros", "identity"),
)

PAGE_VIEWS_BY_PAGE = CassandraTable(
    "page_views_by_page",
    schema=PAGE_VIEW_COUNTS.schema,
    columns={
        "page_url": "page_url",
        "day": DayOf("window_start"),
        "window_start": "window_start",
        "window_end": "window_end",
        "views": "views",
    },
    partition_key=("page_url", "day"),
    clustering_key=("window_start", "window_end"),
    greatest=("window_start", "views"),
)
