"""What a run tells its operators: structured logs, counters, progress."""

import json
import logging
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Self, TextIO

from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.metrics.metric import MetricResults
from apache_beam.runners.runner import PipelineResult

NAMESPACE = "beam_pipelines"
"""Of every metric of this package."""

TTY_PERIOD_S = 0.5
"""Seconds between two drawings of the progress line on a terminal."""

LOG_PERIOD_S = 5.0
"""Seconds between two progress lines elsewhere."""

_STANDARD_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime"}


class JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON.

    Its fields: time (RFC 3339, UTC), level, logger, message, error (a traceback, where
    there is one), then whatever was given as `extra`. What JSON doesn't know is written
    as text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its newline."""
        stored = datetime.fromtimestamp(record.created, UTC)
        fields: dict[str, Any] = {
            "time": stored.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        for name, value in vars(record).items():
            if name not in _STANDARD_FIELDS:
                fields.setdefault(name, value)
        line = json.dumps(fields, ensure_ascii=False, default=str)
        if line.isprintable():
            return line
        # Still JSON, and no terminal that shows it obeys what a record holds.
        return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def configure_logging(level: int = logging.WARNING, stream: TextIO | None = None) -> None:
    """Send the logs of this process to stderr (or `stream`) as lines of JSON.

    Replaces the handlers of the root logger, Beam's own included.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)


class Counter:
    """A counter of the pipeline that can be watched while it grows.

    It increments the Beam metric of this name, which runners collect when a bundle is
    committed, and a tally of this process, which is there at once. The tally counts
    retried bundles again and knows nothing of other processes: it is for progress.
    `counters` tells what the run did.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._metric = Metrics.counter(NAMESPACE, name)

    def inc(self, count: int = 1) -> None:
        """Add to the metric and to the tally."""
        self._metric.inc(count)
        with _tally_lock:
            _tally[self.name] += count

    def __reduce__(self) -> tuple[type["Counter"], tuple[str]]:
        return Counter, (self.name,)


_tally: defaultdict[str, int] = defaultdict(int)
_tally_lock = threading.Lock()


def tally() -> dict[str, int]:
    """Return what the counters of this process have counted so far."""
    with _tally_lock:
        return dict(_tally)


def counters(result: PipelineResult) -> dict[str, int]:
    """Return the package's counters of a run, each summed over the steps that share it.

    Committed values where the runner knows them, else attempted ones.
    """
    found = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))
    totals: defaultdict[str, int] = defaultdict(int)
    for metric in found[MetricResults.COUNTERS]:
        totals[metric.key.metric.name] += metric.result
    return dict(totals)


def progress_line(
    counted: Mapping[str, int], shown: Sequence[str], total: int | None, elapsed_s: float
) -> str:
    """Return e.g. "read 120,000 of 200,000 · accepted 98,000 · 3 s".

    Args:
      counted: Counts by counter name; a missing one is 0.
      shown: Names of the counters to show, in this order.
      total: What the first of them will reach; None where unknown.
      elapsed_s: Seconds since the start.
    """
    parts = [f"{name} {counted.get(name, 0):,}" for name in shown]
    if total is not None:
        parts[0] += f" of {total:,}"
    return " · ".join([*parts, f"{elapsed_s:.0f} s"])


class Progress:
    """Shows how far a run in this process has come, from the tally of its counters.

    A context manager: a thread redraws one line twice a second on a terminal, or prints
    a line every five seconds elsewhere. Leaving it draws the last state. Counts start at
    zero on entry, whatever ran in this process before.

    Args:
      shown: Names of the counters to show, at least one.
      total: What the first of them will reach; None where unknown.
      stream: Where to draw; stderr by default.
      clock: Seconds that only grow.
    """

    def __init__(
        self,
        shown: Sequence[str],
        total: int | None = None,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not shown:
            raise ValueError("progress needs a counter to show")
        self._shown = tuple(shown)
        self._total = total
        self._stream = stream or sys.stderr
        self._clock = clock
        self._tty = self._stream.isatty()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._started = self._clock()
        self._before = tally()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        self.draw()
        if self._tty:
            self._stream.write("\n")
            self._stream.flush()

    def draw(self) -> None:
        """Draw the present state: over the last one on a terminal, else as a new line."""
        counted = {name: count - self._before.get(name, 0) for name, count in tally().items()}
        line = progress_line(counted, self._shown, self._total, self._clock() - self._started)
        self._stream.write(f"\r{line}\x1b[K" if self._tty else f"{line}\n")
        self._stream.flush()

    def _run(self) -> None:
        while not self._left.wait(TTY_PERIOD_S if self._tty else LOG_PERIOD_S):
            self.draw()
