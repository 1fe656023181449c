"""What has a process of its own, so that its memory is its own: `python -m bench.child`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from beam_pipelines import activity
from beam_pipelines.demo import DemoTraffic
from bench import per_event, pipelines
from bench.measure import resident_bytes, timed


class Outcome(NamedTuple):
    """What a run reports of itself."""

    events: int
    seconds: float
    before_bytes: int  # resident when the clock started: the input, where it is held
    peak_bytes: int  # the most that was resident
    result: str  # equal for equal results; empty where there is none


class ChildError(RuntimeError):
    """A run failed; the message is what it printed."""


def in_child(kind: str, *arguments: Any) -> Any:
    """Call one of CALLS in a process of its own; returns what it returns, as JSON values.

    Raises:
      ChildError: it failed.
    """
    command = [sys.executable, "-m", "bench.child", json.dumps([kind, *arguments])]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise ChildError(f"{kind} {arguments} ended with {child.returncode}:\n{child.stderr}")
    return json.loads(child.stdout)


def run_core(events: int, seed: int) -> Outcome:
    """Run the core over a stream held in memory."""
    pipelines.hold(DemoTraffic(events, seed))
    return _outcome(events, pipelines.run_core)


def run_per_event(events: int, seed: int) -> Outcome:
    """Run the per-event pipeline over a stream held in memory."""
    per_event.hold(DemoTraffic(events, seed))
    return _outcome(events, per_event.run_per_event)


def run_whole(output: str, *flags: str) -> Outcome:
    """Do what `python -m beam_pipelines.activity` does.

    The seconds are those it prints itself: from the first record to the last row on disk,
    without the start of Python and the report at the end.

    Raises:
      ChildError: it ended with another code than 0.
    """
    before_bytes, _ = resident_bytes()
    code = activity.main([f"--output={output}", *flags])
    if code:
        raise ChildError(f"the activity pipeline ended with {code}")
    summary = json.loads(Path(output, "summary.json").read_text())
    _, peak_bytes = resident_bytes()
    return Outcome(
        summary["read"], summary["seconds"], before_bytes, peak_bytes, summary["result_sha256"]
    )


def differences(output: str, events: int, seed: int) -> list[str] | None:
    """Compare what a whole run over generated events left with the oracle of the tests.

    Returns:
      What differs, in words; None where the tests aren't there.
    """
    try:
        from tests.oracle.oracle import Oracle, Rules, write_raw
    except ModuleNotFoundError:
        return None
    traffic = DemoTraffic(events, seed)
    with TemporaryDirectory() as folder:
        raw = Path(folder, "raw.parquet")
        write_raw(raw, (("demo", traffic.payloads(i)) for i in range(traffic.chunks)))
        return Oracle(raw, "ndjson", Rules(traffic.as_of_us)).differences(Path(output))


CALLS: dict[str, Callable[..., Any]] = {
    "core": run_core,
    "per_event": run_per_event,
    "whole": run_whole,
    "differences": differences,
}


def _outcome(events: int, run: Callable[[], object]) -> Outcome:
    before_bytes, _ = resident_bytes()
    seconds = timed(run)
    _, peak_bytes = resident_bytes()
    return Outcome(events, seconds, before_bytes, peak_bytes, "")


def main() -> None:
    """Make the call that the command line holds, and print what it returns as JSON."""
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Nothing else goes to stdout, neither the report of a run nor DuckDB's progress.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    kind, *arguments = json.loads(sys.argv[1])
    returned = CALLS[kind](*arguments)
    with answer:
        json.dump(returned, answer)


if __name__ == "__main__":
    main()
