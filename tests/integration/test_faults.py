"""Whatever is killed under the job, what it leaves behind equals the oracle's truth: nothing is
lost, and nothing counts twice."""

import re
import time

import pytest

from tests.faults.faults import FAULTS
from tests.faults.run import Run


@pytest.fixture
def run(cluster, tmp_path, request):
    """Return a run of its own, whose job isn't started yet."""
    cluster.up()  # what a failed test left down
    run = Run(cluster, re.sub(r"\W+", "_", request.node.callspec.id).lower(), tmp_path)
    run.prepare()
    yield run
    run.close()


KILLS = ("a worker killed", "the TaskManager killed")


@pytest.mark.parametrize("faults", [KILLS], ids=["two kills"])
def test_what_is_left_behind_equals_the_truth_after_two_kills(faults, run):
    struck(run, *faults)


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_left_behind_equals_the_truth_after(fault, run):
    struck(run, fault)


def struck(run, *faults):
    """Strike a job that runs, one fault after another, and look at what it leaves behind."""
    run.submit()
    with run.producing():
        before = run.await_checkpoints(4)
        for fault in faults:
            at = time.time()
            FAULTS[fault].strike(run)
            if FAULTS[fault].restores:
                run.await_restored(since=at)
            run.await_checkpoints(3)

    assert run.settled_differences(run.truth()) == []

    # It went on from state: what was accepted before the checkpoint was not so once more.
    published = run.published()
    known = [times for times in published.values() if min(times) < before["trigger_timestamp"]]
    assert len(known) > 500
    assert [times for times in known if max(times) > min(times)] == []
    assert len(published) > len(known)
