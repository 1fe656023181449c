"""Looks after jobs on a Flink cluster: what runs, stop with a savepoint, and what to go on from.

    python scripts/job.py list
    python scripts/job.py stop               # with a savepoint; prints where it lies
    python scripts/job.py resume-path        # of the last stop, for --savepoint_path
    python scripts/job.py last-checkpoint    # also of a job that a crash took away
    python scripts/job.py cancel             # without a savepoint; checkpoints stay
    python scripts/job.py counters           # what it read, judged, wrote and dropped

`stop`, `cancel`, `counters` and `last-checkpoint` take the job that runs, or a name or id. Exit
codes: 0; 1 it can't be done, and why; 2 misuse.
"""

import argparse
import json
import os
import sys
import time
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from beam_pipelines.flink import Cluster
from beam_pipelines.terminal import printable, run_command, say

SAVEPOINT_S = 600
"""Seconds that a savepoint may take."""

ENDED = ("FINISHED", "CANCELED", "FAILED")


class JobError(Exception):
    """Something the person at the keyboard has to know."""


class Jobs:
    """The jobs of a cluster.

    Args:
      url: http://HOST:PORT of its REST API.
    """

    def __init__(self, url: str) -> None:
        self.cluster = Cluster(url)

    def all(self) -> list[dict[str, Any]]:
        """Return what the cluster says of its jobs, the youngest first."""
        jobs = self.cluster.get("/jobs/overview")["jobs"]
        return sorted(jobs, key=lambda job: -job["start-time"])

    def one(self, wanted: str | None) -> str:
        """Return the id of the job that runs, or of the one with this id or name.

        Raises:
          JobError: there is none, or several.
        """
        jobs = [job for job in self.all() if job["state"] not in ENDED]
        if wanted is not None:
            jobs = [job for job in jobs if wanted in (job["jid"], job["name"])]
        if len(jobs) == 1:
            return str(jobs[0]["jid"])
        if jobs:
            names = ", ".join(job["name"] for job in jobs)
            raise JobError(f"several jobs run: {names}; say which one")
        what = "no job" if wanted is None else f"no job {wanted}"
        raise JobError(f"{what} runs on the Flink cluster at {self.cluster.url}")

    def checkpoints(self, job: str) -> dict[str, Any]:
        """Return what the cluster says of a job's checkpoints: counts, latest, history."""
        checkpoints: dict[str, Any] = self.cluster.get(f"/jobs/{job}/checkpoints")
        return checkpoints

    def stop(self, job: str, folder: str | None = None, patience_s: float = SAVEPOINT_S) -> str:
        """Stop a job with a savepoint, and return where it lies.

        Args:
          job: Its id.
          folder: Where the savepoint goes; None: where the cluster keeps them.
          patience_s: Seconds to wait for it.

        Raises:
          JobError: the savepoint failed, and why; the job goes on.
        """
        asked = {"drain": False, **({"targetDirectory": folder} if folder else {})}
        trigger = self._send("POST", f"/jobs/{job}/stop", asked)["request-id"]
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            answer = self.cluster.get(f"/jobs/{job}/savepoints/{trigger}")
            if answer["status"]["id"] == "COMPLETED":
                operation = answer["operation"]
                if "location" not in operation:
                    cause = operation.get("failure-cause", {}).get("stack-trace", "unknown")
                    raise JobError(f"the savepoint failed: {cause.splitlines()[0]}")
                return str(operation["location"])
            time.sleep(0.2)
        raise JobError(f"the savepoint isn't complete after {patience_s:.0f} s")

    def cancel(self, job: str) -> None:
        """Cancel a job; its checkpoints stay."""
        self._send("PATCH", f"/jobs/{job}?mode=cancel")

    def last_checkpoint(self, job: str | None) -> str:
        """Return where the last complete checkpoint lies.

        Args:
          job: Its id; None: of whichever job wrote one last, be it unknown to a JobManager
            that was started anew.

        Raises:
          JobError: there is none.
        """
        if job is not None and any(job == each["jid"] for each in self.all()):
            latest = self.checkpoints(job)["latest"]["completed"]
            if latest is None:
                raise JobError(f"the job {job} has no complete checkpoint as yet")
            return str(latest["external_path"])
        settings = {each["key"]: each["value"] for each in self.cluster.get("/jobmanager/config")}
        return newest_checkpoint(settings.get("state.checkpoints.dir", ""), job)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.cluster.url}{path}",
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


def newest_checkpoint(folder: str, job: str | None) -> str:
    """Return the newest complete checkpoint in a folder of this machine.

    Args:
      folder: `state.checkpoints.dir`: a path or a file: URL.
      job: Id of a job; None: any.

    Raises:
      JobError: there is none, or the folder is elsewhere.
    """
    url = urlsplit(folder)
    if url.scheme not in ("", "file") or not url.path:
        raise JobError(
            f"the cluster keeps checkpoints at {folder or 'no known place'}, which can't be "
            "looked through from here: find the newest folder chk-N with a file _metadata"
        )
    # Flink writes the metadata when all else is there.
    complete = sorted(
        (metadata.stat().st_mtime_ns, metadata.parent)
        for metadata in Path(url.path).glob(f"{job or '*'}/chk-*/_metadata")
    )
    if not complete:
        of = f" of the job {job}" if job else ""
        raise JobError(f"there is no complete checkpoint{of} in {url.path}")
    return f"file://{complete[-1][1]}"


def _list(jobs: Jobs, flags: argparse.Namespace) -> None:
    for job in jobs.all():
        since = datetime.fromtimestamp(job["start-time"] / 1000, UTC)
        line = f"{job['jid']}  {job['state']:<10} {job['name']}  since {since:%Y-%m-%d %H:%M:%S}Z"
        if job["state"] not in ENDED:
            checkpoints = jobs.checkpoints(job["jid"])
            line += f"  checkpoints {checkpoints['counts']['completed']}"
            if latest := checkpoints["latest"]["completed"]:
                line += f", the last one {latest['state_size']:,} bytes"
        print(printable(line))


def _stop(jobs: Jobs, flags: argparse.Namespace) -> None:
    path = jobs.stop(jobs.one(flags.job))
    flags.store.parent.mkdir(parents=True, exist_ok=True)
    flags.store.write_text(f"{path}\n")
    print(path)


def _resume_path(jobs: Jobs, flags: argparse.Namespace) -> None:
    if not flags.store.exists():
        raise JobError(f"no job was stopped from here: there is no {flags.store}")
    print(flags.store.read_text().strip())


def _cancel(jobs: Jobs, flags: argparse.Namespace) -> None:
    jobs.cancel(jobs.one(flags.job))


def _counters(jobs: Jobs, flags: argparse.Namespace) -> None:
    job = jobs.one(flags.job)
    counted = jobs.cluster.counters(job) | jobs.cluster.lost(job)
    for name, count in sorted(counted.items()):
        print(name, count)


def _last_checkpoint(jobs: Jobs, flags: argparse.Namespace) -> None:
    running = [job["jid"] for job in jobs.all() if job["state"] not in ENDED]
    job = jobs.one(flags.job) if flags.job in running or (running and not flags.job) else flags.job
    print(jobs.last_checkpoint(job))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    flags = _parser().parse_args(argv)
    master = flags.flink_master
    jobs = Jobs(master if "://" in master else f"http://{master}")
    try:
        flags.act(jobs, flags)
    except JobError as error:
        say(error)
        return 1
    except HTTPError as error:
        say(f"the Flink cluster at {jobs.cluster.url} refuses: {error}")
        return 1
    except OSError as error:
        say(f"no Flink cluster answers at {jobs.cluster.url}: {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Look after jobs on a Flink cluster.", allow_abbrev=False
    )
    home = os.environ.get("STACK_HOME") or Path(__file__).parent.parent / ".stack"
    parser.add_argument(
        "--flink_master",
        default=os.environ.get("FLINK_MASTER", "127.0.0.1:28081"),
        metavar="HOST:PORT",
        help="REST address of the cluster (default: $FLINK_MASTER, else 127.0.0.1:28081).",
    )
    parser.add_argument(
        "--store",
        type=Path,
        default=Path(home) / "savepoint",
        metavar="FILE",
        help="Where the path of the last savepoint is kept (default: STACK_HOME/savepoint).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, act, help_, takes_job in (
        ("list", _list, "show the jobs of the cluster", False),
        ("stop", _stop, "stop a job with a savepoint", True),
        ("resume-path", _resume_path, "print where the last stopped job left its state", False),
        ("cancel", _cancel, "cancel a job, without a savepoint", True),
        ("counters", _counters, "print a job's counters since it was started or restarted", True),
        ("last-checkpoint", _last_checkpoint, "print where the newest checkpoint lies", True),
    ):
        command = commands.add_parser(name, help=help_, description=help_)
        command.set_defaults(act=act, job=None)
        if takes_job:
            command.add_argument("job", nargs="?", metavar="JOB", help="its id or name")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
