"""The activity pipeline between a source and sinks that cost nothing."""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from beam_pipelines.activity import SINKS, Activity, broken_laws, build
from beam_pipelines.connectors import Sinks
from beam_pipelines.demo import CHUNK_RECORDS, DemoTraffic
from beam_pipelines.io.generated import ReadGenerated
from beam_pipelines.kernels.ndjson import NdjsonDecoder
from beam_pipelines.model.activity import ACTIVITY
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.telemetry import Counter, counters

# What runs in this process finds its input and leaves its output here: the graph of a
# pipeline is pickled, and would take batches along.
_held: list[pa.RecordBatch] = []
_kept: defaultdict[str, list[Any]] = defaultdict(list)


def hold(traffic: DemoTraffic) -> None:
    """Generate a stream, as the input of the next run."""
    _held[:] = map(traffic.payloads, range(traffic.chunks))


def run_core(*, keep: bool = False) -> dict[str, list[Any]]:
    """Run parse, lateness, dedupe, counts, users and sessions over the held stream.

    The source hands out batches from memory, and the sinks count rows.

    Args:
      keep: Whether the sinks also keep what they get.

    Returns:
      Sink → its elements, where they are kept.

    Raises:
      RuntimeError: the verdicts don't add up.
    """
    _kept.clear()
    read = ReadGenerated(_chunk, sum(map(len, _held)), CHUNK_RECORDS, "held")
    decisions = Activity(NdjsonDecoder(ACTIVITY), TimeRule())
    sinks = Sinks(
        write_lake=_CountRows("lake", keep),
        write_enriched=_CountRows("enriched", keep),
        write_dead_letters=_CountRows("dead_letters", keep),
        write_table=lambda table: _CountRows(table.name, keep),
    )
    pipeline = beam.Pipeline(runner=FnApiRunner())
    build(pipeline, read, decisions, sinks)
    result = pipeline.run()
    result.wait_until_finish()
    if broken := broken_laws(counters(result)):
        raise RuntimeError("; ".join(broken))
    return {sink: list(_kept[sink]) for sink in SINKS}


def _chunk(i: int) -> pa.RecordBatch:
    return _held[i]


@dataclass
class _CountRows(beam.PTransform):
    sink: str
    keep: bool

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        counter = Counter(f"rows_written.{self.sink}")
        return batches | beam.Map(partial(_count_rows, self.sink, self.keep, counter))


def _count_rows(sink: str, keep: bool, counter: Counter, element: Any) -> None:
    rows = element[1] if isinstance(element, tuple) else element  # the lake's have a span
    counter.inc(len(rows))
    if keep:
        _kept[sink].append(element)
