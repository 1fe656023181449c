"""An endless job of which the runner drops every element: `python -m tests.integration.dropping`.

The activity pipeline leaves the runner nothing to drop; this shows what it would look like.
"""

import os
import sys
import time

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
)
from apache_beam.transforms.periodicsequence import PeriodicImpulse
from apache_beam.transforms.window import FixedWindows, TimestampedValue

from beam_pipelines import flink


def of_an_hour_ago(moment: float) -> TimestampedValue:
    """Return an element of a window that is long over."""
    return TimestampedValue(("key", 1), float(moment) - 3600)


def main(argv: list[str]) -> None:
    """Start the job, and wait until it runs: until then its job server is a child of this."""
    options = PipelineOptions([*argv, *flink.options_for(argv, "dropping", True, os.environ)])
    pipeline = beam.Pipeline(options=options)
    _ = (
        pipeline
        | PeriodicImpulse(start_timestamp=time.time(), fire_interval=0.2)
        | beam.Map(of_an_hour_ago)
        | beam.WindowInto(FixedWindows(1))
        | beam.GroupByKey()
        | beam.Map(print)
    )
    pipeline.run()
    cluster = flink.Cluster(options.view_as(FlinkRunnerOptions).flink_master)
    flink.wait_until_running(cluster, options.view_as(GoogleCloudOptions).job_name, print)


if __name__ == "__main__":
    main(sys.argv[1:])
