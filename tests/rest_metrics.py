"""A Flink cluster of whose REST API only jobs and metrics are there."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from beam_pipelines import flink

LONGEST_LINE = 4096 - len("GET  HTTP/1.1\r\n")
"""What Flink's server takes of a request's first line."""


class MetricsOfAJob(flink.Cluster):
    """Answers as a JobManager does: with nothing, until it had time to fetch what is.

    Args:
      job: Id of the job that there is.
      vertices: id → metric → its values, one for each subtask.
      monkeypatch: Takes the place of the clock.
    """

    def __init__(
        self,
        job: str,
        vertices: Mapping[str, Mapping[str, list[float]]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        super().__init__("http://127.0.0.1:1")
        self.__dict__.update(job=job, vertices=vertices, fetched=False, asked=[])

        def sleep(seconds: float) -> None:
            assert seconds == flink.METRICS_FETCHED_S
            self.__dict__["fetched"] = any("/metrics" in path for path in self.asked)

        monkeypatch.setattr(flink.time, "sleep", sleep)

    def get(self, path: str) -> Any:
        assert len(path) < LONGEST_LINE
        self.asked.append(path)
        url = urlsplit(path)
        if url.path == "/jobs/overview":
            started = {"start-time": 1, "end-time": -1, "name": f"activity-{self.job}"}
            return {"jobs": [{"jid": self.job, "state": "RUNNING", **started}]}
        if url.path == f"/jobs/{self.job}":
            return {"vertices": [{"id": each} for each in self.vertices]}
        _, jobs, job, vertices, vertex, subtasks, metrics = url.path.split("/")
        assert (jobs, job, vertices, subtasks) == ("jobs", self.job, "vertices", "subtasks")
        assert metrics == "metrics"
        known = self.vertices[vertex]
        if not url.query:
            return [{"id": name} for name in known if self.fetched]
        assert parse_qs(url.query)["agg"] == ["sum"]
        asked = url.query.split("get=")[1].split(",")  # as the server: a name's comma would split
        return [{"id": name, "sum": float(sum(known[name]))} for name in map(unquote, asked)]


def counting(monkeypatch: pytest.MonkeyPatch, **counts: float) -> MetricsOfAJob:
    """Return a cluster of the job `a`, which has one vertex with these metrics."""
    named = {f"[1]{{Parse__Fold}}.{name}": [value] for name, value in counts.items()}
    return MetricsOfAJob("a", {"v": named}, monkeypatch)
