import io
import json
import logging
import pickle
import threading

import apache_beam as beam
import pytest
from apache_beam.metrics import Metrics
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from beam_pipelines import telemetry
from beam_pipelines.telemetry import (
    NAMESPACE,
    Counter,
    JsonFormatter,
    Progress,
    configure_logging,
    counters,
    progress_line,
    tally,
)


@pytest.fixture(autouse=True)
def fresh_tally():
    telemetry._tally.clear()
    yield
    telemetry._tally.clear()


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield root
    root.setLevel(level)
    root.handlers[:] = handlers


class Terminal(io.StringIO):
    def isatty(self):
        return True


class CountFn(beam.DoFn):
    def __init__(self):
        self.seen = Counter("seen")

    def process(self, element):
        self.seen.inc()
        Metrics.counter(NAMESPACE, "weight").inc(element)
        Metrics.counter("elsewhere", "seen").inc()


def test_a_log_record_is_one_line_of_json_with_its_extra_fields():
    record = logging.LogRecord("lake", logging.WARNING, "", 1, "range %d\nis “late”", (7,), None)
    record.created = 1_767_225_600.25
    record.seconds = 3
    record.path = io  # what JSON doesn't know
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2026-01-01T00:00:00.250000Z",
        "level": "WARNING",
        "logger": "lake",
        "message": "range 7\nis “late”",
        "seconds": 3,
        "path": str(io),
    }


def test_an_exception_is_logged_with_its_traceback(root_logger):
    stream = io.StringIO()
    configure_logging(stream=stream)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("lake").exception("failed")
    logged = json.loads(stream.getvalue())
    assert (logged["level"], logged["message"]) == ("ERROR", "failed")
    assert logged["error"].endswith("ValueError: broken")


def test_logs_below_the_level_are_left_out_and_earlier_handlers_replaced(root_logger):
    earlier, stream = io.StringIO(), io.StringIO()
    root_logger.addHandler(logging.StreamHandler(earlier))
    configure_logging(stream=stream)
    logging.getLogger("lake").info("unheard")
    logging.getLogger("lake").warning("heard")
    assert earlier.getvalue() == ""
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["heard"]


def test_counters_of_a_run_are_summed_over_steps_and_only_ours():
    pipeline = beam.Pipeline(runner=FnApiRunner())
    numbers = pipeline | beam.Create([1, 2, 3])
    _ = numbers | "one" >> beam.ParDo(CountFn())
    _ = numbers | "other" >> beam.ParDo(CountFn())
    result = pipeline.run()
    result.wait_until_finish()
    assert counters(result) == {"seen": 6, "weight": 12}
    assert tally() == {"seen": 6}


def test_a_counter_travels_to_workers_by_name():
    counter = pickle.loads(pickle.dumps(Counter("seen")))
    counter.inc(2)
    assert tally() == {"seen": 2}


def test_a_tally_loses_nothing_between_threads():
    def count():
        counter = Counter("seen")
        for _ in range(1000):
            counter.inc()

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally() == {"seen": 8000}


@pytest.mark.parametrize(
    ("total", "line"),
    [
        (200_000, "read 120,000 of 200,000 · accepted 98,000 · late 0 · 3 s"),
        (None, "read 120,000 · accepted 98,000 · late 0 · 3 s"),
    ],
)
def test_a_progress_line_names_what_it_counts(total, line):
    counted = {"read": 120_000, "accepted": 98_000, "duplicate": 7}
    assert progress_line(counted, ("read", "accepted", "late"), total, 3.2) == line


def test_progress_redraws_one_line_on_a_terminal_and_ends_it():
    stream, seconds = Terminal(), iter([100.0, 101.0, 103.0])
    Counter("read").inc(5)  # by an earlier run in this process
    with Progress(("read",), total=9, stream=stream, clock=lambda: next(seconds)) as progress:
        Counter("read").inc(4)
        progress.draw()
        Counter("read").inc(5)
    assert stream.getvalue() == "\rread 4 of 9 · 1 s\x1b[K\rread 9 of 9 · 3 s\x1b[K\n"


def test_progress_prints_lines_where_there_is_no_terminal():
    stream, seconds = io.StringIO(), iter([0.0, 5.0, 6.0])
    with Progress(("read",), stream=stream, clock=lambda: next(seconds)) as progress:
        progress.draw()
        Counter("read").inc(1000)
    assert stream.getvalue() == "read 0 · 5 s\nread 1,000 · 6 s\n"


def test_progress_is_drawn_while_the_work_goes_on(monkeypatch):
    drawn = threading.Event()

    class Watched(Terminal):
        def write(self, text):
            drawn.set()
            return super().write(text)

    monkeypatch.setattr(telemetry, "TTY_PERIOD_S", 0.001)
    with Progress(("read",), stream=Watched()):
        assert drawn.wait(timeout=10)


def test_progress_is_drawn_a_last_time_when_the_work_fails():
    stream = io.StringIO()
    with (
        pytest.raises(ZeroDivisionError),
        Progress(("read",), stream=stream, clock=lambda: 1.0),
    ):
        raise ZeroDivisionError
    assert stream.getvalue() == "read 0 · 0 s\n"


def test_progress_needs_something_to_show():
    with pytest.raises(ValueError, match="needs a counter"):
        Progress(())
