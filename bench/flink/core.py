"""The activity command with sinks that only count: `python -m bench.flink.core FLAGS`.

The flags, the source, the graph and how it is started are the command's own.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import apache_beam as beam

from beam_pipelines import activity
from beam_pipelines.connectors import Sinks
from beam_pipelines.telemetry import Counter


@dataclass
class CountRows(beam.PTransform):
    """Count what a sink would have been given."""

    sink: str

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        counter = Counter(f"rows_written.{self.sink}")
        return batches | beam.Map(partial(_count, counter))


def _count(counter: Counter, element: Any) -> None:
    rows = element[1] if isinstance(element, tuple) else element  # the lake's have a span
    counter.inc(len(rows))


def counting_sinks(*_: Any) -> Sinks:
    """Stand in for `connectors.open_sinks`."""
    return Sinks(
        write_lake=CountRows("lake"),
        write_enriched=CountRows("enriched"),
        write_dead_letters=CountRows("dead_letters"),
        write_table=lambda table: CountRows(table.name),
    )


if __name__ == "__main__":
    from bench.flink import core  # workers look for the sinks there, not in __main__

    with patch.object(activity, "open_sinks", core.counting_sinks):
        sys.exit(activity.main())
