"""Flink as the runner: its job server, sensible options, and whether the job came up."""

import json
import logging
import os
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError
from urllib.parse import quote, urlsplit

from beam_pipelines.kernels.key_groups import MAX_PARALLELISM

BUILT_JAR = Path(__file__).parent.parent / "runners/flink/target/beam-flink-job-server.jar"
"""The job server that `make build-flink` makes."""

BUILT_FOR = "1.19"
"""The Flink that it is made for."""

OFFICIAL_URL = (
    "https://repo.maven.apache.org/maven2/org/apache/beam/beam-runners-flink-{flink}-job-server/"
    "{beam}/beam-runners-flink-{flink}-job-server-{beam}.jar"
)

LEAKS_BEFORE = (2, 76)
"""Job servers older than this make a column family of RocksDB per self-checkpoint (apache/beam
27648), and never drop one. The one that is built here is mended: `runners/flink/src` has what it
cost.
"""

JOB_SERVER_FLAGS = frozenset(
    """
    allow_non_restored_state attached_mode auto_watermark_interval checkpoint_timeout_millis
    checkpointing_interval checkpointing_mode disable_metrics enable_stable_input_drain
    execution_mode_for_batch execution_retry_delay externalized_checkpoints_enabled
    fail_on_checkpointing_errors faster_copy finish_bundle_before_checkpointing flink_conf_dir
    force_slot_sharing_group force_unaligned_checkpoint_enabled latency_tracking_interval
    max_bundle_size max_bundle_time_mills min_pause_between_checkpoints num_concurrent_checkpoints
    number_of_execution_retries object_reuse operator_chaining
    retain_externalized_checkpoints_on_cancellation savepoint_path
    shutdown_sources_after_idle_ms state_backend state_backend_storage_path
    unaligned_checkpoint_enabled use_data_stream_for_batch
    """.split()
)
"""Flags that Flink's job server knows, and Beam's Python doesn't."""

SEND_AT_ONCE = "data_buffer_size_limit=1"
"""Experiment of Beam's Java runners. By default they keep what a stage is given until there is 1 MB
of it, or its bundle ends: workers stand idle for the bundle's time, and then Flink does."""

METRICS_FETCHED_S = 1.0
"""Seconds that a JobManager has to fetch metrics from its TaskManagers. It does so when asked, at
most every `metrics.fetcher.update-interval` (10 s by default), and answers with what it has."""

_PATH_CHARACTERS = 3_500
"""A longer request line than 4,096 bytes is refused by Flink."""

CHECKPOINTING_INTERVAL_MS = 10_000
MAX_BUNDLE_SIZE, MAX_BUNDLE_TIME_MS = 50, 100


@dataclass(frozen=True)
class Cluster:
    """A Flink cluster, by its REST address.

    Args:
      url: http://HOST:PORT
    """

    url: str

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine, whose cores the workers share."""
        return urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")

    def get(self, path: str) -> Any:
        """Return the JSON of a path; raises OSError where there is no answer."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
            return json.load(answer)

    def overview(self) -> Any:
        """Return slots and version.

        Raises:
          ValueError: the cluster doesn't answer.
        """
        try:
            return self.get("/overview")
        except OSError as error:
            reason = error.reason if isinstance(error, URLError) else error
            raise ValueError(
                f"no Flink cluster answers at {self.url} ({reason}); is it running, and is "
                "--flink_master=HOST:PORT right?"
            ) from error

    def job_named(self, name: str) -> str | None:
        """Return the id of the job of this name; None: there is none."""
        jobs = self.get("/jobs/overview")["jobs"]
        return next((str(job["jid"]) for job in jobs if job["name"] == name), None)

    def metrics(self, job: str, wanted: Callable[[str], bool]) -> dict[str, float]:
        """Return metrics of a job's operators, by name, summed over operators and subtasks.

        Args:
          job: Its id.
          wanted: Which names are asked for. They are spelled as Flink does: spaces, colons,
            commas and dots of a name are underscores.

        Returns:
          What was so METRICS_FETCHED_S ago or later, or up to 10 s before, if somebody else
          asked meanwhile. What was never counted isn't there. A restart begins at zero.

        Raises:
          OSError: the cluster doesn't answer, or has no such job.
        """
        paths = [
            f"/jobs/{job}/vertices/{vertex['id']}/subtasks/metrics"
            for vertex in self.get(f"/jobs/{job}")["vertices"]
        ]
        for path in paths[:1]:
            self.get(path)  # has all of them fetched, for the answers below
            time.sleep(METRICS_FETCHED_S)
        sums: Counter[str] = Counter()
        for path in paths:
            names = [metric["id"] for metric in self.get(path)]
            for query in _queries([name for name in names if wanted(_own_name(name))]):
                for metric in self.get(f"{path}?agg=sum&get={query}"):
                    sums[_own_name(metric["id"])] += metric["sum"]
        return dict(sums)

    def counters(self, job: str) -> dict[str, int]:
        """Return the pipeline's counters of a job, by their own names; see `metrics`."""
        found = self.metrics(job, lambda name: name.startswith(_OWN))
        return {
            _DOTTED.sub(r"\1.", name.removeprefix(_OWN)): int(count)
            for name, count in found.items()
        }

    def lost(self, job: str) -> dict[str, int]:
        """Return what counts rows that were dropped, where it isn't zero; see `metrics`.

        These are `older_than_folded` of the pipeline, and the runner's own: Beam's
        `droppedDueToLateness` and `droppedDueToClosedWindow`, Flink's
        `numLateRecordsDropped`.
        """
        lost: Counter[str] = Counter()
        for name, count in self.metrics(job, lambda name: bool(_LOST.search(name))).items():
            lost["".join(_LOST.findall(name))] += int(count)
        return {name: count for name, count in lost.items() if count}


_OWN = "beam_pipelines_"  # telemetry.NAMESPACE, without importing Beam
_LOST = re.compile(r"older_than_folded$|(?:d|[A-Za-z]*D)ropped[A-Za-z]*$")
_DOTTED = re.compile("^(rows_written|invalid)_")


def _own_name(name: str) -> str:
    """Return a metric's name without its operator's, which has no dot."""
    return name.partition(".")[2]


def _queries(names: Sequence[str]) -> Iterator[str]:
    """Join names by commas, as many at a time as a path may hold."""
    query = ""
    for name in (quote(each, safe="") for each in names):
        if query and len(query) + len(name) > _PATH_CHARACTERS:
            yield query
            query = ""
        query += f",{name}" if query else name
    if query:
        yield query


def options_for(
    argv: Sequence[str], name: str, endless: bool, environment: Mapping[str, str]
) -> list[str]:
    """Return flags to add to a command line: what it leaves open, as it suits these pipelines.

    Args:
      argv: The command line.
      name: Of the pipeline; the job's adds the time.
      endless: Whether the input has no end.
      environment: FLINK_MASTER and BEAM_WORKER_POOL are looked for.

    Raises:
      ValueError: no cluster answers, no job server is to be had, or the cluster has no slots.
    """
    given = {each.partition("=")[0].removeprefix("--") for each in argv}
    values = dict(_pairs(argv))
    master = values.get("flink_master", environment.get("FLINK_MASTER"))
    added: dict[str, Any] = {}
    if master is not None and not master.startswith("["):
        cluster = Cluster(master if "://" in master else f"http://{master}")
        overview = cluster.overview()
        if not overview["slots-total"]:
            raise ValueError(f"the Flink cluster at {cluster.url} has no TaskManager as yet")
        version = ".".join(overview["flink-version"].split(".")[:2])
        slots = overview["slots-total"]
        added = {
            "flink_master": cluster.url,
            "parallelism": min(slots, _cores()) if cluster.is_here else slots,
        }
        wanted = int(values.get("parallelism", added["parallelism"]))
        if overview["slots-available"] < wanted:
            raise ValueError(
                f"the Flink cluster at {cluster.url} has {overview['slots-available']} of {slots} "
                f"slots free, and the job needs {wanted}: stop the other job (make stop), or "
                "--parallelism=N"
            )
    else:
        version = values.get("flink_version", BUILT_FOR)
        added = {"parallelism": _cores()}
    added["flink_version"] = version
    parallelism = int(values.get("parallelism", added["parallelism"]))
    added |= {
        "job_name": f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}",
        "max_parallelism": MAX_PARALLELISM,
        "max_bundle_size": MAX_BUNDLE_SIZE,
        "max_bundle_time_mills": MAX_BUNDLE_TIME_MS,
        "sdk_worker_parallelism": min(parallelism, _cores()),
    }
    if endless:
        added |= {
            "streaming": None,
            "checkpointing_interval": CHECKPOINTING_INTERVAL_MS,
            # A job takes these from here, whatever the cluster is configured to. Without the
            # first two, one that fails for good or is cancelled takes its checkpoints along.
            "externalized_checkpoints_enabled": None,
            "retain_externalized_checkpoints_on_cancellation": None,
            # Named, it is off: a checkpoint that took too long is no reason to start again
            # from the one before, and to take longer still.
            "fail_on_checkpointing_errors": None,
            # Else a checkpoint holds what the open bundle of a stage put out, under the number
            # of its output, and the next submission may number outputs in another order: a job
            # that goes on from it sends them elsewhere, or fails with a ClassCastException.
            "finish_bundle_before_checkpointing": None,
        }
    pool = environment.get("BEAM_WORKER_POOL")
    experiments = [SEND_AT_ONCE]
    if "environment_type" not in given and pool:
        added |= {"environment_type": "EXTERNAL", "environment_config": pool}
    elif "environment_type" not in given:
        added["environment_type"] = "LOOPBACK"
        experiments.append("use_loopback_process_worker")
    if not given & {"job_endpoint", "flink_job_server_jar"}:
        jar = _job_server(version)
        if jar is not None:
            added["flink_job_server_jar"] = jar
    named = {value.partition("=")[0] for flag, value in _pairs(argv) if flag == "experiments"}
    return [
        *(
            f"--{name}" if value is None else f"--{name}={value}"
            for name, value in added.items()
            if name not in given
        ),
        *(f"--experiments={each}" for each in experiments if each.partition("=")[0] not in named),
    ]


def _cores() -> int:
    return os.cpu_count() or 1


def _pairs(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    for flag, following in pairwise([*argv, ""]):
        name, equals, value = flag.removeprefix("--").partition("=")
        yield name, value if equals else following


def _job_server(flink_version: str) -> str | None:
    """Return the jar to take; None: the official one, which Beam downloads by itself."""
    from apache_beam.options.pipeline_options import FlinkRunnerOptions
    from apache_beam.version import __version__ as beam_version

    why_not = f"Beam {beam_version} publishes none for Flink {flink_version}"
    if flink_version in FlinkRunnerOptions.PUBLISHED_FLINK_VERSIONS:
        url = OFFICIAL_URL.format(flink=flink_version, beam=beam_version)
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=5):
                return None
        except OSError as error:
            why_not = f"the official one can't be downloaded ({error})"
    if flink_version != BUILT_FOR or not BUILT_JAR.exists():
        raise ValueError(
            f"there is no job server for Flink {flink_version}: {why_not}, and none was built "
            f"for it. Build one for Flink {BUILT_FOR} by `make build-flink`, or name one by "
            "--flink_job_server_jar=PATH or --job_endpoint=HOST:PORT"
        )
    return str(BUILT_JAR)


def notes(argv: Sequence[str]) -> list[str]:
    """Return what the person who starts a job should know of its job server."""
    values = dict(_pairs(argv))
    if "job_endpoint" in values:
        return [f"job server: the one at {values['job_endpoint']}"]
    jar = values.get("flink_job_server_jar")
    if jar is None:
        return ["job server: Beam's official one"]
    lines = [f"job server: {jar}"]
    found = re.search(r"-(\d+)\.(\d+)\.\d+\.jar$", jar)
    if found and (beam := (int(found[1]), int(found[2]))) < LEAKS_BEFORE:
        lines.append(
            f"it is of Beam {beam[0]}.{beam[1]}, which keeps state of every slice that a reader "
            "reads, so that the job slows down until it is restarted (apache/beam 27648, mended in "
            f"{LEAKS_BEFORE[0]}.{LEAKS_BEFORE[1]}); the one of `make build-flink` doesn't"
        )
    return lines


def listen_here_only() -> None:
    """Have workers that this process starts (LOOPBACK) listen on the loopback interface.

    Beam's listen on all, and whoever reaches them may have them run what they like. They are
    called `localhost` as they were.
    """
    from apache_beam.runners.worker import worker_pool_main

    make = worker_pool_main.grpc.server

    def server(*args: Any, **settings: Any) -> Any:
        made = make(*args, **settings)
        add = made.add_insecure_port
        made.add_insecure_port = lambda address: add(address.replace("[::]", "127.0.0.1"))
        return made

    worker_pool_main.grpc = SimpleNamespace(server=server)


def quiet_submission() -> None:
    """Keep what Beam says of every submission out of the logs; our own words replace it."""
    for name in ("apache_beam.options.pipeline_options", "apache_beam.utils.subprocess_server"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().handlers[0].addFilter(
        lambda record: not record.getMessage().startswith("Waiting for grpc channel")
    )


def wait_until_running(
    cluster: Cluster, name: str, tell: Callable[[str], None], patience_s: float = 300
) -> str:
    """Wait until a job has completed a checkpoint, and return its id.

    Args:
      cluster: Where it runs.
      name: Of the job.
      tell: Is told at once why the job fails, while Flink tries it again.
      patience_s: Seconds that it has.

    Raises:
      RuntimeError: it failed, or isn't there in time; the message has the cause.
    """
    deadline = time.monotonic() + patience_s
    job = told = None
    while time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            job = job or cluster.job_named(name)
            if job is None:
                continue
            state = cluster.get(f"/jobs/{job}")["state"]
            if state in ("FAILED", "CANCELED"):
                raise RuntimeError(f"the job {state.lower()}: {failure(cluster, job)}")
            if cluster.get(f"/jobs/{job}/checkpoints").get("counts", {}).get("completed"):
                return job
            if (cause := _last_failure(cluster, job)) not in (None, told):
                tell(f"the job failed, and Flink tries it again: {cause}")
                told = cause
        except OSError:  # so it answers while it sets the job up
            continue
    cause = failure(cluster, job) if job else "it never reached the cluster"
    raise RuntimeError(f"after {patience_s:.0f} s the job has no checkpoint: {cause}")


def failure(cluster: Cluster, job: str) -> str:
    """Return why a job failed last: the line of Python's error, where there is one."""
    return _last_failure(cluster, job) or "no exception is known"


def _last_failure(cluster: Cluster, job: str) -> str | None:
    history = cluster.get(f"/jobs/{job}/exceptions").get("exceptionHistory", {}).get("entries", [])
    return python_error(history[0]["stacktrace"]) if history else None


def python_error(stacktrace: str) -> str:
    """Return what a Java stack trace is about.

    The last line of the Python traceback in it, else its innermost cause, else its first line.
    """
    lines = stacktrace.splitlines()
    tracebacks = [i for i, line in enumerate(lines) if "Traceback (most recent" in line]
    if not tracebacks:
        causes = [line for line in lines if line.startswith("Caused by: ")]
        return causes[-1].removeprefix("Caused by: ") if causes else (lines or ["unknown"])[0]
    ends = [
        line
        for line in lines[tracebacks[-1] + 1 :]
        if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Secret|Unreachable|Warning)\b", line)
    ]
    return re.sub(r" \[while running .*", "", ends[0]) if ends else lines[tracebacks[-1]]
