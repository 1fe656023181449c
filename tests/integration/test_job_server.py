"""The job server that is built here."""

import os
import signal
import subprocess
import sys
import time
from zipfile import ZipFile

import pytest

from beam_pipelines.flink import BUILT_JAR
from scripts.job import Jobs
from scripts.verify import WrongState, nothing_lost
from tests.integration.job import REPOSITORY

HANDLERS = "org/apache/beam/runners/fnexecution/control/BundleCheckpointHandlers"


def test_what_a_reader_has_left_waits_under_few_ids():
    """Beam's own class draws a new id each time, of which RocksDB makes a column family."""
    with ZipFile(BUILT_JAR) as jar:
        names = [name for name in jar.namelist() if name.startswith(HANDLERS)]
        code = b"".join(jar.read(name) for name in names)
    assert b"sdf_checkpoint" in code
    assert b"IdGenerator" not in code
    assert len(names) == len(set(names))


def test_verify_fails_where_the_runner_drops_something(cluster, tmp_path):
    """Other tests say that nothing is dropped; so there must be something to see when it is."""
    where = cluster.settings.environment()
    jobs = Jobs(f"http://{where['FLINK_MASTER']}")
    name = f"dropping-{time.time_ns()}"
    command = (sys.executable, "-m", "tests.integration.dropping")
    flags = ("--runner=FlinkRunner", f"--job_name={name}", "--parallelism=1")
    with (tmp_path / "log").open("w+") as log:
        driver = subprocess.Popen(
            [*command, *flags],
            cwd=REPOSITORY,
            env=os.environ | where,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            lost = _awaited(lambda: _lost(jobs, name), log)
            assert lost.keys() == {"droppedDueToLateness"}
            with pytest.raises(WrongState, match=r"^droppedDueToLateness [\d,]+ of dropping-"):
                nothing_lost(jobs.cluster)
        finally:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            if (job := jobs.cluster.job_named(name)) is not None:
                jobs.cancel(job)


def _awaited(look, log):
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if seen := look():
            return seen
        time.sleep(1)
    log.seek(0)
    raise AssertionError(f"nothing was dropped: {log.read()[-2000:]}")


def _lost(jobs, name):
    job = jobs.cluster.job_named(name)
    return {} if job is None else jobs.cluster.lost(job)
