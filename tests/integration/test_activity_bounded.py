"""A topic read to its end by the default rules: all that is left behind equals the oracle's
truth, in this process and on Flink."""

import time
from typing import NamedTuple

import pytest

from tests.faults.run import Run
from tests.integration.job import Topics, activity, on_flink, trouble
from tests.oracle.oracle import Oracle, Rules
from tests.oracle.topic import dump


class Backlog(NamedTuple):
    """A topic with every kind of record, one without any, and what must come of them."""

    topics: str
    records: int
    oracle: Oracle


AS_OF_S = 1_767_603_600
RULES = Rules(AS_OF_S * 1_000_000)


@pytest.fixture(scope="module")
def backlog(kafka, tmp_path_factory):
    topics, raw = Topics(kafka), tmp_path_factory.mktemp("backlog") / "raw.parquet"
    topic, empty = topics.make(), topics.make(partitions=1)
    sent = topics.send(topic, trouble(time.time_ns() // 1000, seed=1))
    assert dump(kafka, topic, raw) == sent
    oracle = Oracle(raw, "ndjson", RULES)
    verdicts = dict(oracle.rows("SELECT verdict, count(*) FROM records GROUP BY ALL"))
    assert verdicts.keys() == {"on_time", "late", "too_late", "future", "invalid"}
    assert min(verdicts.values()) >= 2
    return Backlog(f"kafka:{topic},{empty}", sent, oracle)


def test_all_ends_of_a_run_in_this_process_equal_the_truth(backlog, kafka, tmp_path):
    ended = activity(
        {"KAFKA_BOOTSTRAP_SERVERS": kafka},
        *(f"--input={backlog.topics}", "--kafka_until_end", f"--output={tmp_path}"),
        f"--as_of={AS_OF_S * 1000}",
    )
    assert ended.code == 0, ended.stderr[-4000:]
    assert backlog.oracle.differences(tmp_path) == []


def test_all_ends_of_a_run_on_flink_equal_the_truth(backlog, cluster, tmp_path):
    run = Run(cluster, "bounded", tmp_path)
    run.prepare()
    ended = activity(
        run.where,
        *(f"--input={backlog.topics}", "--kafka_until_end", f"--as_of={AS_OF_S * 1000}"),
        *on_flink(run),
    )
    assert ended.code == 0, ended.stderr[-4000:]
    assert run.ends.differences(backlog.oracle) == []
    assert backlog.oracle.miscounted(ended.summary) == []
    assert ended.summary["read"] == backlog.records
