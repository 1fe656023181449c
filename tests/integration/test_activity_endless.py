"""The job as it runs on a cluster: what it leaves behind equals the oracle's truth, nothing is
dropped, and it goes on from its savepoint only where its offsets mean what they meant."""

import re
import time
from dataclasses import dataclass
from typing import Any

import pytest

from tests.faults.run import RULES, Run
from tests.integration.job import Topics, event, far_future, first_failure, trouble
from tests.oracle.oracle import Oracle, Rules

PRODUCING_S = 30
LAST_EVENT_S = 5


@dataclass(frozen=True)
class Outcome:
    """What a job left that has seen every kind of record, and its savepoint.

    Args:
      run: What it ran on.
      inputs: `--input` of it.
      truth: What it must have left behind.
      records: How many are in its topics.
      differences: What its ends had that differs, once all windows and sessions were over.
      counted: Its counters, by name.
      lost: Those of dropped rows that were not zero.
      restarts: How often it was restarted.
      savepoint: Where it was stopped.
    """

    run: Run
    inputs: str
    truth: Oracle
    records: int
    differences: list[str]
    counted: dict[str, int]
    lost: dict[str, int]
    restarts: int
    savepoint: str


@pytest.fixture(scope="module")
def outcome(cluster, tmp_path_factory):
    """Run the job with short times, on a topic and on one that stays empty."""
    run = Run(cluster, "endless", tmp_path_factory.mktemp("endless"))
    run.prepare()
    topics = Topics(run.ends.bootstrap_servers)
    inputs = f"kafka:{run.topic},{topics.make(partitions=1)}"
    run.submit(f"--input={inputs}")
    with run.producing():
        now_us = time.time_ns() // 1000
        topics.send(run.topic, [*far_future(now_us), *trouble(now_us, seed=2)])
        time.sleep(PRODUCING_S)
    time.sleep(LAST_EVENT_S)  # on its own, in a window that nothing follows
    topics.send(run.topic, [("last", event(time.time_ns() // 1000, user="last"))])
    truth = run.truth()
    differences = run.settled_differences(truth)
    counted, lost = run.jobs.cluster.counters(run.job), run.jobs.cluster.lost(run.job)
    restarts = number_of_restarts(run)
    return Outcome(
        run,
        inputs,
        truth,
        truth.rows("SELECT count(*) FROM raw")[0][0],
        differences,
        counted,
        lost,
        restarts,
        run.jobs.stop(run.job),
    )


def number_of_restarts(run: Run) -> int:
    (metric,) = run.jobs.cluster.get(f"/jobs/{run.job}/metrics?get=numRestarts")
    return int(metric["value"])


def test_all_ends_equal_the_truth(outcome):
    assert outcome.differences == []


def test_every_kind_of_record_was_there(outcome):
    verdicts = dict(outcome.truth.rows("SELECT verdict, count(*) FROM records GROUP BY ALL"))
    assert verdicts.keys() == {"on_time", "late", "too_late", "future", "invalid"}
    assert min(verdicts.values()) >= 2
    ended = dict(outcome.truth.rows("SELECT ended_by, count(*) FROM user_sessions GROUP BY ALL"))
    assert min(ended["timeout"], ended["session_end"]) > 10


def test_a_record_of_the_year_3000_is_a_dead_letter_and_moves_no_window(outcome):
    future = outcome.truth.rows(
        "SELECT reason, payload FROM dead_letters WHERE reason = 'future' ORDER BY payload DESC"
    )
    assert b"future-32503680000000000" in future[0][1]
    ((late_views,),) = outcome.truth.rows("SELECT count(*) FROM accepted WHERE user_id = 'last'")
    assert late_views == 1  # its window closed: it is in the tables, or there were differences


def test_the_counters_add_up_to_the_records_and_nothing_was_dropped(outcome):
    counted = outcome.counted
    assert outcome.restarts == 0  # else they count some records twice
    expected = dict(outcome.truth.rows("SELECT verdict, count(*) FROM records GROUP BY ALL"))
    ((accepted,),) = outcome.truth.rows("SELECT count(*) FROM accepted")
    usable = expected["on_time"] + expected["late"]
    expected |= {"accepted": accepted, "duplicate": usable - accepted}
    assert {name: counted.get(name, 0) for name in expected} == expected
    assert counted["read"] == outcome.records
    written = {
        "enriched": accepted,
        "events_by_user": accepted,
        "lake": usable + expected["too_late"],
        "dead_letters": expected["invalid"] + expected["future"] + expected["too_late"],
        "user_sessions": outcome.truth.rows("SELECT count(*) FROM user_sessions")[0][0],
    }
    assert {name: counted[f"rows_written.{name}"] for name in written} == written
    assert outcome.lost == {}


def resumed(outcome: Outcome) -> str:
    rules = [f"--{name}={value}" for name, value in vars(RULES).items() if name.endswith("_s")]
    return first_failure(
        outcome.run,
        *(f"--input={outcome.inputs}", f"--savepoint_path={outcome.savepoint}"),
        *(*rules, "--checkpointing_interval=5000"),
    )


def test_a_job_does_not_go_on_where_its_offsets_are_gone(outcome):
    run, topics = outcome.run, Topics(outcome.run.ends.bootstrap_servers)
    now_us = time.time_ns() // 1000
    topics.send(run.topic, [(f"{i}", event(now_us, user=f"u{i}")) for i in range(100)])
    for partition in range(4):
        topics.trim(run.topic, partition, -1)  # all there is
    said = resumed(outcome)
    assert re.search(
        rf"offset \d+ of {run.topic}, partition \d, is not there; the broker has (\d+) to \1\. "
        "Retention removed records before they were read",
        said,
    )
    assert "choose where by --kafka_start" in said


def test_a_job_does_not_go_on_in_a_topic_that_was_made_anew(outcome):
    run, topics = outcome.run, Topics(outcome.run.ends.bootstrap_servers)
    topics.remove(run.topic)
    topics.make(run.topic)
    said = resumed(outcome)
    assert f"topic {run.topic} was deleted and made anew" in said
    assert "Start a new job, not from a savepoint" in said


def test_by_default_early_rows_arrive_within_fifteen_seconds(cluster, tmp_path):
    run = Run(cluster, "early", tmp_path)
    run.prepare()
    defaults = [f"--{n}={v}" for n, v in vars(Rules(0)).items() if n.endswith("_s")]
    run.submit(*defaults)
    try:
        topics = Topics(run.ends.bootstrap_servers)
        sent_at = time.monotonic()
        topics.send(run.topic, [("ann", event(time.time_ns() // 1000, user="ann", url="/early"))])
        run.eventually(lambda: early_rows(run) == EARLY, patience_s=60)
        assert time.monotonic() - sent_at < 15
    finally:
        run.close()


EARLY = {"page_view_counts": [("/early", 1)], "active_users": [(1,)] * 5}


def early_rows(run: Run) -> dict[str, list[Any]]:
    import psycopg

    with psycopg.connect(run.ends.database) as connection:
        return {
            "page_view_counts": connection.execute(
                "SELECT page_url, views FROM page_view_counts"
            ).fetchall(),
            "active_users": connection.execute("SELECT active_users FROM active_users").fetchall(),
        }
