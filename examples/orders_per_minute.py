"""Count orders per shop and minute, each order once: batches in anybody's Beam pipeline."""

import apache_beam as beam
import pyarrow as pa
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from beam_pipelines.transforms import Batch, CountPerWindow, Deduplicate, Unbatch, WindowPolicy

TIME, TEXT = pa.timestamp("us", tz="UTC"), pa.string()
ORDERS = pa.schema([("event_time", TIME), ("order_id", TEXT), ("shop", TEXT)])
ROWS = [
    {"event_time": "2026-01-05T09:00:01Z", "order_id": "a1", "shop": "Porto"},
    {"event_time": "2026-01-05T09:00:01Z", "order_id": "a1", "shop": "Porto"},  # sent twice
    {"event_time": "2026-01-05T09:00:59Z", "order_id": "a2", "shop": "Porto"},
    {"event_time": "2026-01-05T09:01:01Z", "order_id": "a3", "shop": "Lyon"},
]

with beam.Pipeline(runner=FnApiRunner()) as pipeline:
    orders = pipeline | beam.Create(ROWS) | Batch(ORDERS) | Deduplicate(by="order_id")
    counts = orders | CountPerWindow(by="shop", window=WindowPolicy.fixed(60), into="orders")
    rows = counts | Unbatch()
    rows | beam.Map(lambda row: print(row["window_start"], row["shop"], row["orders"]))
